"""The IcePop objective of Ring-1T and those it is compared with, on log-probabilities or on hidden states."""

from configs.schema import IcePopConfig
from kernels.icepop.api import icepop_loss, policy_loss
from kernels.icepop.calibration import Verdict, verdict
from kernels.icepop.weights import sequence_weight, token_weights

__all__ = ["IcePopConfig", "Verdict", "icepop_loss", "policy_loss", "sequence_weight", "token_weights", "verdict"]
