"""The configuration tree, and one small file a run."""
