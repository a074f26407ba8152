"""Matrix products of row groups, each with its own matrix: the experts of an MoE layer."""

from kernels.grouped_matmul.api import Implementation, gated_experts, grouped_matmul

__all__ = ["Implementation", "gated_experts", "grouped_matmul"]
