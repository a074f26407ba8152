"""Log-probabilities of tokens from hidden states and the output matrix, without an array of tokens times vocabulary."""

from kernels.linear_logprob.api import linear_logprob
from kernels.linear_logprob.dispatch import Implementation
from kernels.linear_logprob.partitioned import Partition, padded_vocab
from kernels.linear_logprob.reference import LinearLogprob

__all__ = ["Implementation", "LinearLogprob", "Partition", "linear_logprob", "padded_vocab"]
