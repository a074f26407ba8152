"""The texts of Ling's chat templates, written out by hand from the reference note."""

import pytest

from configs.schema import TokenizerConfig
from ring_jax.data.chat import render_answer, render_prompt

BASE, BASE_THINK = TokenizerConfig(), TokenizerConfig(thinking=True)
CHAT, CHAT_THINK = TokenizerConfig(template="chat"), TokenizerConfig(template="chat", thinking=True)


def say(*pairs):
  return [{"role": role, "content": content} for role, content in pairs]


def test_base():
  assert render_prompt("2+2=", BASE) == "<role>HUMAN</role>2+2=<role>ASSISTANT</role>"
  assert render_prompt("2+2=", BASE_THINK) == "<role>HUMAN</role>2+2=<role>ASSISTANT</role><think>"
  assert (
    render_prompt(say(("system", "S"), ("user", "q"), ("assistant", "<think>x</think>a"), ("user", "r")), BASE)
    == "<role>SYSTEM</role>S<role>HUMAN</role>q<role>ASSISTANT</role>a<role>HUMAN</role>r<role>ASSISTANT</role>"
  )


def test_chat():
  head = "<role>SYSTEM</role>detailed thinking {}<|role_end|><role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>"
  assert render_prompt("q", CHAT) == head.format("off")
  assert render_prompt("q", CHAT_THINK) == head.format("on") + "<think>\n"
  assert render_prompt(say(("system", "Be brief."), ("user", "q")), CHAT) == head.format("off").replace(
    "detailed", "Be brief.\ndetailed"
  )


def test_chat_leaves_out_past_thoughts_and_merges_tool_results():
  messages = say(
    ("user", "q"),
    ("assistant", "<think>\nold\n</think>\n\nfirst"),
    ("user", "r"),
    ("assistant", "<think>\nnew\n</think>\n\ncall"),
    ("tool", "1"),
    ("tool", "2"),
  )
  assert render_prompt(messages, CHAT) == (
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>first<|role_end|>"
    "<role>HUMAN</role>r<|role_end|><role>ASSISTANT</role>\n<think>\nnew\n</think>\n\ncall<|role_end|>"
    "<role>OBSERVATION</role>\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|role_end|>"
    "<role>ASSISTANT</role>"
  )


def test_answers_end_their_turn():
  assert render_answer("4") == "4<|role_end|>"


@pytest.mark.parametrize("messages", [say(("wizard", "x")), say(("user", "x"), ("system", "y"))])
def test_messages_that_no_template_has(messages):
  with pytest.raises(ValueError, match=r"message [01] has role"):
    render_prompt(messages, CHAT)
