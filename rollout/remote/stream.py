"""Weights as a stream of buckets: cut at the trainer, put together at the worker, used when complete or not at all.

    begin     version, and every tensor's name, dtype and shape: compared with what the engine expects before a byte is
              taken, so that a stranger cannot make a worker allocate anything
    bucket    pieces: tensor, offset, bytes, fingerprint; tensor by tensor, without a gap
    commit    all of it was sent

The trainer sends each tensor as the engine stores it (rollout/weights.py), cast or quantised already.  A tensor goes to its
devices as soon as its last piece is there: the worker's host holds one tensor and one bucket at a time, its devices the
old version and the new one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rollout.remote import worker_pb2 as pb
from sharding.fingerprint import host_fingerprint
from sharding.transfer.plan import named_leaves


class BrokenStream(ValueError):
  """What came is not a version of this engine's weights; the message is one line."""


class HostWeights(NamedTuple):
  """A version in host memory, as the engine stores it."""

  version: int
  tensors: list[tuple[str, np.ndarray]]

  @classmethod
  def of(cls, stored: Any, version: int) -> "HostWeights":
    """Args:
    stored: the engine's tree; nobody may change or donate its arrays from now on.
    """
    return cls(version, [(name, np.asarray(leaf)) for name, leaf in named_leaves(stored)])


def parts(weights: HostWeights, session: bytes, chunk_bytes: int) -> Iterator[pb.WeightsPart]:
  """The messages of a version; one bucket at a time is in memory."""
  tensors = [pb.Tensor(name=name, dtype=leaf.dtype.name, shape=leaf.shape) for name, leaf in weights.tensors]
  yield pb.WeightsPart(begin=pb.Begin(session=session, version=weights.version, tensors=tensors))
  bucket, held = [], 0
  for piece in _pieces(weights, chunk_bytes):
    if held + len(piece.data) > chunk_bytes and bucket:
      yield pb.WeightsPart(bucket=pb.Bucket(pieces=bucket))
      bucket, held = [], 0
    bucket.append(piece)
    held += len(piece.data)
  if bucket:
    yield pb.WeightsPart(bucket=pb.Bucket(pieces=bucket))
  yield pb.WeightsPart(commit=pb.Empty())


def _pieces(weights: HostWeights, chunk_bytes: int) -> Iterator[pb.Piece]:
  for index, (_, leaf) in enumerate(weights.tensors):
    flat = np.ascontiguousarray(leaf).reshape(-1)
    step = max(chunk_bytes // flat.itemsize, 1)
    for first in range(0, flat.size, step):
      values = flat[first : first + step]
      data = values.view(np.uint8).data
      yield pb.Piece(tensor=index, offset=first * flat.itemsize, data=bytes(data), fingerprint=host_fingerprint(values))


class Receiver:
  """Puts a version together; every method raises BrokenStream for what does not belong there.

  Args:
    expected: the engine's tree of shapes and shardings (`RingEngine.abstract_stored`).
  """

  def __init__(self, expected: Any):
    self._structure = jax.tree.structure(expected)
    self._leaves = named_leaves(expected)
    self._arrived: list[jax.Array] = []
    self._buffer: np.ndarray | None = None  # of the tensor that is coming in
    self._filled = 0  # bytes of it

  def begin(self, tensors: Sequence[pb.Tensor]) -> None:
    """What will come is what the engine expects."""
    if len(tensors) != len(self._leaves):
      raise BrokenStream(f"{len(tensors)} tensors are announced, the engine has {len(self._leaves)}")
    for tensor, (name, leaf) in zip(tensors, self._leaves, strict=True):
      announced = (tensor.name, tensor.dtype, tuple(tensor.shape))
      if announced != (name, leaf.dtype.name, tuple(leaf.shape)):
        shape = list(tensor.shape)
        raise BrokenStream(
          f"{tensor.name[:100]} {tensor.dtype[:20]}{shape} is announced where the engine has"
          f" {name} {leaf.dtype.name}{list(leaf.shape)}"
        )

  def take(self, piece: pb.Piece) -> None:
    if self._is_complete or piece.tensor != len(self._arrived):
      raise BrokenStream(f"a piece of tensor {piece.tensor} came, tensor {len(self._arrived)} is due")
    name, leaf = self._leaves[piece.tensor]
    if self._buffer is None:
      self._buffer, self._filled = np.empty(leaf.shape, leaf.dtype), 0
    size = len(piece.data)
    if piece.offset != self._filled or not 0 < size <= self._buffer.nbytes - self._filled or size % leaf.dtype.itemsize:
      raise BrokenStream(
        f"{name}: {size} bytes came at {piece.offset}, after {self._filled} of {self._buffer.nbytes} were there"
      )
    values = np.frombuffer(piece.data, leaf.dtype)
    if host_fingerprint(values) != piece.fingerprint:
      raise BrokenStream(f"{name}: the piece at {piece.offset} does not have the bits that were sent")
    first = self._filled // leaf.dtype.itemsize
    self._buffer.reshape(-1)[first : first + values.size] = values
    self._filled += size
    if self._filled == self._buffer.nbytes:
      self._arrived.append(jax.device_put(self._buffer, leaf.sharding))
      self._buffer = None

  def tree(self) -> Any:
    """The engine's weights, when all has come."""
    if not self._is_complete:
      raise BrokenStream(f"committed after {len(self._arrived)} of {len(self._leaves)} tensors")
    return jax.block_until_ready(jax.tree.unflatten(self._structure, self._arrived))

  @property
  def _is_complete(self) -> bool:
    return len(self._arrived) == len(self._leaves)
