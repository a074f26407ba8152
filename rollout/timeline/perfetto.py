"""Tracks for ui.perfetto.dev and chrome://tracing: one for every slot, one for the iterations, a curve of the slots in use.

Events of the Trace Event format, in a process of their own, so that they can stand beside a run's phases in one file.
Perfetto colours a span by its name without the digits, chrome://tracing by `cname`; the letter before a version's number is
what gives neighbouring versions different colours in the first.
"""

from typing import Any

from rollout.timeline.spans import Kind, Span, Timeline

_PROCESS = 2  # 1 is the run's phases
_COLOURS = (
  "rail_response", "rail_animation", "rail_load", "thread_state_iowait", "detailed_memory_dump", "background_memory_dump",
  "olive", "thread_state_uninterruptible",
)  # fmt: skip


def tracks(timeline: Timeline) -> list[dict[str, Any]]:
  """All events."""
  named = [_named("process_name", 0, {"name": "rollout slots"}), _named("thread_name", 0, {"name": "iterations"})]
  width = len(str(max(timeline.slots, default=0)))
  for slot in timeline.slots:
    named.append(_named("thread_name", slot + 1, {"name": f"slot {slot:0{width}d}"}))
    named.append(_named("thread_sort_index", slot + 1, {"sort_index": slot + 1}))
  iterations = [
    {
      **_colour(one.version), **_placed(0, one.start, one.end), "name": f"iteration {_letter(one.version)}{one.number}",
      "args": {"iteration": one.number, "version": one.version, "tokens counted": one.counted},
    }
    for one in timeline.iterations if one.end is not None
  ]  # fmt: skip
  spans = [_span(span) for span in timeline.spans]
  marks = [
    {
      "name": mark.what.value, "ph": "i", "s": "t", "pid": _PROCESS, "tid": 0 if mark.slot is None else mark.slot + 1,
      "ts": 1e6 * mark.seconds, "args": {"rollout": mark.uid},
    }
    for mark in timeline.marks
  ]  # fmt: skip
  curve = [
    {"name": "slots in use", "ph": "C", "pid": _PROCESS, "ts": 1e6 * seconds, "args": {"slots": count}}
    for seconds, count in timeline.in_use
  ]
  return [*named, *iterations, *spans, *marks, *curve]


def _span(span: Span) -> dict[str, Any]:
  event = {**_placed(span.slot + 1, span.start, span.end), "cat": span.kind.value, "args": {"rollout": span.uid}}
  if span.kind is not Kind.DECODE:
    return {**event, "name": span.kind.value, "cname": "grey" if span.kind is Kind.WAITING else "generic_work"}
  event["args"] |= {"version": span.version, "tokens": span.tokens}
  return {**event, **_colour(span.version), "name": f"weights {_letter(span.version)}{span.version}"}


def _named(name: str, track: int, args: dict[str, Any]) -> dict[str, Any]:
  return {"name": name, "ph": "M", "pid": _PROCESS, "tid": track, "args": args}


def _placed(track: int, start: float, end: float) -> dict[str, Any]:
  return {"ph": "X", "pid": _PROCESS, "tid": track, "ts": 1e6 * start, "dur": 1e6 * (end - start)}


def _letter(version: int) -> str:
  return chr(ord("a") + version % 26)


def _colour(version: int) -> dict[str, str]:
  return {"cname": _COLOURS[version % len(_COLOURS)]}
