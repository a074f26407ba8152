"""Token ids to text, as far as the text is certain.

    token -> its bytes -> whole UTF-8 characters -> cut at a stop string -> thought | answer

A token may end in the middle of a character, and a stop string in the middle of a token.  What might still become part
of one is held back, so what was handed out is never taken back, and does not depend on how the tokens came in.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple


class Scan:
  """Looks for the first of several markers in text that comes in parts."""

  def __init__(self, markers: Sequence[str]):
    self._markers = tuple(markers)
    self._longest = max(map(len, self._markers), default=0)
    self._held = ""  # might be the beginning of a marker

  def push(self, text: str) -> tuple[str, str | None]:
    """Returns (text that lies before any marker, text after the marker; None: none has ended yet)."""
    text = self._held + text
    # The first to end, whatever the parts; of those that end together, the longest.
    found = [(at + len(marker), at) for marker in self._markers if (at := text.find(marker)) >= 0]
    if found:
      end, at = min(found)
      self._held = ""
      return text[:at], text[end:]
    held = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._begins(text[-n:])), 0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held], None

  def end(self) -> str:
    """What was held back; there is no more to come."""
    held, self._held = self._held, ""
    return held

  def _begins(self, text: str) -> bool:
    return any(marker.startswith(text) for marker in self._markers)


class Spoken(NamedTuple):
  """A part of an answer."""

  thought: str = ""
  text: str = ""


class Writer:
  """Writes one answer.

  Args:
    pieces: the bytes of every token id; empty for those that are no text.
    stop: where the answer is cut.
    thought_end: the marker up to which it is a thought; empty: it is not.

  Attributes:
    stopped: a stop string was found; what comes after is not to be pushed.
    length: of the text so far in characters, markers and what is held back included.
  """

  def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = (), thought_end: str = ""):
    self._pieces = pieces
    self._characters = codecs.getincrementaldecoder("utf-8")("replace")
    self._stop = Scan(stop)
    self._thought = Scan([thought_end]) if thought_end else None
    self.stopped = False
    self.length = 0

  def push(self, token: int) -> Spoken:
    """The text that this token makes certain."""
    return self._write(self._pieces[token], last=False)

  def end(self) -> Spoken:
    """The rest, when there are no more tokens."""
    return self._write(b"", last=True)

  def _write(self, piece: bytes, last: bool) -> Spoken:
    decoded = self._characters.decode(piece, last)
    self.length += len(decoded)
    text, after = self._stop.push(decoded)
    self.stopped = after is not None
    last = last or self.stopped
    if last:
      text += self._stop.end()
    return self._split(text, last)

  def _split(self, text: str, last: bool) -> Spoken:
    if self._thought is None:
      return Spoken(text=text)
    thought, answer = self._thought.push(text)
    if answer is not None:
      self._thought = None
      return Spoken(thought, answer)
    return Spoken(thought + self._thought.end()) if last else Spoken(thought)
