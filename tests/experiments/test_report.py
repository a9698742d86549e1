"""Numbers, tables and files of a report."""

import base64
import html.parser
import random
import re

import numpy as np
import pytest

from experiments import comparison, report


def make_row(method, task, length, sample, score, **more):
  return {
    'key': f'{method}{task}{length}{sample}',
    'model': 'm',
    'protocol': 'whole',
    'method': method,
    'task': task,
    'length': length,
    'sample': sample,
    'question': 0,
    'status': 'ok' if score is not None else 'nan',
    'score': score,
    'prediction': '<script>alert(1)</script> & co',
    'answer': '1234567',
    'density': 1.0 if method == 'dense' else 0.3,
    'degenerate': False,
    'keys_attended': 100.0,
    'kv_bytes': 2**20 * (length // 512),
    'host_bytes': 0,
    'prefill_ms': 10.0 * length,
    'decode_ms_per_token': 5.0,
    'new_tokens': 8,
    **more,
  }


@pytest.fixture
def rows():
  rng = random.Random(0)
  found = []
  for task in ('needle', 'multi|key'):
    for length in (1024, 2048):
      for sample in range(6):
        found.append(make_row('dense', task, length, sample, 1.0))
        score = float(rng.random() < 0.5)
        found.append(make_row('streaming', task, length, sample, score))
        found.append(
          make_row('quest', task, length, sample, 1.0, degenerate=True)
        )
  return found


def test_differences_are_paired_by_sample():
  rows = [make_row('dense', 't', 8, s, v) for s, v in enumerate([1, 0, 1, 0])]
  rows += [make_row('x', 't', 8, s, v) for s, v in enumerate([0, 0, 1, 1])]
  rows.append(make_row('x', 't', 8, 9, 1))  # dense has no such sample
  line = comparison.compare(rows)[1]
  assert (line.method, line.n, line.score) == ('x', 5, 0.6)
  d = line.difference
  assert (d.mean, d.pairs, d.won, d.lost) == (0.0, 4, 1, 1)
  assert d.low < 0 < d.high


def test_interval_covers_the_truth():
  """Of 200 draws of 40 pairs, about 95% of the intervals hold the mean."""
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(200):
    a = (rng.random(40) < 0.5).astype(float)
    b = (rng.random(40) < 0.8).astype(float)
    cell = ('m', 'whole', 't', 8)
    d = comparison.paired(
      {cell: dict(enumerate(a))}, {cell: dict(enumerate(b))}
    )
    held += d.low <= -0.3 <= d.high
  assert 180 <= held <= 199


def test_questions_of_a_context_are_one_sample():
  rows = []
  for method, gain in (('dense', 0.0), ('x', 1.0)):
    for sample in range(3):
      for question in range(4):
        rows.append(make_row(method, 't', 8, sample, gain, question=question))
  assert comparison.compare(rows)[1].difference.pairs == 3


def test_cells_weigh_the_same(rows):
  rows = [r for r in rows if r['length'] == 1024 or r['sample'] < 2]
  cells = [x for x in comparison.compare(rows) if x.method == 'streaming']
  total = [x for x in comparison.overall(rows) if x.method == 'streaming']
  means = [x.score for x in cells]
  assert len(cells) == 4
  assert total[0].score == pytest.approx(sum(means) / 4)
  deltas = [x.difference.mean for x in cells]
  assert total[0].difference.mean == pytest.approx(sum(deltas) / 4)


def test_failed_rows_are_counted_and_not_scored(rows):
  bad = next(r for r in rows if r['method'] == 'quest')
  bad.update(score=None, status='nan', density=None, prefill_ms=None)
  line = next(x for x in comparison.compare(rows) if x.method == 'quest')
  assert (line.failed, line.n, line.difference.pairs) == (1, 5, 5)
  assert 'nan' in report.html('t', rows, {}, {})


def test_nothing_scored_and_no_dense():
  rows = [make_row('x', 't', 8, 0, None), make_row('x', 't', 8, 1, None)]
  assert comparison.compare(rows)[0].score is None
  assert '-' in report.terminal(rows)


def test_terminal(rows):
  text = report.terminal(rows)
  assert max(map(len, text.splitlines())) <= 100
  lines = [line.split() for line in text.splitlines()]
  assert ['needle', '1024', 'dense', '6', '1.00'] in lines
  quest = next(x for x in lines if x[:2] == ['quest', '!'])
  assert quest[2:] == ['6', '1.00', '+0.00', '[+0.00,', '+0.00]'] + (
    '0/0 of 6'.split()
  )


def test_files(rows, tmp_path):
  report.write(tmp_path, 'A & B', rows, {'command': 'x <y>'})
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == [
    'quality_by_kv.png',
    'quality_by_length.png',
    'quality_by_time.png',
    'report.html',
    'report.md',
  ]
  markdown = (tmp_path / 'report.md').read_text()
  table = [x for x in markdown.splitlines() if x.startswith('|')]
  assert any('multi\\|key' in line for line in table)
  assert '![quality_by_kv.png](quality_by_kv.png)' in markdown


class Links(html.parser.HTMLParser):
  """Collects what a browser would fetch or run."""

  def __init__(self):
    super().__init__()
    self.found = []
    self.tags = []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.found += [v for k, v in attrs if k in ('src', 'href', 'srcset')]


def test_html_opens_offline_and_escapes(rows, tmp_path):
  report.write(tmp_path, 'A & B', rows, {'command': 'x <y>'})
  text = (tmp_path / 'report.html').read_text()
  links = Links()
  links.feed(text)
  assert len(links.found) == 3
  assert not {'script', 'link', 'iframe'} & set(links.tags)
  assert 'url(' not in text and '@import' not in text
  for link in links.found:
    data = base64.b64decode(re.sub('^data:image/png;base64,', '', link))
    assert data.startswith(b'\x89PNG')
  assert '&lt;script&gt;alert(1)' in text
  assert 'A &amp; B' in text


def test_equal_rows_give_equal_files(rows, tmp_path):
  for name in 'ab':
    (tmp_path / name).mkdir()
    report.write(tmp_path / name, 't', rows, {})
  for path in (tmp_path / 'a').iterdir():
    assert path.read_bytes() == (tmp_path / 'b' / path.name).read_bytes()
