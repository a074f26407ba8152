"""Words that should not be shown: better_profanity's list, without its slow search.

Word lists of Reasoning Gym tasks hold slurs (tiny_rl.md, pitfall 4).  better_profanity takes 0.1 ms a word and reads
digits as letters, so that numbers fall under it; membership in its list, with endings taken off, is quicker and finds
more.  Prompt and answer are both looked at, so a word that is only unwanted when turned around is found too.
"""

import functools
import re

from better_profanity.utils import get_complete_path_of_file, read_wordlist

_WORD = re.compile(r"[^\W\d_]{3,}")
_ENDINGS = ("", "s", "ed", "er", "ers", "ing", "y")


@functools.cache
def _unwanted() -> frozenset[str]:
  return frozenset(word.lower() for word in read_wordlist(get_complete_path_of_file("profanity_wordlist.txt")))


@functools.lru_cache(maxsize=200_000)
def _is_clean(word: str) -> bool:
  stems = (word.removesuffix(ending) for ending in _ENDINGS)
  return not any(len(stem) > 2 and stem in _unwanted() for stem in stems)


def is_clean(text: str) -> bool:
  """Whether no word of `text` is on the list."""
  return all(_is_clean(word) for word in _WORD.findall(text.lower()))
