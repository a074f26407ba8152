"""The picture: slots down, time across, a colour for every weight version.

On the left, for the first iteration that is shown, what its rollouts had before: their tokens, in the colours of the versions
that drew them.  Below, how many slots were in use.
"""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rollout.timeline.spans import Happened, Iteration, Kind, Mark, Span, Timeline, carried

_GREY, _DARK = "#8a8f98", "#2b2f36"
_PREFILL, _WAITING = "#3d434d", "#e9ebee"
_PALETTE = ("#2563a8", "#e0952f", "#2f8f4e", "#8d5bb5", "#3aa6a6", "#a8743a", "#8fb4dc", "#b5a642")
_ROOM = 0.3  # of the width, for an iteration's whole name
_FEW = len(_PALETTE)  # versions that the palette tells apart
_SHAPES = {
  Happened.STOP: ("o", _DARK, "ended"),
  Happened.LENGTH: ("|", _DARK, "ended by length"),
  Happened.CACHE: ("|", _GREY, "ended by the cache"),
  Happened.PURGED: ("x", "#c0142b", "purged"),
  Happened.EVICTED: ("<", "#c0142b", "evicted"),
  Happened.ABORTED: ("s", "#c0142b", "aborted"),
  Happened.LOST: ("v", "#c0142b", "slot lost"),
}
_STYLE = {
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": _GREY,
  "axes.titlelocation": "left",
  "axes.titleweight": "bold",
  "legend.frameon": False,
}


def draw(timeline: Timeline, iterations: Sequence[Iteration], title: str) -> bytes:
  """A PNG of these iterations, which follow each other."""
  start = iterations[0].start
  end = iterations[-1].end or max((span.end for span in timeline.spans), default=start)
  spans = [span for span in timeline.spans if span.end > start and span.start < end]
  marks = [mark for mark in timeline.marks if start <= mark.seconds <= end and mark.slot is not None]
  before = carried(timeline, iterations[0])
  colours = _colours(spans, before)
  with plt.rc_context(_STYLE):
    height = min(9.0, 2.1 + 0.11 * max(len(timeline.slots), 12))
    figure, axes = plt.subplots(
      2, 2, figsize=(11, height), sharex="col", sharey="row", width_ratios=(1, 6.5), height_ratios=(height - 1, 0.62),
      layout="constrained", dpi=130, squeeze=False,
    )  # fmt: skip
    try:
      _before(axes[0, 0], before, colours)
      _slots(axes[0, 1], timeline, spans, marks, colours, start)
      _in_use(axes[1, 1], timeline, start, end)
      axes[1, 0].axis("off")
      _ends(axes[:, 1], iterations, start, end)
      axes[0, 1].set_title(title, pad=20)
      handles = _legend(spans, marks, colours)
      figure.legend(handles=handles, loc="outside right upper", handlelength=1.1, labelspacing=0.6)
      axes[1, 1].set_xlim(0, 1.003 * (end - start))
      image = io.BytesIO()
      figure.savefig(image, format="png")
    finally:
      plt.close(figure)
  return image.getvalue()


def _colours(spans: Sequence[Span], before: dict[int, dict[int, int]]) -> dict[int, str]:
  versions = {span.version for span in spans if span.version is not None}
  versions = sorted(versions.union(*(drawn.keys() for drawn in before.values())))
  if len(versions) <= _FEW:
    return {version: _PALETTE[version % _FEW] for version in versions}
  shades = plt.get_cmap("viridis")
  return {version: shades(1 - index / (len(versions) - 1)) for index, version in enumerate(versions)}


def _before(axes: Axes, before: dict[int, dict[int, int]], colours: dict[int, str]) -> None:
  for slot, drawn in before.items():
    left = 0
    for version in sorted(drawn, reverse=True):  # the latest next to what follows
      axes.barh(slot, drawn[version], left=left, height=0.78, color=colours[version])
      left += drawn[version]
  axes.invert_xaxis()
  axes.tick_params(labelbottom=True)
  axes.set(title="before", xlabel="tokens", ylabel="slot")
  if not before:
    axes.set_xticks([])


def _slots(
  axes: Axes, timeline: Timeline, spans: Sequence[Span], marks: Sequence[Mark], colours: dict[int, str], start: float
) -> None:
  plain = {Kind.PREFILL: _PREFILL, Kind.WAITING: _WAITING}
  corners = [_corners(span, start) for span in spans]
  faces = [plain.get(span.kind) or colours[span.version] for span in spans]
  axes.add_collection(PolyCollection(corners, facecolors=faces, edgecolors="white", linewidths=0.5))
  dense = len(timeline.slots) > 64
  for what, (shape, colour, _) in _SHAPES.items():
    found = [mark for mark in marks if mark.what is what]
    (points,) = axes.plot(
      [mark.seconds - start for mark in found], [mark.slot for mark in found], shape, color=colour,
      markersize=2 if dense else 4, linestyle="none", zorder=4, clip_on=False,
    )  # fmt: skip
    points.set_in_layout(False)  # else the layout makes room for marks at the edge, and for those that there are not
  axes.yaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_ylim(max(timeline.slots, default=0) + 0.7, min(timeline.slots, default=0) - 0.7)
  axes.tick_params(labelbottom=False)


def _corners(span: Span, start: float) -> list[tuple[float, float]]:
  left, right, top, bottom = span.start - start, span.end - start, span.slot - 0.39, span.slot + 0.39
  return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _in_use(axes: Axes, timeline: Timeline, start: float, end: float) -> None:
  before = [count for seconds, count in timeline.in_use if seconds <= start]
  inside = [(seconds, count) for seconds, count in timeline.in_use if start < seconds <= end]
  times = [0.0, *(seconds - start for seconds, _ in inside), end - start]
  counts = [before[-1] if before else 0, *(count for _, count in inside)]
  axes.stairs(counts, times, fill=True, color="#c9ccd1")
  axes.set(xlabel="seconds", ylabel="in use", ylim=(0, 1.05 * max(len(timeline.slots), 1)))


def _ends(columns: Sequence[Axes], iterations: Sequence[Iteration], start: float, end: float) -> None:
  """A line where an iteration ends, and its name above where there is room."""
  top = columns[0].get_xaxis_transform()
  for one in iterations:
    if one.end is not None:
      for axes in columns:
        axes.axvline(one.end - start, color=_DARK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=3)
    share = ((end if one.end is None else one.end) - one.start) / max(end - start, 1e-9)
    name = f"iteration {one.number}"
    if share > _ROOM:
      name += f": weights {one.version}, {one.counted:,} tokens counted"
    elif share < _ROOM / 3:
      name = str(one.number)
    columns[0].text(one.start - start, 1.01, name, transform=top, color=_DARK, fontsize=8.5, va="bottom").set_in_layout(
      False
    )


def _legend(spans: Sequence[Span], marks: Sequence[Mark], colours: dict[int, str]) -> list[Artist]:
  versions = list(colours)
  if len(versions) > _FEW:
    versions = [versions[round(i * (len(versions) - 1) / (_FEW - 1))] for i in range(_FEW)]
  handles = [Patch(color=colours[version], label=f"weights {version}") for version in versions]
  kinds = {span.kind for span in spans}
  handles += [Patch(color=_PREFILL, label="prefill")] * (Kind.PREFILL in kinds)
  handles += [Patch(color=_WAITING, label="waiting")] * (Kind.WAITING in kinds)
  happened = {mark.what for mark in marks}
  return handles + [
    Line2D([], [], marker=shape, color=colour, linestyle="none", markersize=5, label=label)
    for what, (shape, colour, label) in _SHAPES.items()
    if what in happened
  ]
