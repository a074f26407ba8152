"""Everything that a run tells: console, metrics.jsonl, TensorBoard, trace, events, samples, and the summary at its end.

Where several processes run a job, the first one tells and the others are silent.  All of them tell their watchdog.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from configs.schema import RunConfig
from ring_jax.train.evaluation import Evaluation
from ring_jax.train.orchestrator import RLStep
from ring_jax.train.report.console import Console
from ring_jax.train.report.metrics import MetricsLog
from ring_jax.train.report.plots import reward_curve
from ring_jax.train.report.samples import Describe, SampleLog
from ring_jax.train.report.trace import Span, Trace
from ring_jax.train.watchdog import Watchdog
from ring_jax.train.workdir import Workdir
from rollout.driver import Clock
from rollout.events import EventLog

_STAGES = {"start": "before SFT", "sft": "after SFT", "rl": "after RL", "rlhf": "after RLHF"}


class RunReport:
  def __init__(self, config: RunConfig, workdir: Workdir, watchdog: Watchdog):
    self._config, self._workdir, self._watchdog = config, workdir, watchdog
    self.console = Console()
    self.trace = Trace(workdir.trace)
    self._metrics = MetricsLog(workdir)
    self._samples = SampleLog(workdir.rollouts)
    # On the trace's clock, so that both can be shown on one time line.
    self.events = EventLog(workdir.events, self.trace.seconds) if config.rollout.event_log else None

  def begin(self, step: int, resumed: bool, iterations: int) -> None:
    """Cuts the logs back to the restored step, and to the iterations that its scheduler has ended; says what will happen."""
    self._metrics.truncate(step if resumed else -1)
    self._samples.truncate(step if resumed else -1)
    if self.events is not None:
      self.events.truncate(iterations)
    self.console.opening(self._config, step)

  def alive(self, what: str | None = None) -> None:
    """The run moves; `what` is what it begins with, if it begins something."""
    self._watchdog.beat(what)

  @contextlib.contextmanager
  def span(self, kind: str, step: int) -> Iterator[Span]:
    """A phase of a step: watched, and on the time line."""
    self.alive(f"{kind}, step {step}")
    with self.trace.span(kind, step=step) as span:
      yield span
    self.alive(f"after {kind}, step {step}")

  def note(self, text: str) -> None:
    self.console.note(text)

  def phase(self, name: str, total: int, done: int) -> None:
    self.console.start(name, total, done)
    self._done = done

  def evaluating(self, clock: Clock) -> None:
    self.alive()
    rate = clock.tokens / max(clock.prefill + clock.decode, 1e-9)
    self.console.update(clock.finished, tokens_per_second={"rollout": rate})

  def rolling_out(self, clock: Clock) -> None:
    """An iteration under way: tokens so far beside the budget."""
    self.alive()
    self.console.update(self._done, tokens=clock.tokens)

  def sft_step(self, step: int, done: int, metrics: dict[str, Any], positions: int, seconds: float) -> None:
    rate = positions / seconds
    self._metrics.log("sft", step, metrics, {"seconds/train": seconds, "positions_per_second/train": rate})
    self.console.update(
      done, loss=metrics["loss"], accuracy=metrics.get("held_out_accuracy"), tokens_per_second={"train": rate}
    )
    self._done = done

  def reward_step(self, step: int, done: int, metrics: dict[str, Any], positions: int, seconds: float) -> None:
    rate = positions / seconds
    self._metrics.log("reward", step, metrics, {"seconds/train": seconds, "positions_per_second/train": rate})
    self.console.update(done, loss=metrics["loss"], accuracy=metrics["accuracy"], tokens_per_second={"train": rate})
    self._done = done

  def rl_step(self, phase: str, step: int, done: int, output: RLStep, describe: Describe) -> None:
    metrics, seconds = output.metrics, output.seconds
    rates = {
      "rollout": output.tokens / max(seconds.get("rollout", 0.0), 1e-9),
      "train": output.positions / max(seconds["logp"] + seconds["train"], 1e-9),
    }
    timings = {f"seconds/{name}": value for name, value in seconds.items()}
    self._metrics.log(
      phase, step, metrics, timings | {f"tokens_per_second/{kind}": rate for kind, rate in rates.items()}
    )
    self._samples.write(step, metrics["version"], output.rollouts, output.advantages, describe)
    self.trace.counter("tokens/s", **rates)
    self.trace.counter("masked", share=metrics["mismatch/masked"])
    self.console.update(
      done, reward=metrics.get("reward"), accuracy=metrics.get("held_out_accuracy"), masked=metrics["mismatch/masked"],
      tokens_per_second=rates,
    )  # fmt: skip
    self._done = done

  def evaluation(self, step: int, name: str, result: Evaluation) -> None:
    self._metrics.log("eval", step, {"name": name} | result.metrics())
    self.console.close()  # the progress bar makes way for its result
    self.console.note(
      f"{_STAGES[name]}: accuracy {result.accuracy:.1%} on {result.problems} unseen problems, {result.samples} answers each"
      f" (at least one of them right: {result.pass_at_k:.1%})"
    )

  def preferences(self, step: int, accuracy: float) -> None:
    self._metrics.log("eval", step, {"name": "reward", "pair_accuracy": accuracy})
    self.console.close()
    self.console.note(f"reward model: prefers the better answer of {accuracy:.1%} of unseen pairs")

  def flush(self) -> None:
    self._metrics.flush()
    if self.events is not None:
      self.events.flush()

  def summary(self, evaluations: dict[str, dict[str, Any]]) -> None:
    """Table, plot, sample answers, and what to do next."""
    console, workdir = self.console, self._workdir
    console.close()
    stages = [name for name in _STAGES if name in evaluations]
    rows = [
      {
        "": _STAGES[name],
        "step": evaluations[name]["step"],
        "accuracy": f"{evaluations[name]['accuracy']:.1%}",
        f"pass@{evaluations[name]['samples']}": f"{evaluations[name]['pass_at_k']:.1%}",
        "answer length": f"{evaluations[name]['mean_length']:.1f}",
      }
      for name in stages
    ]
    console.table(rows, title=f"{self._config.name}: held-out accuracy")
    for examples in zip(*(evaluations[name]["examples"] for name in stages), strict=False):
      console.note(f"\n{examples[0]['prompt']}")
      for name, example in zip(stages, examples, strict=True):
        console.note(f"  {_STAGES[name]:<10}  {'right' if example['reward'] >= 1 else 'wrong'}  {example['answer']!r}")
    plot = workdir.plots / "reward_curve.png"
    reward_curve(workdir.metrics, plot, title=f"{self._config.name}: reward and held-out accuracy")
    shown = self._workdir.path
    console.note(
      f"\nplot:          {plot}"
      f"\nread answers:  less {shown / 'rollouts'}"
      f"\nmeasure again: python -m ring_jax.launch.evaluate --checkpoint={shown} --samples=16"
      f"\ntrain longer:  the same command with --config.rl.steps={2 * self._config.rl.steps}"
      f"\nwhere did the time go: open {workdir.trace} in ui.perfetto.dev"
      + (f", or with all slots: python -m rollout.timeline --workdir={shown} --trace=slots.json" if self.events else "")
    )

  def close(self) -> None:
    self.console.close()
    self._metrics.close()
    if self.events is not None:
      self.events.close()
    self.trace.close()


class SilentReport(RunReport):
  """Of every process but the first: writes and prints nothing, but is watched."""

  events = None

  def __init__(self, config: RunConfig, workdir: Workdir, watchdog: Watchdog):
    self._watchdog = watchdog

  @contextlib.contextmanager
  def span(self, kind: str, step: int) -> Iterator[Span]:
    self.alive(f"{kind}, step {step}")
    span, started = Span({"step": step}), time.perf_counter()
    yield span
    span.seconds = time.perf_counter() - started
    self.alive(f"after {kind}, step {step}")

  def evaluating(self, clock: Clock) -> None:
    self.alive()

  def rolling_out(self, clock: Clock) -> None:
    self.alive()

  def _nothing(self, *arguments: Any, **named: Any) -> None:
    pass

  begin = note = phase = sft_step = reward_step = rl_step = evaluation = preferences = flush = summary = close = (
    _nothing
  )
