"""The page allocator: pages are free, held or cached, none twice and none lost, and what is known is what was written."""

import collections

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout import pages_trace
from rollout.pages import Pages
from rollout.simulator.lengths import Generator, Shape

COUNT, SIZE, SLOTS = 12, 4, 5
# Few tokens, so that sequences begin alike.
SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=26)


class Machine(RuleBasedStateMachine):
  """Beside the allocator: what every page would hold if slots wrote what they said they would."""

  def __init__(self):
    super().__init__()
    self.pages, self.version = Pages(COUNT, SIZE), 0
    self.pages.renew(0)
    self.content = {}  # page -> (version, all tokens up to its end), where a slot has filled it
    self.tokens = {}  # slot -> its sequence
    self.computed = {}  # slot -> the version that computed it

  def fill(self, slot):
    """The slot writes all but its last token; what is there already must be the same."""
    tokens, held = self.tokens[slot], self.pages.held[slot]
    for index in range((len(tokens) - 1) // SIZE):
      upto = (self.computed[slot], tuple(tokens[: (index + 1) * SIZE]))
      if sum(held[index] in other for other in self.pages.held.values()) > 1:
        assert self.content.get(held[index], upto) == upto, "a shared page holds something else"
      self.content[held[index]] = upto

  @rule(slot=st.integers(0, SLOTS - 1), tokens=SEQUENCES, ahead=st.integers(0, 9), spare=st.integers(0, 3))
  def hold(self, slot, tokens, ahead, spare):
    if slot in self.tokens:
      with pytest.raises(ValueError, match="has pages already"):
        self.pages.hold(slot, tokens, len(tokens))
      return
    before = self.snapshot()
    positions = len(tokens) - 1 + ahead
    room = self.pages.room
    held = self.pages.hold(slot, tokens, positions, spare)
    if held is None:
      assert self.snapshot() == before, "a refusal changed something"
      # Without sharing it would not have fitted, or only into what is to be left.
      assert -(-positions // SIZE) + spare > room
      return
    assert len(held.pages) == -(-positions // SIZE) and self.pages.room >= spare
    assert held.known <= held.full == (len(tokens) - 1) // SIZE
    for index, page in enumerate(held.pages[: held.known]):
      assert self.content[page] == (self.version, tuple(tokens[: (index + 1) * SIZE])), (
        "a known page holds other tokens"
      )
    for page in held.pages[held.known :]:
      assert sum(page in other for other in self.pages.held.values()) == 1, "a fresh page is somebody else's"
      self.content.pop(page, None)
    if held.source >= 0:
      assert held.known == held.full and held.source not in held.pages and (len(tokens) - 1) % SIZE
      (owner,) = (other for other, pages in self.pages.held.items() if held.source in pages)
      assert self.pages.held[owner][held.full] == held.source and self.computed[owner] == self.version
      assert self.tokens[owner][: len(tokens) - 1] == tokens[:-1]
    self.tokens[slot], self.computed[slot] = list(tokens), self.version
    self.fill(slot)

  @precondition(lambda self: self.tokens)
  @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=9))
  def draw(self, data, more):
    slot = data.draw(st.sampled_from(sorted(self.tokens)))
    positions = len(self.tokens[slot]) - 1 + len(more)
    before = self.snapshot()
    wanted = -(-positions // SIZE) - len(self.pages.held[slot])
    fits = self.pages.grow(slot, positions)
    assert fits == (wanted <= before["room"])
    if not fits:
      assert self.snapshot() == before
      return
    for page in self.pages.held[slot][(len(self.tokens[slot]) - 1) // SIZE :]:
      assert sum(page in other for other in self.pages.held.values()) == 1, "a slot would write into a shared page"
    self.tokens[slot] += more
    self.fill(slot)

  @precondition(lambda self: self.tokens)
  @rule(data=st.data())
  def drop(self, data):
    slot = data.draw(st.sampled_from(sorted(self.tokens)))
    tokens, version = self.tokens.pop(slot), self.computed.pop(slot)
    self.pages.drop(slot, tokens if version == self.version else ())

  @rule()
  def renew(self):
    self.version += 1
    self.pages.renew(self.version)
    assert self.pages.cached == 0

  @rule()
  def restart(self):
    """The allocator is derived from what slots hold."""
    held = {slot: list(pages) for slot, pages in self.pages.held.items()}
    room = self.pages.room
    self.pages = Pages(COUNT, SIZE)
    self.pages.adopt(held)
    assert self.pages.room == room and self.pages.held == held
    self.version += 1
    self.pages.renew(self.version)

  def snapshot(self):
    pages = self.pages
    return {
      "held": {slot: list(held) for slot, held in pages.held.items()},
      "room": pages.room,
      "cached": pages.cached,
      "shared": pages.shared,
    }

  @invariant()
  def none_twice_and_none_lost(self):
    pages = self.pages
    holders = collections.Counter(page for held in pages.held.values() for page in held)
    assert all(len(set(held)) == len(held) for held in pages.held.values())
    free, cached = set(pages._free), set(pages._cached)
    assert len(free) == len(pages._free)
    assert not free & cached and not (free | cached) & set(holders)
    assert free | cached | set(holders) == set(range(COUNT))
    assert pages._holders == [holders[page] for page in range(COUNT)]
    assert pages.in_use == len(holders) and pages.shared == sum(count > 1 for count in holders.values())
    assert {key: page for page, key in pages._key_of.items()} == pages._page_of
    assert cached <= set(pages._key_of) and not free & set(pages._key_of)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestMachine = Machine.TestCase


def test_what_was_used_longest_ago_goes_first_and_the_end_before_the_beginning():
  pages = Pages(6, 2)
  pages.renew(0)
  old, new = [1, 2, 3, 4, 0], [5, 6, 7, 8, 0]
  for slot, tokens in enumerate((old, new)):
    assert pages.hold(slot, tokens, 4).known == 0
  for slot, tokens in enumerate((old, new)):
    pages.drop(slot, tokens)
  assert pages.cached == 4 and pages.room == 6
  pages.hold(0, [9] * 7, 6)  # takes the two free ones, and the last of `old`
  assert pages.hold(1, old[:3], 2).known == 1
  assert pages.hold(2, new, 4).known == 2


def test_the_page_of_the_last_token_is_never_shared():
  pages = Pages(8, 4)
  pages.renew(0)
  first = pages.hold(0, list(range(9)), 9)  # position 8, the first of the third page, is still to be written
  second = pages.hold(1, list(range(9)), 9)
  assert first.full == second.known == 2 and first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
  third = pages.hold(2, list(range(8)), 8)  # position 7 is: the second page is its own
  assert third.known == 1


def test_the_partly_filled_page_is_copied_while_a_slot_with_that_beginning_holds_its_own():
  pages = Pages(16, 4)
  pages.renew(0)
  tokens = list(range(7))
  first = pages.hold(0, tokens, 7)
  assert first.source == -1
  assert pages.hold(1, [*tokens[:-1], 99], 7).source == first.pages[1], "all but the last token count"
  assert pages.hold(2, [*tokens, 7], 8).source == -1
  pages.grow(0, 12)
  pages.drop(1)
  assert pages.hold(3, tokens, 7).source == first.pages[1]
  pages.drop(0)
  assert pages.hold(4, tokens, 7).source == pages.held[3][1]
  pages.renew(1)
  assert pages.hold(5, tokens, 7).source == -1


def test_another_version_shares_nothing():
  pages = Pages(8, 2)
  pages.renew(0)
  pages.hold(0, [1, 2, 3], 2)
  pages.renew(1)
  assert pages.hold(1, [1, 2, 3], 2).known == 0
  assert pages.hold(2, [1, 2, 3], 2).known == 1


def test_a_long_tail_takes_few_pages_and_all_is_served_with_fewer():
  answers = Generator(Shape.LOGNORMAL, mean=40, sigma=1.2, cap=230, prompt_tokens=20).draw(20, 4)
  play = lambda **changes: pages_trace.play(  # noqa: E731
    answers, **{"slots": 16, "pages": 0, "page_size": 8, "length": 256, "steps": 4} | changes
  )
  full = play()
  assert full.evictions == 0 and full.busy == 16 and full.peak < full.pages / 2 and full.pages == 16 * 32
  tight = play(pages=full.peak // 2)
  assert tight.evictions > 0 and tight.peak == tight.pages and tight.steps > full.steps
  assert tight.tokens_per_step * tight.steps == pytest.approx(sum(answers.lengths))
  assert tight.evictions < len(answers.lengths), "no thrashing"
  assert play(slots=32, pages=full.peak * 2).steps < full.steps
