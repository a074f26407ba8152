"""What can go wrong with a checkpoint, as one line for the user."""


class CheckpointError(ValueError):
  """A checkpoint that cannot be read or written; the message names the file or the tensor and says why."""
