"""Scores of free text against one reference: F1, Rouge-L, code similarity."""

import collections
import difflib
import re
import string
import unicodedata
from collections.abc import Sequence


def f1(prediction: str, answer: str) -> float:
  """F1 of words, normalised as in SQuAD (arXiv:1606.05250).

  Lower case, no punctuation, no articles.
  """
  return _overlap(_normal_words(prediction), _normal_words(answer))


def f1_characters(prediction: str, answer: str) -> float:
  """F1 of characters without punctuation and whitespace (Zh.QA)."""

  def characters(text: str) -> list[str]:
    return [
      c
      for c in text.lower()
      if not c.isspace()
      and c not in string.punctuation
      and unicodedata.category(c)[0] != 'P'
    ]

  return _overlap(characters(prediction), characters(answer))


def rouge_l(prediction: str, answer: str) -> float:
  """F1 of the longest common subsequence of words (Lin 2004, section 3).

  Over the whole text, words split at whitespace. LongBench's package takes
  sentences apart and counts distinct words, so its numbers differ a little.
  """
  said, wanted = prediction.split(), answer.split()
  return _f(len(_common(said, wanted)), len(said), len(wanted))


def rouge_l_sum(prediction: str, answer: str) -> float:
  """Summary-level Rouge-L: lines are sentences (Lin 2004, section 3.2)."""
  said = [_rouge_words(line) for line in prediction.split('\n')]
  wanted = [_rouge_words(line) for line in answer.split('\n')]
  left = collections.Counter(w for line in said for w in line)
  left_wanted = collections.Counter(w for line in wanted for w in line)
  hits = 0
  for line in wanted:
    union = sorted({i for other in said for i in _common(line, other)})
    for i in union:
      if left[line[i]] > 0 and left_wanted[line[i]] > 0:
        left[line[i]] -= 1
        left_wanted[line[i]] -= 1
        hits += 1
  return _f(hits, sum(map(len, said)), sum(map(len, wanted)))


def code_line(prediction: str, answer: str) -> float:
  """Similarity of the first line of code, in steps of 0.01 (lcc, repobench-p).

  The first line that holds no comment sign and no backtick.
  """
  lines = prediction.lstrip('\n').split('\n')
  line = next(
    (x for x in lines if not any(sign in x for sign in ('`', '#', '//'))), ''
  )
  return round(difflib.SequenceMatcher(None, line, answer).ratio(), 2)


def _normal_words(text: str) -> list[str]:
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r'\b(a|an|the)\b', ' ', text).split()


def _rouge_words(text: str) -> list[str]:
  return re.findall('[a-z0-9]+', text.lower())


def _overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
  common = collections.Counter(said) & collections.Counter(wanted)
  return _f(common.total(), len(said), len(wanted))


def _f(hits: int, said: int, wanted: int) -> float:
  """2 P R / (P + R) = 2 hits / (said + wanted)."""
  return 2 * hits / (said + wanted) if hits else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> list[int]:
  """Indices in `a` of one longest common subsequence of `a` and `b`."""
  rows = [[0] * (len(b) + 1)]
  for x in a:
    above, row = rows[-1], [0]
    for j, y in enumerate(b):
      row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    rows.append(row)
  found, i, j = [], len(a), len(b)
  while i and j:
    if a[i - 1] == b[j - 1]:
      found.append(i - 1)
      i, j = i - 1, j - 1
    elif rows[i - 1][j] >= rows[i][j - 1]:
      i -= 1
    else:
      j -= 1
  return found[::-1]
