"""Logs, traces, samples and plots of a run, above all after it was killed and resumed."""

import io
import json
import math
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs import ring_tiny
from ring_jax.records import FinishReason, Rollout, read_lines
from ring_jax.train.report import metrics, trace
from ring_jax.train.report.console import Console
from ring_jax.train.report.metrics import MetricsLog
from ring_jax.train.report.plots import reward_curve
from ring_jax.train.report.samples import SampleLog
from ring_jax.train.report.trace import Trace
from ring_jax.train.workdir import Workdir

ESCAPE = "\x1b"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def values_of(step):
  return {"reward": math.sin(step) / 3, "policy/entropy": np.float32(0.1) * step, "groups": np.int64(step)}


def train(log, first, last):
  for step in range(first, last + 1):
    log.log("rl", step, values_of(step), {"rollout": 0.25 * step})


def test_a_line_is_exact_and_sorted(tmp_path):
  workdir = Workdir(tmp_path)
  log = MetricsLog(workdir)
  log.log("sft", 3, {"z": 1 / 3, "a": np.float32(0.1), "bad": float("nan"), "worse": [np.inf, 2], "name": None})
  log.close()
  assert workdir.metrics.read_text() == (
    f'{{"a": {float(np.float32(0.1))!r}, "bad": null, "name": null, "phase": "sft", "step": 3,'
    f' "worse": [null, 2], "z": {1 / 3!r}}}\n'
  )
  assert not workdir.timings.exists()


def test_a_run_that_writes_tensorboard_does_without_pytorch(tmp_path):
  code = f"""
import sys
from ring_jax.train.report.metrics import MetricsLog
from ring_jax.train.workdir import Workdir
assert "tensorboardX" not in sys.modules
log = MetricsLog(Workdir(__import__("pathlib").Path({str(tmp_path)!r})))
log.log("sft", 1, {{"loss": 0.5}})
log.close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch  # still there for who wants it
"""
  subprocess.run([sys.executable, "-c", code], check=True)
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_timings_stay_out_of_the_metrics(tmp_path):
  workdir = Workdir(tmp_path)
  log = MetricsLog(workdir)
  train(log, 1, 2)
  assert metrics.read(workdir.timings) == [{"phase": "rl", "step": step, "rollout": 0.25 * step} for step in (1, 2)]
  assert all("rollout" not in record for record in metrics.read(workdir.metrics))
  log.close()


@pytest.mark.parametrize("restored", [-1, 0, 4, 7])
def test_a_resumed_log_has_the_bytes_of_an_uninterrupted_one(tmp_path, restored):
  straight, resumed = Workdir(tmp_path / "straight"), Workdir(tmp_path / "resumed")
  log = MetricsLog(straight)
  train(log, 0, 9)
  log.close()
  log = MetricsLog(resumed)
  train(log, 0, 7)
  log.close()
  with open(resumed.metrics, "a") as file:
    file.write('{"phase": "rl", "st')  # killed in the middle of a line
  log = MetricsLog(resumed)
  log.truncate(restored)
  assert len(metrics.read(resumed.metrics)) == restored + 1
  train(log, restored + 1, 9)
  log.close()
  assert resumed.metrics.read_bytes() == straight.metrics.read_bytes()
  assert [record["step"] for record in metrics.read(resumed.timings)] == list(range(10))


def test_an_evaluation_repeated_after_a_resume_stands_once(tmp_path):
  """Killed after the evaluation of step 4 was logged and before the next checkpoint, so that it is measured again."""
  workdir = Workdir(tmp_path)

  def evaluate(log):
    log.log("eval", 4, {"name": "sft", "accuracy": 0.5}, {"eval": 1.0})

  log = MetricsLog(workdir)
  train(log, 1, 4)
  evaluate(log)
  log.close()
  before = workdir.metrics.read_bytes()
  log = MetricsLog(workdir)
  log.truncate(4)
  evaluate(log)
  assert workdir.metrics.read_bytes() == before
  log.log("eval", 4, {"name": "rl", "accuracy": 0.6})  # another one at the same step is no repetition
  log.close()
  assert [record.get("name") for record in metrics.read(workdir.metrics)][-2:] == ["sft", "rl"]


def test_a_killed_process_leaves_whole_lines(tmp_path):
  program = (
    "import itertools, sys\n"
    "from ring_jax.train.report.metrics import MetricsLog\n"
    "from ring_jax.train.workdir import Workdir\n"
    "log = MetricsLog(Workdir(sys.argv[1]))\n"
    "for step in itertools.count(): log.log('rl', step, {'reward': step / 7}, {'s': 1.0}); print(step, flush=True)\n"
  )
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  while int(process.stdout.readline()) < 20:
    pass
  process.kill()
  process.wait()
  workdir = Workdir(tmp_path)
  steps = [record["step"] for record in metrics.read(workdir.metrics)]
  assert steps == list(range(len(steps))) and len(steps) > 20
  log = MetricsLog(workdir)
  log.truncate(10)
  log.close()
  assert len(metrics.read(workdir.metrics)) == len(metrics.read(workdir.timings)) == 11


def tensorboard_events(folder):
  """TensorBoard's record format: length (8 bytes), its checksum (4), data, its checksum (4)."""
  for path in sorted(folder.iterdir()):
    data, position = path.read_bytes(), 0
    while position < len(data):
      length = int.from_bytes(data[position : position + 8], "little")
      yield Event.FromString(data[position + 12 : position + 12 + length])
      position += 16 + length


def test_tensorboard_gets_both_and_purges_on_resume(tmp_path):
  workdir = Workdir(tmp_path)
  log = MetricsLog(workdir)
  log.log("rl", 1, {"reward": 0.5, "bad": float("nan"), "text": "x"}, {"rollout": 2.0})
  log.close()
  scalars = [(value.tag, event.step, value.simple_value)
             for event in tensorboard_events(workdir.tensorboard) for value in event.summary.value]  # fmt: skip
  assert scalars == [("rl/reward", 1, 0.5), ("time/rl/rollout", 1, 2.0)]
  log = MetricsLog(workdir)
  log.truncate(0)
  log.log("rl", 1, {"reward": 0.5})
  log.close()
  starts = [event.step for event in tensorboard_events(workdir.tensorboard) if event.HasField("session_log")]
  assert starts == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Trace


def spans(events):
  return [event for event in events if event["ph"] == "X"]


def test_a_closed_trace_is_valid_json(tmp_path):
  path = tmp_path / "trace.json"
  with Trace(path) as recorder:
    with recorder.span("rollout", step=1) as span:
      span.args["tokens"] = 128
      with recorder.span("sync"):
        pass
    recorder.counter("tokens/s", rollout=12.5)
    assert span.seconds > 0
  events = json.loads(path.read_text())
  assert events == trace.read(path)
  inner, outer = spans(events)
  assert (outer["name"], outer["args"]) == ("rollout", {"step": 1, "tokens": 128})
  assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
  tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
  assert {"rollout", "score", "logp", "train", "sync", "checkpoint", "eval"} <= set(tracks)
  assert len(set(tracks.values())) == len(tracks)
  assert (outer["tid"], inner["tid"]) == (tracks["rollout"], tracks["sync"])
  assert [event["args"] for event in events if event["ph"] == "C"] == [{"rollout": 12.5}]


def test_a_span_that_fails_is_recorded(tmp_path):
  with Trace(tmp_path / "trace.json") as recorder, pytest.raises(RuntimeError), recorder.span("train"):
    raise RuntimeError
  assert [event["name"] for event in spans(json.loads((tmp_path / "trace.json").read_text()))] == ["train"]


@pytest.mark.parametrize("cut", [0, 1, 30, 75])
def test_a_killed_trace_is_readable_and_goes_on(tmp_path, cut):
  path = tmp_path / "trace.json"
  recorder = Trace(path)
  for step in range(3):
    with recorder.span("prefill", step=step):  # not one of the usual tracks
      pass
  text = path.read_text()  # what a SIGKILL would leave: no closing bracket
  assert len(json.loads(text + "]")) == len(trace.read(path))
  path.write_text(text[: len(text) - cut])
  kept = spans(trace.read(path))
  assert len(kept) == (3 if cut == 0 else 2)
  with Trace(path) as recorder, recorder.span("prefill", step=99):
    pass
  events = json.loads(path.read_text())
  assert [event["args"]["step"] for event in spans(events)] == [event["args"]["step"] for event in kept] + [99]
  assert len({event["tid"] for event in spans(events)}) == 1
  assert spans(events)[-1]["ts"] >= kept[-1]["ts"] + kept[-1]["dur"]
  assert [event["name"] for event in events].count("resumed") == 1


def test_a_trace_that_was_closed_goes_on(tmp_path):
  for _ in range(3):
    with Trace(tmp_path / "trace.json") as recorder, recorder.span("eval"):
      pass
  assert len(spans(json.loads((tmp_path / "trace.json").read_text()))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def make_rollouts():
  return [
    Rollout(
      uid=uid, group=uid // 2, problem=40 + uid // 2, prompt=[1, 2], tokens=[3] * (uid + 1),
      logps=[-1 / 3] * (uid + 1), versions=[4] * uid + [5], finish_reason=FinishReason.STOP, reward=float(uid % 2),
    )
    for uid in range(6)
  ]  # fmt: skip


def write_samples(log, step):
  rollouts = make_rollouts()
  advantages = np.array([1.0 if rollout.reward else -1.0 for rollout in rollouts])
  log.write(step, 5, rollouts, advantages, lambda rollout: (f"question {rollout.problem} é", f"answer {rollout.uid}"))


def test_samples_hold_everything_and_read_as_text(tmp_path):
  write_samples(SampleLog(tmp_path), 123)
  lines = (tmp_path / "step_000123.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["uid"] for record in records] == list(range(6))
  assert records[3] == {
    "uid": 3, "group": 1, "problem": 41, "prompt": "question 41 é", "completion": "answer 3", "prompt_tokens": [1, 2],
    "tokens": [3] * 4, "logps": [-1 / 3] * 4, "versions": [4, 4, 4, 5], "reward": 1.0, "advantage": 1.0,
    "finish_reason": "stop",
  }  # fmt: skip
  text = (tmp_path / "step_000123.txt").read_text()
  assert "6 rollouts of 3 groups" in text
  assert "--- rollout 1: reward 1, advantage +1.000, 2 tokens, stop, up to 1 versions stale\nanswer 1\n" in text
  assert "answer 3" in text and "answer 4" not in text  # two groups


def test_samples_are_cut_back_and_written_again_the_same(tmp_path):
  log = SampleLog(tmp_path)
  for step in range(1, 6):
    write_samples(log, step)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  (tmp_path / ".step_000002.txt.tmp").write_text("half")
  (tmp_path / "notes.md").write_text("mine")
  log.truncate(3)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {f"step_{step:06d}.{kind}" for step in (1, 2, 3) for kind in ("jsonl", "txt")} | {"notes.md"}
  for step in (4, 5):
    write_samples(log, step)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "notes.md"} == before


# ---------------------------------------------------------------------------------------------------------------------
# Console


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def run_console(live):
  stream, clock = io.StringIO(), Clock()
  console = Console(stream, live=live, clock=clock)
  console.opening(ring_tiny.get_config(), minutes=6)
  console.start("rl", 150, 10)
  for step in range(11, 32):
    clock.now += 1.0
    console.update(
      step,
      reward=step / 100,
      accuracy=0.433 if step == 15 else None,
      masked=0.0004,
      tokens_per_second={"rollout": 12_345.0, "train": 987.0},
    )
  console.note("stopping after this step; the same command resumes")
  console.start("evaluation", 512)
  console.close()
  console.table([{"": "before SFT", "accuracy": "0.1%"}, {"": "after RL", "accuracy": "80.1%"}], title="held out")
  return stream.getvalue()


def test_plain_output_is_lines_without_escape_codes():
  text = run_console(live=False)
  assert ESCAPE not in text and "\r" not in text
  lines = text.splitlines()
  steps = ring_tiny.get_config().sft.steps
  assert lines[0].startswith(f"ring_tiny: SFT until 40% accuracy (at most {steps} steps); then RL for 150 steps")
  assert lines[0].endswith("about 6 minutes in all")
  progress = [line for line in lines if line.startswith("rl ")]
  assert progress == [
    f"rl  {step}/150  0:{step - 10:02d}, {left} left  reward {step / 100:.3f}  masked 0.040%"
    "  tokens/s rollout 12.3k train 987  accuracy 43.3%"
    for step, left in ((20, "2:10"), (30, "2:00"), (31, "1:59"))
  ]
  assert lines[-4:] == ["held out", "            accuracy", "before SFT      0.1%", "after RL       80.1%"]


def test_a_terminal_gets_a_bar_and_what_scrolls_up_stays():
  text = run_console(live=True)
  assert ESCAPE in text and "━" in text
  assert "stopping after this step; the same command resumes" in text
  assert "rl  31/150" in text  # the ended phase's line
  assert "80.1%" in text


def test_a_stream_that_is_no_terminal_is_plain(tmp_path):
  with open(tmp_path / "out", "w") as stream:
    console = Console(stream)
    console.start("sft", 3)
    for step in (1, 2, 3):
      console.update(step, loss=1.0)
    console.close()
  text = (tmp_path / "out").read_text()
  assert ESCAPE not in text and text.count("sft  3/3") == 1


def test_an_update_needs_a_phase():
  with pytest.raises(ValueError, match="no phase was started"):
    Console(io.StringIO()).update(1)


def test_a_resumed_run_says_so():
  stream = io.StringIO()
  Console(stream).opening(ring_tiny.get_config(), step=70)
  assert stream.getvalue().startswith("ring_tiny (resuming after step 70): ")


# ---------------------------------------------------------------------------------------------------------------------
# Plot


def records_of_a_run():
  yield {"phase": "eval", "step": 0, "name": "start", "accuracy": 0.001}
  for step in range(1, 31):
    yield {"phase": "sft", "step": step, "loss": 4.0 / step} | ({"held_out_accuracy": 0.3} if step == 30 else {})
  yield {"phase": "eval", "step": 30, "name": "sft", "accuracy": 0.41}
  for step in range(31, 61):
    yield {"phase": "rl", "step": step, "reward": 0.4 + step / 200, "policy/entropy": 0.2, "mismatch/masked": 0.0}
  yield {"phase": "eval", "step": 60, "name": "rl", "accuracy": 0.8}


@pytest.mark.parametrize("lines", [0, 1, 2, 20, 33, 63])
def test_the_plot_can_be_drawn_at_any_time(tmp_path, lines):
  log, out = tmp_path / "metrics.jsonl", tmp_path / "plot.png"
  if lines:
    records = list(records_of_a_run())[:lines]
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"phase": "rl", "step": 9')
  reward_curve(log, out)
  image = matplotlib.image.imread(out)
  assert image.shape[:2] == (840, 1200)
  colours = {tuple(colour) for colour in np.unique((image[..., :3] * 255).round().reshape(-1, 3), axis=0)}
  green = (0x2F, 0x8F, 0x4E)  # of the full evaluations
  assert (green in colours) == (lines > 0)


def test_a_text_with_other_ends_of_lines_stays_one_record(tmp_path):
  """A model may write U+0085 or U+2028, at which `str.splitlines` cuts."""
  rollout = Rollout(uid=0, group=0, problem=0, prompt=[1], tokens=[2], logps=[-0.5], versions=[0], reward=1.0)
  log = SampleLog(tmp_path)
  log.write(1, 0, [rollout], [0.5], lambda _: ("\x85prompt", "an\u2028swer"))
  (line,) = read_lines(tmp_path / "step_000001.jsonl")
  assert json.loads(line)["tokens"] == [2]
