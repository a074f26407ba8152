"""Log-probabilities of tokens from hidden states and the output matrix, without an array of tokens times vocabulary."""

from kernels.linear_logprob.api import Implementation, linear_logprob
from kernels.linear_logprob.reference import LinearLogprob

__all__ = ["Implementation", "LinearLogprob", "linear_logprob"]
