"""A process that answers in JSON lines, played by a few lines of Python."""

import json
import sys

import pytest

from rollout.line_process import LineProcess


class Failed(Exception):
  """What the processes here raise."""


def started(tail, greeting='{"versions": {}}', **options):
  """A process that greets and then runs `tail`."""
  code = f"import sys, json\nprint({greeting!r}, flush=True)\n{tail}"
  return LineProcess([sys.executable, "-c", code], name="child", error=Failed, **options)


ECHO = "for line in sys.stdin:\n  print(json.dumps({'got': json.loads(line)}), flush=True)"


def test_it_answers_request_by_request_in_any_script():
  with started(ECHO) as child:
    assert child.greeting == {"versions": {}}
    for request in ({"a": [1, 2]}, {"text": "zwei\u2028Zeilen\nü"}, {"long": "x" * 300_000}):
      assert child.ask(request, "echoing") == {"got": request}


def test_its_environment_is_what_it_is_given():
  tail = "import os\nfor line in sys.stdin:\n  print(json.dumps({'set': os.environ.get('SAID')}), flush=True)"
  with started(tail, environment={"SAID": "yes"}) as child:
    assert child.ask({}, "asking") == {"set": "yes"}


def test_what_it_says_went_wrong_is_an_error_and_it_goes_on():
  tail = "for line in sys.stdin:\n  print(json.dumps({'error': 'no'} if 'bad' in line else {}), flush=True)"
  with started(tail) as child:
    with pytest.raises(Failed, match=r"^child failed while trying: no$"):
      child.ask({"bad": 1}, "trying")
    assert child.ask({}, "trying") == {}


def test_a_greeting_may_be_an_error():
  with pytest.raises(Failed, match=r"^child failed while starting: of no use$"):
    started(ECHO, greeting=json.dumps({"error": "of no use"}))


def test_the_end_of_its_log_stands_in_the_error_and_stays_there():
  tail = "sys.stdin.readline()\nprint(*'abcde', sep='\\n\\n', file=sys.stderr)\nsys.exit(3)"
  with started(tail) as child:
    with pytest.raises(Failed, match=r"^child's process ended with status 3 while asking; it said: c \| d \| e$"):
      child.ask({}, "asking")
    with pytest.raises(Failed, match=r"^child's process .*ended.*c \| d \| e$"):
      child.ask({}, "asking")


def test_one_that_does_not_answer_is_ended():
  with started("sys.stdin.read()", timeout=20.0) as child:
    child._timeout = 0.1
    with pytest.raises(Failed, match=r"^child: no answer within 0\.1 s while asking"):
      child.ask({}, "asking")
    assert child._process.wait() != 0


def test_one_that_cannot_be_started():
  with pytest.raises(
    Failed, match=r"^child's interpreter /no/python: cannot be started \(No such file or directory\)$"
  ):
    LineProcess(["/no/python"], name="child", error=Failed)
