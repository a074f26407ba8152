"""Models cut over the ranks of a role (FSDP2), and the hand-over of weights between two roles.

Rows of a batch are dealt over the ranks, and every layer's weights are gathered for its forward and backward pass alone.
The loss weights of a row already hold the denominators of the whole minibatch, so gradients are summed over ranks and
never averaged.  Two things are easily wrong with a mixture of experts: a rank whose tokens skip an expert must still give
that expert a gradient (the twin runs every expert, `SparseMLP`), and a rank that has no rows must still take part in the
gathers (`Part.deal` gives it a blank row).

With gloo FSDP2 works on the CPU (torch 2.13) as long as it only sums: its scaled reductions exist in nccl alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from configs.schema import OptimizerConfig
from parity.torch_twin import step, weights
from parity.torch_twin.model import RingTwin, Trunk
from ring_jax.records import Rollout

BLANK = Rollout(uid=-1, group=-1, problem=-1, prompt=[0])  # a row that nothing is asked of


class VersionError(RuntimeError):
  """A model works with weights of another step than it should."""


class Part(NamedTuple):
  """The ranks of a role, as one rank sees them."""

  ranks: tuple[int, ...]
  rank: int  # this process
  device: torch.device
  group: dist.ProcessGroup | None  # of these ranks; None: there is one, or this is none of them

  @property
  def inside(self) -> bool:
    return self.rank in self.ranks

  @property
  def leads(self) -> bool:
    return self.rank == self.ranks[0]

  def own(self, count: int) -> range:
    """Which of `count` rows this rank has."""
    return range(self.ranks.index(self.rank), count, len(self.ranks))

  def deal(self, items: Sequence[Any], blank: Any) -> list[Any]:
    """This rank's items, as many as every rank's: all must run the model equally often."""
    size = -(-len(items) // len(self.ranks))
    mine = [items[i] for i in self.own(len(items))]
    return mine + [blank] * (size - len(mine))

  def total(self, number: float) -> float:
    """The sum over its ranks."""
    summed = torch.tensor(number, dtype=torch.float64, device=self.device)
    if self.group is not None:
      dist.all_reduce(summed, group=self.group)
    return summed.item()


def build(model_config: Any, params: weights.Tree, part: Part) -> Trunk:
  """The model of a role, cut over its ranks; one rank holds it whole."""
  model = weights.build(model_config, params, part.device)
  if part.group is None:
    return model
  mesh = DeviceMesh.from_group(part.group, part.device.type)
  heads = [model.lm_head] if isinstance(model, RingTwin) else []  # what is called apart from the trunk
  for module in (*model.model.layers, *heads, model):
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
  for module in model.modules():
    if isinstance(module, FSDPModule):
      module.set_gradient_divide_factor(1.0)
      module.set_force_sum_reduction_for_comms(True)
  return model


class ShardedOptimizer(step.TwinOptimizer):
  """Each rank updates its part of every parameter; the norm that clips is of all parts."""

  def __init__(self, model: Trunk, config: OptimizerConfig, total_steps: int, part: Part):
    super().__init__(model, config, total_steps)
    self._part = part

  def _sum_of_squares(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    squares = super()._sum_of_squares([_local(gradient) for gradient in gradients])
    if self._part.group is not None:
      dist.all_reduce(squares, group=self._part.group)
    return squares


def whole(model: Trunk) -> Iterator[tuple[str, torch.Tensor]]:
  """(name, the whole tensor) of every parameter and buffer; all ranks of its part must ask, for one at a time."""
  for name, value in model.state_dict().items():
    yield name, value.full_tensor() if isinstance(value, DTensor) else value


def params_of(model: Trunk) -> dict[str, Any]:
  """The tree of the whole model, on every rank of its part."""
  return weights.from_state(model.config, {name: value.cpu() for name, value in whole(model)})


class Bridge:
  """The way of weights from a role that trains to its shadow, which only works with them.

  The first rank of the source sends each whole tensor to those ranks of the shadow that are not in the source.
  """

  def __init__(self, source: Part, target: Part, group: dist.ProcessGroup | None):
    """Args:
    group: of `ranks`; None where all of the shadow's ranks train as well.
    """
    self._source, self._target, self._group = source, target, group

  @staticmethod
  def ranks(source: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """Who sends and who receives; only the sender: nobody must."""
    return (source[0], *(rank for rank in target if rank not in source))

  def cross(self, source: Trunk | None, target: Trunk | None, version: int) -> int:
    """Copies the weights of `source` to `target`, each None where this rank has no part in it.

    Returns:
      The version that arrived.
    """
    sent = torch.tensor(version if self._source.inside else -1, device=self._source.device)
    self._send(sent)
    mine = None if target is None else target.state_dict()
    given = whole(source) if source is not None else ((name, None) for name in mine or ())
    for name, value in given:
      if value is None:
        value = torch.empty(mine[name].shape, dtype=mine[name].dtype, device=self._target.device)
      self._send(value)
      if mine is not None:
        _fill(mine[name], value, self._target)
    return int(sent)

  def _send(self, value: torch.Tensor) -> None:
    receives = self._target.inside and not self._source.inside
    if self._group is not None and (self._source.leads or receives):
      dist.broadcast(value, self._source.ranks[0], group=self._group)


def _fill(target: torch.Tensor, value: torch.Tensor, part: Part) -> None:
  """Copies the whole tensor, or this rank's part of it: FSDP2 cuts the first axis as `torch.chunk` does."""
  with torch.no_grad():
    if not isinstance(target, DTensor):
      target.copy_(value)
      return
    chunks, index = value.chunk(len(part.ranks)), part.ranks.index(part.rank)
    if index < len(chunks):
      target.to_local().copy_(chunks[index])


def _local(tensor: torch.Tensor) -> torch.Tensor:
  return tensor.to_local() if isinstance(tensor, DTensor) else tensor
