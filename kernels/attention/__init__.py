"""Attention over packed rows, and of one new token a slot over a cache."""

from kernels.attention.api import Implementation, packed_attention

__all__ = ["Implementation", "packed_attention"]
