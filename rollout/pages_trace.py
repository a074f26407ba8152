"""What pages are worth for answers of unlike length, counted without a model.

    python -m rollout.pages_trace --slots=64 --pages=0
    python -m rollout.pages_trace --slots=320 --pages=8192

Answers with log-normal lengths are served first come first served, in groups that share a prompt, by the code that a worker
runs between its dispatches (paged.py); a dispatch draws `--steps` tokens in every slot.  What it prints:

    peak        the most pages in use at once, of those that all slots would need at full length
    busy        slots in use, on average over all steps but those after the queue ran dry
    evictions   slots that gave up for others, and the tokens of their sequences: what of them no page holds any more when
                they come back is computed again
"""

import collections
import dataclasses
import json

from absl import app, flags

from ring_jax.records import FinishReason
from rollout.jobs import Crowding, Job, Running
from rollout.paged import PagedSlots
from rollout.simulator.lengths import Generator, Shape, Trace

_SLOTS = flags.DEFINE_integer("slots", 64, "Slots of one device.")
_PAGES = flags.DEFINE_integer("pages", 0, "Pages; 0: as many as all slots need at full length.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 256, "Positions of a page.")
_LENGTH = flags.DEFINE_integer("length", 32768, "Of a slot: prompt and answer at most.")
_PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of a prompt.")
_GROUP = flags.DEFINE_integer("group", 8, "Answers to a prompt.")
_PROMPTS = flags.DEFINE_integer("prompts", 256, "How many.")
_MEAN = flags.DEFINE_float("mean", 3895.0, "Mean length of an answer.")
_SIGMA = flags.DEFINE_float("sigma", 1.2, "Of the logarithm of its length.")
_STEPS = flags.DEFINE_integer("steps", 8, "Decode steps of a dispatch.")
_JSON = flags.DEFINE_boolean("json", False, "One JSON object.")


@dataclasses.dataclass(frozen=True)
class Found:
  slots: int
  pages: int
  peak: int
  full_length: int  # pages that all slots would need at full length
  busy: float
  steps: int
  tokens_per_step: float
  evictions: int
  evicted_tokens: int  # of their sequences, prompt and answer
  hit_rate: float


def play(trace: Trace, *, slots: int, pages: int, page_size: int, length: int, steps: int) -> Found:
  """Serves all answers, in order; none of them, with its prompt, may be longer than `length`."""
  width = -(-length // page_size)
  paged = PagedSlots(slots=slots, parts=1, pages=pages or slots * width, page_size=page_size, width=width, steps=steps)
  paged.renew(0, ())
  running: dict[int, Running] = {}
  free = list(reversed(range(slots)))
  # Tokens that no other sequence has: prompts below zero, answers named by who draws them.
  waiting = collections.deque(
    (uid, [-1 - uid // trace.group_size] * prompt, answer)
    for uid, (prompt, answer) in enumerate(zip(trace.prompts, trace.lengths, strict=True))
  )
  dispatches = busy = taken = 0
  average, crowding = 0.0, Crowding()
  while waiting or running:
    evicted = paged.reserve(running)
    back = [running.pop(slot) for slot in evicted]
    taken += sum(one.length for one in back)
    new = []
    while free and waiting and not (crowding.holds and running):
      uid, tokens, rest = waiting.popleft()
      new.append(Running(Job(free.pop(), uid, tokens, rest), rest, FinishReason.LENGTH, 0))
    placed, refused = paged.admit(new, running)
    paged.plan(placed)
    running |= {one.running.job.slot: one.running for one in placed}
    back += [one for one in new if one.job.slot in refused]
    for one in sorted(back, key=lambda one: -one.job.uid):
      job = one.rest()
      waiting.appendleft((job.uid, job.tokens, job.max_tokens))
      free.append(job.slot)
    dispatches, busy = dispatches + 1, busy + len(running)
    ended = []
    for slot, one in running.items():
      one.drawn.extend([one.job.uid] * min(steps, one.limit - len(one.drawn)))
      if len(one.drawn) == one.limit:
        ended.append(slot)
    for slot in ended:
      paged.leave(running.pop(slot))
      free.append(slot)
    crowding.after(bool(back), bool(ended))
    if waiting:
      average = busy / dispatches
  use, drawn = paged.use(), sum(trace.lengths)
  return Found(
    slots, use.pages, use.peak, slots * width, average, dispatches * steps,
    drawn / (dispatches * steps), use.evicted, taken, use.hit_rate,
  )  # fmt: skip


def main(argv: list[str]) -> None:
  del argv
  answers = Generator(
    Shape.LOGNORMAL, mean=_MEAN.value, sigma=_SIGMA.value, cap=_LENGTH.value - _PROMPT.value,
    prompt_tokens=_PROMPT.value,
  )  # fmt: skip
  found = play(
    answers.draw(_PROMPTS.value, _GROUP.value), slots=_SLOTS.value, pages=_PAGES.value, page_size=_PAGE_SIZE.value,
    length=_LENGTH.value, steps=_STEPS.value,
  )  # fmt: skip
  if _JSON.value:
    print(json.dumps(dataclasses.asdict(found)))
    return
  share = found.peak / found.full_length
  print(f"{found.slots} slots, {found.pages} pages: at most {found.peak} in use, {share:.1%} of full length")
  print(f"  busy {found.busy:.1f} slots, {found.tokens_per_step:.1f} tokens a step, {found.steps} steps")
  print(f"  {found.evictions} evictions, {found.evicted_tokens} tokens in them, hit rate {found.hit_rate:.1%}")


if __name__ == "__main__":
  app.run(main)
