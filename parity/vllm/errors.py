"""What can go wrong with vLLM, as one line for the user."""


class VLLMError(ValueError):
  """vLLM cannot be run, or ran and failed; the message says what and where."""


class WrongWeightsError(VLLMError):
  """vLLM's log-probs are not the trainer's: it holds other weights than those that were handed over."""
