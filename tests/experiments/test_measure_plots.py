"""Plots of measured rows."""

import io
import json

import matplotlib.image
import pytest

from experiments import measure_plots


def make_row(op, case, implementation, ms, **more):
  return {
    'op': op,
    'case': case,
    'implementation': implementation,
    'device': '1 x chip',
    'ms': ms,
    'peer': 'theirs',
    'ratio': None if implementation == 'theirs' else 0.5,
    **more,
  }


def rate(op, case, implementation, value):
  numbers = {'rate': value, 'unit': 'GB/s', 'ceiling': 90.0}
  return make_row(op, case, implementation, 1 / value, **numbers)


def at(length, implementation, ms):
  case = f'tiny {length}'
  return make_row('layer', case, implementation, ms, length=length)


RATES = [
  rate('copy', 'large', 'xla', 90),
  rate('decode', 'short', 'ours', 50),
  rate('decode', 'short', 'theirs', 99),
  rate('decode', 'long', 'ours', 60),
  rate('scores', 'long', 'ours', 70),
]
TIMES = [at(n, m, n / 7) for n in (64, 4096) for m in ('dense', 'quest')]
TIMES.append(at(4096, 'failed', None))


def test_a_panel_an_op_a_line_a_case():
  decode, scores = measure_plots.figure(RATES).axes
  assert decode.get_title() == 'decode, chip'
  labels = [label.get_text() for label in decode.get_yticklabels()]
  assert labels == ['short', 'long']
  assert decode.get_xlim()[0] == 0
  *points, ceiling = [line.get_xdata()[0] for line in decode.lines]
  assert sorted(points) == [50, 60, 99] and ceiling == 90
  assert decode.get_xlim()[1] > 99
  (said,) = scores.child_axes[0].get_yticklabels()
  assert said.get_text() == '14.3 us, 0.50 x theirs'


def test_methods_at_several_lengths_are_curves():
  (ax,) = measure_plots.figure(TIMES).axes
  assert (ax.get_xscale(), ax.get_yscale()) == ('log', 'log')
  curves = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
  assert curves == {'dense': [64, 4096], 'quest': [64, 4096]}


def test_selectors_are_curves_of_what_they_gain_on_their_peer():
  rows = [
    make_row(op, case.format(n), who, 2.0, **({'ratio': n / 4} | none))
    for n in (4, 8)
    for case in (
      'dense {}K, keys of m-1',
      'sparge_60 threshold 0.9 of {}K, density 0.5, mass 0.9, keys of m-1',
      'xattention_16 1/8 of {}K, density 0.1250',
    )
    for op, none in (('attention', {}), ('estimate', {'ratio': None}))
    for who in ('ours', 'theirs')
  ]
  axes = {ax.get_title(): ax for ax in measure_plots.figure(rows).axes}
  gains = axes['attention (keys of m-1), chip']
  curves = {x.get_label(): list(x.get_ydata()) for x in gains.lines[:-1]}
  assert curves == {'dense': [1, 2], 'sparge_60 threshold 0.9': [1, 2]}
  assert gains.get_ylabel() == 'times as fast as theirs'
  (curve,) = axes['estimate (random keys), chip'].lines
  assert curve.get_label() == 'xattention_16 1/8'
  assert list(curve.get_xdata()) == [4096, 8192]
  assert list(curve.get_ydata()) == [2, 2]


def test_methods_at_one_length_are_lines_of_a_panel():
  (ax,) = measure_plots.figure(TIMES[:2]).axes
  assert [y.get_text() for y in ax.get_yticklabels()] == ['dense', 'quest']
  assert ax.get_xlabel() == 'ms at 64 tokens'


def test_a_cut_model_has_a_panel_of_its_own():
  cut = [row | {'layers': 4} for row in TIMES[2:]]
  whole = [row | {'ms': 1234.5, 'layers': 0} for row in TIMES[2:4]]
  both, few = measure_plots.figure(whole + cut).axes
  assert both.get_title() == 'layer, tiny, chip'
  assert few.get_title() == 'layer, tiny of 4 layers, chip'
  said = [x.get_text() for x in both.child_axes[0].get_yticklabels()]
  assert said[0].startswith('1234 ms')


def test_recorded_rows_become_a_png(tmp_path):
  source, out = tmp_path / 'rows.jsonl', tmp_path / 'out.png'
  source.write_text('\n'.join(map(json.dumps, RATES + TIMES)))
  measure_plots.main([str(source), str(out)])
  everything = out.read_bytes()
  measure_plots.main([str(source), str(out), 'layer'])
  tall, low = (
    matplotlib.image.imread(io.BytesIO(png))
    for png in (everything, out.read_bytes())
  )
  assert tall.shape[1] == low.shape[1] == 860
  assert tall.shape[0] > low.shape[0] > 200
  assert tall.std() > 0.01  # something is drawn
  with pytest.raises(ValueError, match='OUT.png'):
    measure_plots.main([str(source)])


def test_nothing_measured_is_an_empty_picture():
  failed = [row for row in TIMES if row['ms'] is None]
  assert not measure_plots.figure(failed).axes
  assert measure_plots.draw(failed).startswith(b'\x89PNG')
