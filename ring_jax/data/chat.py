"""Ling's chat templates (bailing_moe_v2.md section 5).

BASE, for short prompts:   <role>HUMAN</role>question<role>ASSISTANT</role>
CHAT, the SFT template:    <role>SYSTEM</role>[system, new line]detailed thinking on|off<|role_end|>
                           <role>HUMAN</role>question<|role_end|><role>ASSISTANT</role>

With thinking on, the generation prompt opens the thought: `<think>` in BASE, `<think>` and a new line in CHAT.
An answer ends with <|role_end|> in both, which is what the model must learn to write.  Past thoughts of the assistant
are left out, except in CHAT after the last question (the assistant is then in the middle of its turn, calling tools).
"""

from collections.abc import Mapping, Sequence

from configs.schema import ChatTemplate, TokenizerConfig
from ring_jax.data.tokenizer import END_OF_TURN, ROLE_CLOSE, ROLE_OPEN, THINK_CLOSE, THINK_OPEN

Message = Mapping[str, str]  # "role" and "content"
_NAMES = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT", "tool": "OBSERVATION"}


def render_prompt(messages: Sequence[Message] | str, config: TokenizerConfig) -> str:
  """The text that a model continues with its answer.

  Args:
    messages: {"role": system | user | assistant | tool, "content": text}, in order; a string is one question.
    config: which template, and whether the answer begins with a thought.

  Raises:
    ValueError: a role that the templates do not have, or a system message that is not the first.
  """
  if isinstance(messages, str):
    messages = [{"role": "user", "content": messages}]
  _check(messages)
  body = _chat(messages, config.thinking) if config.template is ChatTemplate.CHAT else _base(messages)
  opening = THINK_OPEN + ("\n" if config.template is ChatTemplate.CHAT else "")
  return body + _marker("assistant") + (opening if config.thinking else "")


def render_answer(text: str) -> str:
  """What the model should write: `text` and the end of its turn."""
  return text + END_OF_TURN


def _check(messages: Sequence[Message]) -> None:
  for position, message in enumerate(messages):
    role = message["role"]
    if role not in _NAMES:
      raise ValueError(f"message {position} has role {role!r}: one of {', '.join(_NAMES)}")
    if role == "system" and position:
      raise ValueError(f"message {position} has role 'system': only the first may")


def _marker(role: str) -> str:
  return f"{ROLE_OPEN}{_NAMES[role]}{ROLE_CLOSE}"


def _base(messages: Sequence[Message]) -> str:
  return "".join(_marker(message["role"]) + _without_thought(message) for message in messages)


def _without_thought(message: Message) -> str:
  content = message["content"]
  return content.split(THINK_CLOSE)[-1].lstrip("\n") if message["role"] == "assistant" else content


def _chat(messages: Sequence[Message], thinking: bool) -> str:
  system, turns = "", list(messages)
  if turns and turns[0]["role"] == "system":
    system = turns.pop(0)["content"] + "\n"
  parts = [f"{_marker('system')}{system}detailed thinking {'on' if thinking else 'off'}{END_OF_TURN}"]
  last_question = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
  for position, turn in enumerate(turns):
    if turn["role"] == "tool":
      follows_tool = position > 0 and turns[position - 1]["role"] == "tool"
      tool_follows = position + 1 < len(turns) and turns[position + 1]["role"] == "tool"
      parts.append("" if follows_tool else _marker("tool"))
      parts.append(f"\n<tool_response>\n{turn['content']}\n</tool_response>")
      parts.append("" if tool_follows else END_OF_TURN)
    else:
      thought = _thought(turn) if position > last_question else ""
      parts.append(_marker(turn["role"]) + thought + _without_thought(turn) + END_OF_TURN)
  return "".join(parts)


def _thought(message: Message) -> str:
  """The thought that an assistant's message holds, in the template's form; empty if it holds none."""
  head, marker, _ = message["content"].rpartition(THINK_CLOSE)
  if message["role"] != "assistant" or not marker:
    return ""
  return f"\n{THINK_OPEN}\n{head.split(THINK_OPEN)[-1].strip()}\n{THINK_CLOSE}\n\n"
