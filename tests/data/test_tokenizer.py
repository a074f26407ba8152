"""The tokenizer: round trips, template tokens, determinism, which ids may be drawn, loading."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError, TokenizerConfig
from ring_jax.data.tokenizer import ROLE_NAMES, Tokenizer, run_file

TEXTS = ["spell this word backward", "the words of the text", "12 + 34 = 46", "HUMANS ARE HUMAN"] * 5
PLAIN = Tokenizer.build()
LEARNED = Tokenizer.build(TEXTS, merges=40)
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>", "<think>", "</think>")
any_text = st.text(st.characters(exclude_categories=["Cs"]))  # UTF-8 has no lone surrogates


@settings(max_examples=300)
@given(st.one_of(any_text, st.lists(st.one_of(any_text, st.sampled_from(SPECIAL + ROLE_NAMES))).map("".join)))
def test_any_text_survives_a_round_trip(text):
  for tokenizer in (PLAIN, LEARNED):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs", "Lu"])))
def test_without_merges_a_byte_is_a_token(text):
  if not any(name in text for name in SPECIAL):
    assert PLAIN.encode(text) == list(text.encode())


def test_role_names_are_single_tokens_and_touch_nothing_else():
  for name in ROLE_NAMES:
    assert len(PLAIN.encode(name)) == 1
    ids = PLAIN.encode(f"<role>{name}</role>human")
    assert len(ids) == 3 + len("human") and PLAIN.decode(ids) == f"<role>{name}</role>human"
  for text in ("HUGE", "HUMANS", "SYSTEMATIC", "human", "assistant", "0123456789"):
    assert len(PLAIN.encode(text)) == len(text)


def test_merges_shorten_text_but_never_join_digits():
  assert LEARNED.vocab_size > PLAIN.vocab_size
  assert len(LEARNED.encode("the words")) < len("the words")
  digits = Tokenizer.build(["1234 1234 1234 12 34"] * 50, merges=50)
  assert digits.encode("1234") == list(b"1234")


def test_the_same_texts_give_the_same_tokenizer_in_every_process(tmp_path):
  code = (
    f"import sys; from ring_jax.data.tokenizer import Tokenizer;Tokenizer.build({TEXTS!r}, merges=40).save(sys.argv[1])"
  )
  digests = set()
  for seed in ("1", "2"):
    file = tmp_path / f"{seed}.json"
    subprocess.run([sys.executable, "-c", code, file], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
  LEARNED.save(tmp_path / "here")
  digests.add(hashlib.sha256((tmp_path / "here" / "tokenizer.json").read_bytes()).hexdigest())
  assert len(digests) == 1


def test_sampleable_ids():
  rows = PLAIN.vocab_size + 5
  mask = PLAIN.sampleable_mask(rows)
  assert mask.shape == (rows,) and mask.dtype == np.bool_
  assert mask[:256].all() and mask[list(PLAIN.eos_ids)].all()
  for name, drawn in zip(SPECIAL, (False, False, True, False, False, True, True), strict=True):
    assert mask[PLAIN.encode(name)[0]] == drawn, name
  assert not mask[PLAIN.vocab_size :].any() and not mask[PLAIN.pad_id]
  with pytest.raises(ConfigError, match=r"model\.vocab_size=10"):
    PLAIN.sampleable_mask(10)


def test_decode_can_leave_out_control_tokens_but_keeps_thoughts():
  ids = PLAIN.encode("<think>a</think>b<|role_end|>")
  assert PLAIN.decode(ids, special=False) == "<think>a</think>b"
  assert PLAIN.decode([*b"ab", 0xFF]) == "ab\ufffd"


def _ling_like() -> tokenizers.Tokenizer:
  """Special tokens of the real Ling vocabulary over a few words; <think> is plain text there, and ids have gaps."""
  vocab = {"a": 0, "b": 1, "Ġ": 40}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  special = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<|reserved_token_5|>", "<role>"]
  backend.add_special_tokens([*special, "<tool_call>", "<tool_response>"])
  return backend


def test_loading_finds_special_ids_by_name(tmp_path):
  file = tmp_path / "tokenizer.json"
  _ling_like().save(str(file))
  for path in (tmp_path, file):
    tokenizer = Tokenizer.load(path)
    ids = {name: tokenizer.encode(name)[0] for name in ("<|role_end|>", "<|endoftext|>", "<|reserved_token_5|>")}
    assert tokenizer.eos_ids == {ids["<|role_end|>"]} and tokenizer.pad_id == ids["<|endoftext|>"]
    drawn = {tokenizer.decode([i]) for i in np.flatnonzero(tokenizer.sampleable_mask(64))}
    assert len(drawn) == 5 and {"a", "b", "<|role_end|>", "<tool_call>"} < drawn


def test_loading_errors_are_one_clear_line(tmp_path):
  def message(path):
    with pytest.raises(ConfigError) as error:
      Tokenizer.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)

  assert "no tokenizer.json" in message(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  assert "not a tokenizer" in message(tmp_path)
  tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
  assert "<|role_end|>" in message(tmp_path)


def test_a_run_has_its_tokenizer_at_one_place_and_no_other_stands_in_for_it(tmp_path):
  workdir, init = tmp_path / "run", tmp_path / "init"
  for folder in (workdir, init):
    Tokenizer.build().save(folder)
  named = TokenizerConfig(path="gone/tokenizer.json")
  assert run_file(named, str(init), workdir) == pathlib.Path("gone/tokenizer.json")
  assert run_file(TokenizerConfig(), str(init), workdir) == init / "tokenizer.json"
  assert run_file(TokenizerConfig(), "gone", workdir) == pathlib.Path("gone/tokenizer.json")
  assert run_file(TokenizerConfig(), "", workdir) == workdir / "tokenizer.json"
