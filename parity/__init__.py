"""PyTorch as the outside oracle: the only package that imports torch."""
