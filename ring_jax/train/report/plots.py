"""The reward curve of a run as a PNG, from its metrics.jsonl."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes

from ring_jax.train.report import metrics
from ring_jax.train.workdir import write_atomic

_BLUE, _ORANGE, _GREEN, _GREY = "#2563a8", "#d9731a", "#2f8f4e", "#8a8f98"
_WINDOW = 10  # RL steps of the running mean
_FINAL = {
  "start": "before SFT",
  "sft": "after SFT",
  "rl": "after RL",
  "rlhf": "after RLHF",
}  # names of the full evaluations
_STYLE = {
  "font.size": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": _GREY,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "grid.color": "#e6e8eb",
  "axes.axisbelow": True,
  "legend.frameon": False,
}


def reward_curve(log: pathlib.Path, out: pathlib.Path, title: str = "") -> None:
  """Draws reward and held-out accuracy over the run's steps, and what goes with them below.

  Args:
    log: a metrics.jsonl; may be empty, cut short, or still growing.
    out: the PNG to write.
  """
  records = metrics.read(log)
  with plt.rc_context(_STYLE):
    figure, (top, bottom) = plt.subplots(
      2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(2.2, 1), layout="constrained", dpi=150
    )
    try:
      _draw_reward(top, records)
      _draw_below(bottom, records)
      top.set_title(title or "Reward and held-out accuracy", loc="left", fontweight="bold")
      bottom.set_xlabel(
        ", then ".join(f"{phase.upper()} steps" for phase in ("sft", "rl", "reward", "rlhf") if _of(records, phase))
      )
      image = io.BytesIO()
      figure.savefig(image, format="png")
    finally:
      plt.close(figure)
  write_atomic(out, image.getvalue())


def _draw_reward(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
  steps, rewards = _series(_of(records, "rl"), "reward")
  if len(steps):
    axes.plot(steps, rewards, color=_BLUE, alpha=0.3, linewidth=0.9, label="reward of a step")
    axes.plot(steps, metrics.smoothed(rewards, _WINDOW), color=_BLUE, linewidth=1.9, label=f"mean of {_WINDOW} steps")
  probes = np.array(_series(records, "held_out_accuracy"))
  if probes.size:
    axes.plot(*probes, "o", color=_ORANGE, markersize=4, label="held-out accuracy, probe")
  finals = [record for record in _of(records, "eval") if record.get("accuracy") is not None]
  if finals:
    axes.plot(
      [record["step"] for record in finals],
      [record["accuracy"] for record in finals],
      "D", color=_GREEN, markersize=7, zorder=5, clip_on=False, label="held-out accuracy, full",
    )  # fmt: skip
  last = max((record["step"] for record in records), default=0)
  for record in finals:
    left = record["step"] > last / 2  # so that no label leaves the picture
    axes.annotate(
      f"{_FINAL.get(record.get('name'), record.get('name', ''))} {record['accuracy']:.1%}",
      (record["step"], record["accuracy"]),
      xytext=(-9 if left else 9, 7), textcoords="offset points", ha="right" if left else "left",
      color=_GREEN, fontweight="bold", fontsize=9, zorder=6,
      path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip
  _shade_sft(axes, records, label=True)
  if not axes.lines:
    axes.text(0.5, 0.5, "nothing measured yet", ha="center", color=_GREY, transform=axes.transAxes)
  axes.set_ylim(-0.02, 1.02)
  axes.set_ylabel("reward, accuracy")
  _legend(axes, "upper left")


def _draw_below(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
  """Loss while SFT runs; entropy and, on an axis of its own, the share that IcePop masks while RL does.

  Loss and entropy are a factor of ten apart and both fall for long: logarithmic.
  """
  losses = _series(_of(records, "sft"), "loss")
  entropies, masked = (_series(_of(records, "rl", "rlhf"), name) for name in ("policy/entropy", "mismatch/masked"))
  if len(losses[0]):
    axes.plot(*losses, color=_GREY, linewidth=1.1, label="SFT loss")
  if len(entropies[0]):
    axes.plot(*entropies, color=_BLUE, linewidth=1.3, label="entropy")
  if axes.lines:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3), numticks=6))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_ylabel("nats per token")
  _shade_sft(axes, records)
  handles, labels = axes.get_legend_handles_labels()
  if len(masked[0]):
    right = axes.twinx()
    percent = 100 * masked[1]
    right.plot(masked[0], percent, color=_ORANGE, alpha=0.3, linewidth=0.9)
    handles += right.plot(masked[0], metrics.smoothed(percent, _WINDOW), color=_ORANGE, linewidth=1.6)
    labels.append("masked by IcePop")
    right.set_ylim(0, max(1.4 * percent.max(), 0.1))
    right.set_ylabel("% of tokens", color=_ORANGE)
    right.tick_params(axis="y", colors=_ORANGE)
    right.grid(False)
  if handles:
    axes.legend(handles, labels, loc="upper right", ncols=len(handles), fontsize=8.5)


def _shade_sft(axes: Axes, records: Sequence[Mapping[str, Any]], label: bool = False) -> None:
  sft = _of(records, "sft")
  if sft:
    end = max(record["step"] for record in sft)
    axes.axvspan(0, end, color="#f3f4f6", zorder=0, linewidth=0)
    if label:
      axes.text(end / 2, 0.985, "SFT", ha="center", va="top", color=_GREY, transform=axes.get_xaxis_transform())
      if _of(records, "rl"):
        axes.annotate(
          "RL", (end, 0.985), xytext=(6, 0), textcoords="offset points", va="top", color=_GREY,
          xycoords=axes.get_xaxis_transform(),
        )  # fmt: skip


def _legend(axes: Axes, place: str) -> None:
  handles, labels = axes.get_legend_handles_labels()
  if handles:
    axes.legend(handles, labels, loc=place, fontsize=8.5, bbox_to_anchor=(0, 0.95))  # below the names of the phases


def _of(records: Sequence[Mapping[str, Any]], *phases: str) -> list[Mapping[str, Any]]:
  return [record for record in records if record.get("phase") in phases]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the records that have one."""
  pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
  steps, values = zip(*pairs, strict=True) if pairs else ((), ())
  return np.array(steps), np.array(values, float)
