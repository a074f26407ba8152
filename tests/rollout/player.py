"""Drives a scheduler as the live driver does, without an engine."""

import itertools

from hypothesis import strategies as st

from configs.schema import RolloutConfig, RolloutSchedule, Unit
from ring_jax.records import FinishReason
from rollout.scheduler import C3POScheduler


def make_config(**changes) -> RolloutConfig:
  return RolloutConfig(**{"token_budget": 8, "slots": 4, "retention": 1, "group_size": 2, **changes})


class Player:
  """Drives a scheduler as the live driver does; what a rollout's length is, is a function of its uid."""

  def __init__(self, config, length_of, chunk=1, prompts=None):
    self.config, self.length_of, self.chunk = config, length_of, chunk
    self.scheduler = C3POScheduler(config)
    self.prompts = itertools.count() if prompts is None else iter(range(prompts))
    self.version = 0

  def refill(self):
    wanted = self.scheduler.wanted_groups
    problems = list(itertools.islice(self.prompts, wanted))
    self.scheduler.admit([(problem, [problem, 7]) for problem in problems])
    if len(problems) < wanted:
      self.scheduler.close()

  def decode(self):
    """One dispatch for everything in a slot; a token's value and log-prob tell where it comes from."""
    for rollout in self.scheduler.running().values():
      first = len(rollout.tokens)
      count = min(self.chunk, self.length_of(rollout.uid) - first)
      tokens = [rollout.uid * 1000 + first + i for i in range(count)]
      self.scheduler.record(rollout.uid, tokens, [-1.0 / (1 + token) for token in tokens], self.version)
      if len(rollout.tokens) == self.length_of(rollout.uid):
        self.scheduler.finish(rollout.uid, FinishReason.STOP)

  def events(self):
    """One iteration, a pause after every call; its return value is the result."""
    self.scheduler.begin_iteration()
    yield
    while not self.scheduler.iteration_done:
      self.refill()
      yield
      self.scheduler.place()
      yield
      self.decode()
      yield
    result = self.scheduler.end_iteration(self.version)
    self.version += 1
    return result

  def iterate(self):
    events = self.events()
    while True:
      try:
        next(events)
      except StopIteration as stop:
        return stop.value

  def held_tokens(self):
    state = self.scheduler.state_dict()
    buffered = [rollout for group in state["groups"] for rollout in group["finished"]]
    return sum(len(rollout["tokens"]) for rollout in [*state["pool"], *buffered, *state["ready"]])


@st.composite
def any_schedule(draw, configs):
  """Of these configs, and in two cases of three as a batch."""
  config, schedule = draw(configs), draw(st.sampled_from(RolloutSchedule))
  if schedule is RolloutSchedule.C3PO:
    return config
  batch = draw(st.integers(1, 3))
  launched = 0 if schedule is RolloutSchedule.SYNCHRONOUS else batch + draw(st.integers(0, 3))
  values = {"unit": Unit.GROUP, "schedule": schedule, "batch_groups": batch, "launch_groups": launched}
  pool = max(config.pool, max(batch, launched) * config.group_size)
  return RolloutConfig(**{**vars(config), **values, "pool": pool})
