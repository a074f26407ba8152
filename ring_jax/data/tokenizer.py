"""Token ids: byte-level BPE with Ling 2.0's special tokens (bailing_moe_v2.md section 5), built or loaded.

A built tokenizer has one token a byte (id = byte), one for each role name of the chat template, `merges` pairs learned
from text, and the special tokens.  As in Ling, text is first cut into words, numbers into single digits, so that no
merge ever joins two digits; there is no Unicode normalisation, so that every text survives a round trip.

A role name is one token only where it is the whole word (`ignore_merges`): it brings no merges of its own, so that a
payload such as "HUGE" stays one token a byte.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from configs.schema import ConfigError, TokenizerConfig, require

BOS = "<|startoftext|>"
PAD = "<|endoftext|>"
END_OF_TURN = "<|role_end|>"
ROLE_OPEN, ROLE_CLOSE = "<role>", "</role>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ROLE_NAMES = ("HUMAN", "ASSISTANT", "SYSTEM", "OBSERVATION")

FILE = "tokenizer.json"
_CONTROL = (BOS, PAD, END_OF_TURN, ROLE_OPEN, ROLE_CLOSE)  # the template's own
_SPOKEN = (THINK_OPEN, THINK_CLOSE, "<tool_call>", "</tool_call>")  # markers that a model writes itself
_NEVER = re.compile(
  "|".join(re.escape(name) for name in (BOS, PAD, ROLE_OPEN, ROLE_CLOSE, "<tool_response>", "</tool_response>"))
  + r"|<\|reserved_token_\d+\|>"
)
# Ling's word boundaries: contractions, letters with one leading mark, single digits, marks, line ends, blanks.
_WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def run_file(config: TokenizerConfig, init: str, workdir: pathlib.Path) -> pathlib.Path:
  """The file or folder of a run's tokenizer, whether it is there or not.

  Where the config says, else beside the initial checkpoint, else in the workdir of the run, which then builds one.  No place
  stands in for another: its ids would be other ones.
  """
  if config.path:
    return pathlib.Path(config.path)
  return (pathlib.Path(init) if init else workdir) / FILE


class Tokenizer:
  """Text to token ids and back.

  Attributes:
    vocab_size: one more than the largest id; a model may have more rows (padding), never fewer.
    eos_ids: ids that end a turn.
    pad_id: fills what is not text; never sampled.
  """

  def __init__(self, backend: tokenizers.Tokenizer, origin: str = "the tokenizer"):
    """Wraps a Hugging Face tokenizer; `ConfigError` if it lacks the end-of-turn or the padding token."""
    self._backend = backend
    vocab = backend.get_vocab(with_added_tokens=True)
    for name, use in ((END_OF_TURN, "that ends a turn"), (PAD, "that pads")):
      require(name in vocab, f"tokenizer.path: {origin} has no {name}, the token {use}")
    self.vocab_size = max(vocab.values()) + 1
    self.eos_ids = frozenset({vocab[END_OF_TURN]})
    self.pad_id = vocab[PAD]

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Reads a tokenizer.json, or the one in a folder; `ConfigError` if there is none or it cannot be read."""
    file = pathlib.Path(path)
    file = file / FILE if file.is_dir() else file
    require(file.is_file(), f"tokenizer.path={str(path)!r}: no {FILE} there")
    try:
      backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
      raise ConfigError(f"tokenizer.path={str(path)!r}: not a tokenizer ({' '.join(str(error).split())})") from None
    return cls(backend, str(file))

  @classmethod
  def build(cls, texts: Iterable[str] = (), merges: int = 0) -> "Tokenizer":
    """A tokenizer of 256 bytes, the role names, at most `merges` merges learned from `texts`, the special tokens.

    The same texts give the same tokenizer.  Fewer merges are learned where the texts hold fewer pairs.
    """
    symbols = _byte_symbols()
    vocab = {symbol: byte for byte, symbol in enumerate(symbols)}
    pairs = _learn(texts, merges) if merges else []
    for token in (*ROLE_NAMES, *(left + right for left, right in pairs)):
      vocab.setdefault(token, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _CONTROL])
    # The model writes these itself: text for the decoder, not control.
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in (THINK_OPEN, THINK_CLOSE)])
    return cls(backend)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes a tokenizer.json: at `path` if that ends in .json, else into the folder `path`."""
    file = pathlib.Path(path)
    file = file if file.suffix == ".json" else file / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    self._backend.save(str(file))

  def encode(self, text: str) -> list[int]:
    """Ids of `text` as it stands: special tokens written in it are found, none is added."""
    return self._backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], special: bool = True) -> str:
    """Text of `ids`; bytes that are no UTF-8 become U+FFFD.  `special=False` leaves out the template's own tokens."""
    return self._backend.decode([int(token) for token in ids], skip_special_tokens=not special)

  def pieces(self) -> list[bytes]:
    """The bytes of every id as text, so that answers can be written token by token; empty for an end of turn.

    Joined and read as UTF-8 they are what `decode` gives, without the end of turn.

    Raises:
      ConfigError: the tokenizer is not a byte-level one.
    """
    require(
      isinstance(self._backend.decoder, decoders.ByteLevel),
      "tokenizer.path: its tokens are not bytes (no ByteLevel decoder), so that text cannot be written token by token",
    )
    byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    found = [b""] * self.vocab_size
    for text, token in self._backend.get_vocab(with_added_tokens=True).items():
      spelled = all(symbol in byte_of for symbol in text)  # else an added token, which stands for itself
      found[token] = bytes(byte_of[symbol] for symbol in text) if spelled else text.encode()
    for token in self.eos_ids:
      found[token] = b""
    return found

  def sampleable_mask(self, rows: int) -> np.ndarray:
    """Which of a model's `rows` ids may be drawn: bool [rows].

    True for text, the end of a turn, <think>, </think> and tool calls; False for padding, start of text, role markers,
    tool responses, reserved ids, any other special token, ids without a token, and rows beyond the vocabulary.

    Raises:
      ConfigError: the model has fewer rows than there are ids.
    """
    require(rows >= self.vocab_size, f"model.vocab_size={rows}: the tokenizer has ids up to {self.vocab_size - 1}")
    mask = np.zeros((rows,), np.bool_)
    mask[list(self._backend.get_vocab(with_added_tokens=True).values())] = True
    for token, added in self._backend.get_added_tokens_decoder().items():
      spoken = token in self.eos_ids or added.content in _SPOKEN
      if (added.special and not spoken) or _NEVER.fullmatch(added.content):
        mask[token] = False
    return mask


def _byte_symbols() -> list[str]:
  """The character that stands for each byte in a byte-level vocabulary: printable Latin-1 itself, others shifted."""
  printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
  others = iter(range(256, 512))
  return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _learn(texts: Iterable[str], merges: int) -> list[tuple[str, str]]:
  """The `merges` most frequent pairs, in the order in which BPE joins them."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.pre_tokenizer = _pre_tokenizer()
  trainer = trainers.BpeTrainer(
    vocab_size=256 + merges, min_frequency=2, initial_alphabet=_byte_symbols(), show_progress=False
  )
  learner.train_from_iterator(texts, trainer)
  return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
