"""Text from tokens: whole characters, stop strings, thoughts; however it is cut into parts."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from configs.schema import ConfigError
from ring_jax.data.tokenizer import END_OF_TURN, PAD, THINK_CLOSE, Tokenizer
from rollout.serving.text import Scan, Writer

TOKENIZER = Tokenizer.build(["größer als das Maß, 你好 und 👋🏽"] * 3, merges=30)
PIECES = TOKENIZER.pieces()
TEXTS = ("", "plain", "größer 你好\u2028👋🏽 e\u0301", "x" * 50, "<think>a</think>b")


def written(tokens, **options):
  """Every part, and the writer."""
  writer = Writer(PIECES, **options)
  parts = []
  for token in tokens:
    parts.append(writer.push(token))
    if writer.stopped:
      return parts, writer
  return [*parts, writer.end()], writer


def joined(parts):
  return "".join(part.thought for part in parts), "".join(part.text for part in parts)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text):
  tokens = TOKENIZER.encode(text)
  parts, writer = written(tokens)
  assert joined(parts) == ("", text) and writer.length == len(text)
  assert not any("�" in part.text for part in parts), "half a character was written"


def test_bytes_that_are_no_text_become_what_the_tokenizer_makes_of_them():
  rng = random.Random(0)
  sampleable = [
    token for token in range(TOKENIZER.vocab_size) if TOKENIZER.sampleable_mask(TOKENIZER.vocab_size)[token]
  ]
  for _ in range(200):
    tokens = rng.choices(sampleable, k=rng.randrange(40))
    without_end = [token for token in tokens if token not in TOKENIZER.eos_ids]
    assert joined(written(tokens)[0]) == ("", TOKENIZER.decode(without_end))


def test_a_tokenizer_whose_tokens_are_not_bytes_is_refused():
  backend = Backend(models.WordLevel({"a": 0, END_OF_TURN: 1, PAD: 2}, unk_token="a"))
  with pytest.raises(ConfigError, match="no ByteLevel decoder"):
    Tokenizer(backend).pieces()


@pytest.mark.parametrize(
  ("text", "stop", "kept"),
  [
    ("one two three", ["two"], "one "),
    ("one two three", ["o t"], "one tw"),  # the first "o t" begins in "two three"
    ("aaab", ["aab"], "a"),
    ("abcabd", ["abd"], "abc"),
    ("abc", ["bc", "b"], "a"),
    ("xabc", ["c", "abc"], "x"),  # they end together: the longest
    ("größer", ["ö"], "gr"),
    ("two", ["twoo"], "two"),
    ("stop", ["stop"], ""),
  ],
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(text, stop, kept):
  rng = random.Random(1)
  parts, writer = written(TOKENIZER.encode(text), stop=stop)
  assert joined(parts) == ("", kept) and writer.stopped == (kept != text)
  for _ in range(20):
    scan, given, rest = Scan(stop), "", text
    while rest:
      n = rng.randrange(1, len(rest) + 1)
      piece, after = scan.push(rest[:n])
      given, rest = given + piece, rest[n:]
      if after is not None:
        break
    assert given + scan.end() == kept


def test_what_cannot_be_a_stop_string_is_not_held_back():
  writer = Writer(PIECES, stop=["###"])
  assert writer.push(ord("a")).text == "a"
  assert writer.push(ord("#")).text == ""
  assert writer.push(ord("b")).text == "#b"


@pytest.mark.parametrize(
  ("text", "thought", "answer"),
  [
    ("so it is</think>42", "so it is", "42"),
    ("</think>42</think>", "", "42</think>"),
    ("never ends </thin", "never ends </thin", ""),
    ("", "", ""),
  ],
)
def test_a_thought_is_apart_from_the_answer(text, thought, answer):
  bytes_only = [token for letter in text.encode() for token in [letter]]  # the marker spelled out, and as one token
  for tokens in (TOKENIZER.encode(text), bytes_only):
    assert joined(written(tokens, thought_end=THINK_CLOSE)[0]) == (thought, answer)
  stopped, writer = written(TOKENIZER.encode(text + "END more"), thought_end=THINK_CLOSE, stop=["END"])
  assert joined(stopped) == (thought, answer) and writer.stopped
