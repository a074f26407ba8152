"""Attention over packed rows, and of one new token a slot over a cache."""

from kernels.attention.api import Implementation, packed_attention, prefill_attention
from kernels.attention.cache import DenseCache, PagedCache
from kernels.attention.decode import DecodeImplementation, decode_attention, extend_attention

__all__ = [
  "DecodeImplementation",
  "DenseCache",
  "Implementation",
  "PagedCache",
  "decode_attention",
  "extend_attention",
  "packed_attention",
  "prefill_attention",
]
