"""Tokens drawn from hidden states and the output matrix, without an array of tokens times vocabulary."""

from kernels.linear_logprob import Implementation, Partition
from kernels.linear_sample.api import linear_sample
from kernels.linear_sample.noise import token_keys
from kernels.linear_sample.reference import LinearSample

__all__ = ["Implementation", "LinearSample", "Partition", "linear_sample", "token_keys"]
