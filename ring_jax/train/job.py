"""A run from cold start to the end of RL, in one workdir, exactly resumable.

    evaluate -> SFT until the measured accuracy is reached -> evaluate -> RL -> evaluate -> table, plot, samples
                                         and, where asked for: -> reward model -> RLHF -> evaluate

Everything that decides what happens next is in the checkpoint: the weights of all roles, optimizer states, and `Progress`
(phase, step, cursors, the scheduler with its unfinished rollouts, evaluations).  Between two checkpoints a run is a function
of that state and the config, so killing it anywhere and starting it again repeats the lost steps bit for bit.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from configs.schema import Role, RunConfig, to_dict
from configs.status import ExitStatus
from ring_jax.checkpoint.store import RunStore
from ring_jax.records import Rollout
from ring_jax.rewards.pool import ScoringPool
from ring_jax.train.evaluation import Evaluator
from ring_jax.train.orchestrator import Generated
from ring_jax.train.parts import Parts
from ring_jax.train.preflight import check_disk, prepare_devices
from ring_jax.train.run_report import RunReport, SilentReport
from ring_jax.train.watchdog import DEFAULT_SECONDS, Watchdog
from ring_jax.train.workdir import Workdir
from sharding import processes


class Stopped(Exception):
  """The run was asked to stop; it is saved, and the same command goes on with it."""

  def __init__(self, status: ExitStatus):
    super().__init__(status.name)
    self.status = status


@dataclasses.dataclass
class Progress:
  """Where a run stands; plain data."""

  phase: Literal["sft", "rl", "reward", "rlhf", "done"] = "sft"
  phase_step: int = 0  # steps of this phase that are finished
  step: int = 0  # steps of all phases that are finished: the checkpoint's number
  cursors: dict[str, int] = dataclasses.field(default_factory=dict)  # problems consumed, by stream
  scheduler: dict[str, Any] | None = None
  pending: dict[str, Any] | None = None  # rollouts that were generated for the next step already
  evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by name: start, sft, rl, rlhf


def run_job(
  config: RunConfig,
  path: str,
  until: Literal["sft", "rl"] = "rl",
  watchdog: float = DEFAULT_SECONDS,
  on_step: Callable[[str, int], None] = lambda phase, finished: None,
) -> Progress:
  """Runs the job in a workdir, from wherever it stands; in several processes, each of them calls this.

  Args:
    path: of the workdir, which all processes share.
    until: the last phase to run.
    watchdog: seconds without progress after which the process ends; 0: never.
    on_step: called between steps of RL with the name of the phase and how many of its steps are finished.

  Raises:
    Stopped: it was asked to, by Ctrl-C or SIGTERM.
    ConfigError: the config and the devices, the workdir, the checkpoint or the tokenizer do not fit together.
  """
  prepare_devices(config)
  first = processes.group().is_first
  # Answers are scored in one place, as their scores depend on how busy a machine is.
  scoring = ScoringPool(config.task, thinking=config.tokenizer.thinking) if first else contextlib.nullcontext()
  with Workdir(path) as workdir, scoring as pool, Watchdog(watchdog, workdir.path) as dog:
    processes.group().from_first("workdir", lambda: workdir.lock().store_config(config))
    report = RunReport(config, workdir, dog) if first else SilentReport(config, workdir, dog)
    with contextlib.closing(report):
      return Job(config, workdir, pool, report, on_step).run(until)


class Job:
  def __init__(
    self,
    config: RunConfig,
    workdir: Workdir,
    pool: ScoringPool | None,
    report: RunReport,
    on_step: Callable[[str, int], None],
  ):
    self._config, self._report, self._on_step = config, report, on_step
    self._parts = parts = Parts.of(config, workdir, pool, report.span, report.events)
    self._evaluators: dict[int, Evaluator] = {}
    self._store = RunStore(workdir.checkpoints, keep=config.checkpoint.keep)
    check_disk(workdir.checkpoints, config.checkpoint.keep, parts.largest_checkpoint())
    self._asked = ExitStatus.DONE  # by a signal to this process, to stop

  # ---- the run

  def run(self, until: str) -> Progress:
    with self._interrupts(), self._store, contextlib.closing(self._parts):
      self._restore()
      if self._config.rollout.is_remote:
        self._report.note("rollouts come from other processes: this run is not reproducible bit for bit")
      progress, config = self.progress, self._config
      if progress.phase == "sft":
        if config.sft.steps and "start" not in progress.evaluations:
          self._evaluate("start")
        self._sft_phase()
      last = "rlhf" if config.rlhf.steps else "rl"
      if progress.phase == "done" and progress.phase_step < config.phase(last).steps:
        progress.phase = last  # the run ended with fewer steps than it is now asked for
      if until == "rl":
        if progress.phase == "rl":
          self._rl_phase("rl")
        if progress.phase == "reward":
          self._reward_phase()
        if progress.phase == "rlhf":
          self._rl_phase("rlhf")
      self._report.summary(progress.evaluations)
      return progress

  def _sft_phase(self) -> None:
    progress, config = self.progress, self._config.sft
    self._report.phase("SFT", config.steps, progress.phase_step)
    reached = False
    while progress.phase_step < config.steps and not reached:
      started = time.perf_counter()
      weights = self.weights
      with self._report.span("train", step=progress.step):
        weights.actor, weights.actor_state, metrics, positions = self._parts.sft.step(
          weights.actor, weights.actor_state
        )
      seconds = time.perf_counter() - started
      self._advance()
      if progress.phase_step >= config.probe_from and progress.phase_step % config.probe_every == 0:
        metrics["held_out_accuracy"] = self._probe(config.probe_problems, config.probe_samples)
        reached = metrics["held_out_accuracy"] >= config.target_accuracy
      self._report.sft_step(progress.step, progress.phase_step, metrics, positions, seconds)
      if progress.phase_step < config.steps and not reached:
        self._checkpoint_if_due()
    self._evaluate("sft" if config.steps else "start")
    self._enter("rl", save=self._config.rl.steps > 0)

  def _rl_phase(self, name: str) -> None:
    progress, config = self.progress, self._config.phase(name)
    self._report.phase(name.upper(), config.steps, progress.phase_step)
    before = self._config.rl.steps if name == "rlhf" else 0  # versions of the weights that came before this phase
    while progress.phase_step < config.steps:
      last = progress.phase_step + 1 == config.steps
      output, self._pending = self._parts.rl[name].step(
        self.weights, before + progress.phase_step, self._pending, last, self._report.rolling_out
      )
      self._advance()
      if config.eval_every and progress.phase_step % config.eval_every == 0 and not last:
        output.metrics["held_out_accuracy"] = self._probe(config.eval_problems, config.eval_samples)
      self._report.rl_step(name, progress.step, progress.phase_step, output, self._describe)
      self._on_step(name, progress.phase_step)
      if not last:
        self._checkpoint_if_due()
    if config.steps:
      self._evaluate(name)
    if name == "rl" and self._config.rlhf.steps:
      self._enter("reward" if self._parts.reward else "rlhf", save=True)
    else:
      progress.phase = "done"
      self._save()

  def _reward_phase(self) -> None:
    progress, config, phase = self.progress, self._config.reward_model, self._parts.reward
    self._report.phase("reward model", config.steps, progress.phase_step)
    while progress.phase_step < config.steps:
      started, weights = time.perf_counter(), self.weights
      with self._report.span("reward", step=progress.step):
        weights.reward, weights.reward_state, metrics, positions = phase.step(weights.reward, weights.reward_state)
      seconds = time.perf_counter() - started
      self._advance()
      self._report.reward_step(progress.step, progress.phase_step, metrics, positions, seconds)
      if progress.phase_step < config.steps:
        self._checkpoint_if_due()
    if config.steps:
      with self._report.span("eval", step=progress.step):
        self._report.preferences(progress.step, phase.accuracy(self.weights.reward, self._parts.held_out_pairs))
    self._enter("rlhf", save=True)

  def _enter(self, phase: str, save: bool) -> None:
    """Begins a phase: what it trains and looks up is made of what there is."""
    self.progress.phase, self.progress.phase_step = phase, 0
    self._parts.begin(phase, self.weights)
    if save:
      self._save()

  def _advance(self) -> None:
    self.progress.step += 1
    self.progress.phase_step += 1

  def _describe(self, rollout: Rollout) -> tuple[str, str]:
    """Prompt and answer as text."""
    decode = self._parts.tokenizer.decode
    return decode(rollout.prompt), decode(rollout.tokens)

  # ---- measuring

  def _evaluator(self, samples: int) -> Evaluator:
    if samples not in self._evaluators:
      self._evaluators[samples] = Evaluator(
        self._config.model, self._config.rollout, slots=self._config.eval.slots, samples=samples,
        scorer=self._parts.scorer, mesh=self._parts.roles.meshes[Role.ROLLOUT],
      )  # fmt: skip
    return self._evaluators[samples]

  def _probe(self, problems: int, samples: int) -> float:
    with self._report.span("eval", step=self.progress.step):
      return self._evaluator(samples)(self.weights.actor, self._parts.held_out[:problems]).accuracy

  def _evaluate(self, name: str) -> None:
    """The full measurement, kept in the checkpoint and shown in the summary."""
    config, progress = self._config.eval, self.progress
    self._report.phase("evaluation", config.problems * config.samples, 0)
    with self._report.span("eval", step=progress.step):
      problems = self._parts.held_out[: config.problems]
      result = self._evaluator(config.samples)(self.weights.actor, problems, self._report.evaluating)
    progress.evaluations[name] = result.metrics() | {"step": progress.step, "examples": result.examples}
    self._report.evaluation(progress.step, name, result)

  # ---- saving and restoring

  def _checkpoint_if_due(self) -> None:
    if self._stop() or self.progress.step % self._config.checkpoint.every == 0:
      self._save()

  def _stop(self) -> ExitStatus:
    """Why the run is to stop, on any process that was asked; the same answer on all of them."""
    asked = processes.group().gather(f"stop after step {self.progress.step}?", int(self._asked))
    return ExitStatus(max(asked))

  def _save(self) -> None:
    """Saves; also the place where a run that was asked to stop does so."""
    progress, parts = self.progress, self._parts
    progress.cursors = {name: stream.cursor for name, stream in parts.streams.items()}
    progress.scheduler = parts.scheduler.state_dict()
    progress.pending = None if self._pending is None else self._pending.to_dict()
    with self._report.span("checkpoint", step=progress.step):
      self._report.flush()  # what the checkpoint counts as written is on the disk
      self._store.save(
        progress.step, self.weights.actor, self.weights.actor_state, host=dataclasses.asdict(progress),
        config=to_dict(self._config), extra=parts.extra(self.weights),
      )  # fmt: skip
    status = self._stop()
    if status and progress.phase != "done":
      self._store.wait()
      self._report.note(f"stopped after step {progress.step}; the same command goes on from there")
      raise Stopped(status)

  def _restore(self) -> None:
    """The newest good checkpoint, or a fresh start; the logs are cut back to it."""
    parts, resumed = self._parts, self._store.latest_step() is not None
    self._report.alive("restore")
    self._pending = None
    if resumed:
      phase_of = lambda run: run["host"]["phase"]  # noqa: E731
      found = self._store.restore(
        parts.roles.abstract(Role.ACTOR),
        lambda run: parts.abstract_actor_state(phase_of(run)),
        lambda run: parts.abstract_extra(phase_of(run)),
      )
      self.progress = progress = Progress(**found.host)
      self.weights = parts.restored(found)
      parts.scheduler.load_state_dict(progress.scheduler)
      if progress.pending is not None:
        self._pending = Generated.from_dict(progress.pending)
      for name, cursor in progress.cursors.items():
        parts.streams[name].cursor = cursor
    else:
      self.progress = Progress()
      self.weights = parts.fresh()
    self._report.begin(self.progress.step, resumed, parts.scheduler.iteration)

  @contextlib.contextmanager
  def _interrupts(self) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets the step finish and saves; a second Ctrl-C stops at once.

    A machine that is taken away sends SIGTERM, perhaps more than once; all that helps then is to go on saving.
    """

    def stop(number, frame):
      if self._asked and number == signal.SIGINT:
        raise KeyboardInterrupt
      if not self._asked:
        self._asked = ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.PREEMPTED
        self._report.note("stopping after this step; the same command resumes (Ctrl-C again: stop now)")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
