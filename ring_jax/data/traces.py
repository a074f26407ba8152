"""Reasoning traces made by program: the steps from a Reasoning Gym entry to its answer, as short text.

A trace is a list of steps joined by ";".  A step is a small fact that can be learned by itself (`6-5=1`), and repeats
what it needs, so that no step asks for more than copying and one operation.  What follows the last ";" or "=" is the
result; for sorted lists it is the list without brackets.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Entry = Mapping[str, Any]


def chain_sum(entry: Entry) -> str:
  """Running sums: `4-1=3;3-7=-4`."""
  terms = entry["metadata"]["expression"].split()
  total, steps = int(terms[0]), []
  for sign, term in zip(terms[1::2], terms[2::2], strict=True):
    result = total + int(term) if sign == "+" else total - int(term)
    steps.append(f"{total}{sign}{term}={result}")
    total = result
  return ";".join(steps) or str(total)


def products(entry: Entry) -> str:
  """One digit at a time, then the running sum of the partial products: `18*2=36;18*30=540;36+540=576`."""
  factors = [int(factor) for factor in entry["metadata"]["expression"].split("*")]
  product, steps = factors[0], []
  for factor in factors[1:]:
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(abs(factor))))]
    parts = [-part if factor < 0 else part for part in parts]
    total = product * parts[0]
    steps.append(f"{product}*{parts[0]}={total}")
    for part in parts[1:]:
      partial = product * part
      steps += [f"{product}*{part}={partial}", f"{total}+{partial}={total + partial}"]
      total += partial
    product = total
  return ";".join(steps) or str(product)


def _euclid(a: int, b: int) -> tuple[list[str], int]:
  steps = []
  while b:
    steps.append(f"{a}%{b}={a % b}")
    a, b = b, a % b
  return steps, a


def gcd(entry: Entry) -> str:
  """Euclid: `780%461=319;461%319=142;...;2%1=0;1`; more numbers one after the other."""
  numbers = entry["metadata"]["numbers"]
  divisor, steps = numbers[0], []
  for number in numbers[1:]:
    more, divisor = _euclid(divisor, number)
    steps += [*more, str(divisor)]
  return ";".join(steps)


def lcm(entry: Entry) -> str:
  """Euclid, then the product through the divisor: `98%58=40;...;2;98/2=49;49*58=2842`."""
  numbers = entry["metadata"]["numbers"]
  multiple, steps = numbers[0], []
  for number in numbers[1:]:
    more, divisor = _euclid(multiple, number)
    share = multiple // divisor
    steps += [*more, str(divisor), f"{multiple}/{divisor}={share}", f"{share}*{number}={share * number}"]
    multiple = share * number
  return ";".join(steps)


def prime_factorization(entry: Entry) -> str:
  """The smallest factor first: `60/2=30;30/2=15;15/3=5;2 × 2 × 3 × 5`."""
  number, factors = entry["metadata"]["number"], entry["metadata"]["factors"]
  steps = []
  for factor in factors[:-1]:
    steps.append(f"{number}/{factor}={number // factor}")
    number //= factor
  return ";".join([*steps, entry["answer"]])


def number_sorting(entry: Entry) -> str:
  """Selection: what is left, and its next number: `3,1,2>1;3,2>2;3>3;1,2,3`."""
  left = list(entry["metadata"]["original_numbers"])
  picks, steps = entry["metadata"]["sorted_numbers"], []
  for pick in picks:
    steps.append(f"{','.join(left)}>{pick}")
    left.remove(pick)
  return ";".join([*steps, ",".join(picks)])


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def base_conversion(entry: Entry) -> str:
  """Horner's rule to decimal, then division: `0*3+2=2;2*3+1=7;7/2=3r1;3/2=1r1;1/2=0r1;111`."""
  source, target = entry["metadata"]["source_base"], entry["metadata"]["target_base"]
  value, steps = 0, []
  for digit in entry["metadata"]["source_repr"].lower():
    result = value * source + _DIGITS.index(digit)
    steps.append(f"{value}*{source}+{_DIGITS.index(digit)}={result}")
    value = result
  digits = ""
  while True:
    quotient, rest = divmod(value, target)
    steps.append(f"{value}/{target}={quotient}r{rest}")
    digits, value = _DIGITS[rest] + digits, quotient
    if not value:
      return ";".join([*steps, digits])


def count_bits(entry: Entry) -> str:
  """The binary digits in fours, with the running count: `100100;1001=2;00=2`."""
  binary = entry["metadata"]["binary"]
  steps = [f"{binary[i : i + 4]}={binary[: i + 4].count('1')}" for i in range(0, len(binary), 4)]
  return ";".join([binary, *steps])


def spell_backward(entry: Entry) -> str:
  """The letters apart, in both orders: `s u n;n u s;nus`."""
  word = entry["metadata"]["word"]
  return ";".join([" ".join(word), " ".join(reversed(word)), word[::-1]])


def letter_counting(entry: Entry) -> str:
  """Word by word, the running count: `hundred=1;thousand=2;and=2`."""
  letter = entry["metadata"]["target_letter"].lower()
  total, steps = 0, []
  for word in entry["metadata"]["span"]:
    total += word.lower().count(letter)
    steps.append(f"{word}={total}")
  return ";".join(steps)


# By the name of the Reasoning Gym task.
_ALL = (
  base_conversion,
  chain_sum,
  count_bits,
  gcd,
  lcm,
  letter_counting,
  number_sorting,
  prime_factorization,
  products,
  spell_backward,
)
TRACES: dict[str, Callable[[Entry], str]] = {trace.__name__: trace for trace in _ALL}


def last_result(trace: str) -> str:
  """What a trace ends with: the text after its last ";" or "="."""
  return re.split("[;=]", trace)[-1]
