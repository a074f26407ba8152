"""Meshes, placement, weight transfer and memory switching (not built yet: this slice runs on one device)."""
