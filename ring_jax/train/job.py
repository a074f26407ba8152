"""A run from cold start to the end of RL, in one workdir, exactly resumable.

    evaluate -> SFT until the measured accuracy is reached -> evaluate -> RL -> evaluate -> table, plot, samples

Everything that decides what happens next is in the checkpoint: parameters, optimizer state, and `Progress` (phase,
step, cursors, the scheduler with its unfinished rollouts, evaluations).  Between two checkpoints a run is a function of
that state and the config, so killing it anywhere and starting it again repeats the lost steps bit for bit.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal

from jax.sharding import Mesh

from configs.schema import RunConfig, to_dict
from configs.status import ExitStatus
from ring_jax.checkpoint.store import RunStore
from ring_jax.model import abstract_params
from ring_jax.records import Rollout
from ring_jax.rewards.pool import ScoringPool
from ring_jax.train.assets import check_vocabulary, initial_params, prepare_tasks
from ring_jax.train.evaluation import Evaluator
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.preflight import check_disk, prepare_devices
from ring_jax.train.programs import Programs
from ring_jax.train.rl import RLPhase
from ring_jax.train.run_report import RunReport, SilentReport
from ring_jax.train.scoring import Scorer
from ring_jax.train.sft import SFTPhase
from ring_jax.train.stream import ProblemStream
from ring_jax.train.watchdog import DEFAULT_SECONDS, Watchdog
from ring_jax.train.workdir import Workdir
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from sharding import processes
from sharding.mesh import make_mesh


class Stopped(Exception):
  """The run was asked to stop; it is saved, and the same command goes on with it."""

  def __init__(self, status: ExitStatus):
    super().__init__(status.name)
    self.status = status


@dataclasses.dataclass
class Progress:
  """Where a run stands; plain data."""

  phase: Literal["sft", "rl", "done"] = "sft"
  phase_step: int = 0  # steps of this phase that are finished
  step: int = 0  # steps of all phases that are finished: the checkpoint's number
  sft_cursor: int = 0  # problems consumed
  rl_cursor: int = 0
  scheduler: dict[str, Any] | None = None
  evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by name: start, sft, rl


def run_job(
  config: RunConfig, path: str, until: Literal["sft", "rl"] = "rl", watchdog: float = DEFAULT_SECONDS
) -> Progress:
  """Runs the job in a workdir, from wherever it stands; in several processes, each of them calls this.

  Args:
    path: of the workdir, which all processes share.
    until: the last phase to run.
    watchdog: seconds without progress after which the process ends; 0: never.

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
      return Job(config, workdir, pool, report).run(until)


def meshes(config: RunConfig) -> tuple[Mesh | None, Mesh | None]:
  """The trainer's and the engine's; None for one device."""
  train, rollout = config.model.parallel.mesh, (config.rollout.parallel or config.model.parallel).mesh
  if train.num_devices == 1:
    return None, None
  mesh = make_mesh(train)
  return mesh, mesh if rollout == train else make_mesh(rollout)


class Job:
  def __init__(self, config: RunConfig, workdir: Workdir, pool: ScoringPool | None, report: RunReport):
    self._config, self._report = config, report
    self._tokenizer, tasks = prepare_tasks(
      config.task, config.tokenizer, config.rollout, config.seed, config.init, workdir.tokenizer
    )
    check_vocabulary(self._tokenizer, config.model)
    mask_V = self._tokenizer.sampleable_mask(config.model.vocab_size)
    self._held_out = tasks.held_out()
    self._scorer = Scorer(pool, self._tokenizer)
    self._optimizers = {
      "sft": make_optimizer(config.sft.optimizer, config.sft.steps),
      "rl": make_optimizer(config.rl.optimizer, config.rl.steps * config.rl.minibatches),
    }
    self._mesh, self._rollout_mesh = meshes(config)
    self._programs = programs = Programs(config, mask_V, self._optimizers, self._mesh)
    engine = RingEngine(
      config.model, config.rollout, eos_ids=self._tokenizer.eos_ids, vocab_mask_V=mask_V, seed=config.seed,
      mesh=self._rollout_mesh,
    )  # fmt: skip
    self._scheduler = C3POScheduler(config.rollout)
    self._driver = RolloutDriver(engine, self._scheduler)
    self._streams = {phase: ProblemStream(tasks, self._tokenizer) for phase in ("sft", "rl")}
    self._sft = SFTPhase(config, programs, self._streams["sft"])
    self._rl = RLPhase(config, programs, engine, self._driver, self._scorer, self._streams["rl"], report.span)
    self._evaluators: dict[int, Evaluator] = {}
    self._store = RunStore(workdir.checkpoints, keep=config.checkpoint.keep)
    abstract = abstract_params(config.model, self._mesh)
    self._abstract = (abstract, programs.abstract_optimizer(abstract, "sft"), self._driver.abstract_device_state())
    check_disk(workdir.checkpoints, config.checkpoint.keep, self._abstract)
    self._asked = ExitStatus.DONE  # by a signal to this process, to stop

  # ---- the run

  def run(self, until: str) -> Progress:
    with self._interrupts(), self._store:
      self._restore()
      progress, config = self.progress, self._config
      if progress.phase == "sft":
        if config.sft.steps and "start" not in progress.evaluations:
          self._evaluate("start")
        self._sft_phase()
      if progress.phase == "done" and progress.phase_step < config.rl.steps:
        progress.phase = "rl"  # the run ended with fewer steps than it is now asked for
      if progress.phase == "rl" and until == "rl":
        self._rl_phase()
      self._report.summary(progress.evaluations)
      return progress

  def _sft_phase(self) -> None:
    progress, config = self.progress, self._config.sft
    self._report.phase("SFT", config.steps, progress.phase_step)
    reached = False
    while progress.phase_step < config.steps and not reached:
      started = time.perf_counter()
      with self._report.span("train", step=progress.step):
        self.params, self.opt_state, metrics, positions = self._sft.step(self.params, self.opt_state)
      seconds = time.perf_counter() - started
      self._advance()
      if progress.phase_step >= config.probe_from and progress.phase_step % config.probe_every == 0:
        metrics["held_out_accuracy"] = self._probe(config.probe_problems, config.probe_samples)
        reached = metrics["held_out_accuracy"] >= config.target_accuracy
      self._report.sft_step(progress.step, progress.phase_step, metrics, positions, seconds)
      if progress.phase_step < config.steps and not reached:
        self._checkpoint_if_due()
    self._evaluate("sft" if config.steps else "start")
    progress.phase, progress.phase_step = "rl", 0
    self.opt_state = self._programs.init_optimizer(self.params, "rl")
    if self._config.rl.steps:
      self._save()

  def _rl_phase(self) -> None:
    progress, config = self.progress, self._config.rl
    self._report.phase("RL", config.steps, progress.phase_step)
    while progress.phase_step < config.steps:
      self.params, self.opt_state, output = self._rl.step(
        self.params, self.opt_state, progress.phase_step, self._report.rolling_out
      )
      self._advance()
      last = progress.phase_step == config.steps
      if config.eval_every and progress.phase_step % config.eval_every == 0 and not last:
        output.metrics["held_out_accuracy"] = self._probe(config.eval_problems, config.eval_samples)
      self._report.rl_step(progress.step, progress.phase_step, output, self._describe)
      if not last:
        self._checkpoint_if_due()
    if config.steps:
      self._evaluate("rl")
    progress.phase = "done"
    self._save()

  def _advance(self) -> None:
    self.progress.step += 1
    self.progress.phase_step += 1

  def _describe(self, rollout: Rollout) -> tuple[str, str]:
    """Prompt and answer as text."""
    return self._tokenizer.decode(rollout.prompt), self._tokenizer.decode(rollout.tokens)

  # ---- measuring

  def _evaluator(self, samples: int) -> Evaluator:
    if samples not in self._evaluators:
      self._evaluators[samples] = Evaluator(
        self._config.model, self._config.rollout, slots=self._config.eval.slots, samples=samples, scorer=self._scorer,
        mesh=self._rollout_mesh,
      )  # fmt: skip
    return self._evaluators[samples]

  def _probe(self, problems: int, samples: int) -> float:
    with self._report.span("eval", step=self.progress.step):
      return self._evaluator(samples)(self.params, self._held_out[:problems]).accuracy

  def _evaluate(self, name: str) -> None:
    """The full measurement, kept in the checkpoint and shown in the summary."""
    config, progress = self._config.eval, self.progress
    self._report.phase("evaluation", config.problems * config.samples, 0)
    with self._report.span("eval", step=progress.step):
      problems = self._held_out[: config.problems]
      result = self._evaluator(config.samples)(self.params, problems, self._report.evaluating)
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
    progress = self.progress
    progress.sft_cursor, progress.rl_cursor = self._streams["sft"].cursor, self._streams["rl"].cursor
    progress.scheduler = self._scheduler.state_dict()
    with self._report.span("checkpoint", step=progress.step):
      self._report.flush()  # what the checkpoint counts as written is on the disk
      self._store.save(
        progress.step, self.params, self.opt_state, host=dataclasses.asdict(progress), config=to_dict(self._config),
        extra=self._driver.device_state,
      )  # fmt: skip
    status = self._stop()
    if status and progress.phase != "done":
      self._store.wait()
      self._report.note(f"stopped after step {progress.step}; the same command goes on from there")
      raise Stopped(status)

  def _restore(self) -> None:
    """The newest good checkpoint, or a fresh start; the logs are cut back to it."""
    config = self._config
    resumed = self._store.latest_step() is not None
    self._report.alive("restore")
    params, opt_state, extra = self._abstract
    if resumed:
      found = self._store.restore(params, opt_state, extra=extra)
      self.progress = Progress(**found.host)
      self.params, self.opt_state = found.params, found.optimizer_state
      self._scheduler.load_state_dict(self.progress.scheduler)
      if found.extra is not None:
        self._driver.restore_device_state(found.extra)
    else:
      self.progress = Progress()
      self.params = initial_params(config.model, config.init, config.seed, self._mesh)
      self.opt_state = self._programs.init_optimizer(self.params, "sft")
    self._streams["sft"].cursor = self.progress.sft_cursor
    self._streams["rl"].cursor = self.progress.rl_cursor
    self._report.begin(self.progress.step, resumed)

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
