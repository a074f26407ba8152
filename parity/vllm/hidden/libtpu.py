"""Hides libtpu from vLLM, which takes an importable one for a TPU; here it is only the compiler for one."""

raise ImportError("libtpu is hidden from vLLM")
