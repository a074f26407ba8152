"""Meshes and pods, which axis cuts what, placement, weight transfer and memory switching."""
