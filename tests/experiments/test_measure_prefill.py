"""Rows of a layer over two devices: parts, bytes, beside one device."""

import dataclasses
import json

import pytest

from configs import apb_speed
from experiments import fit_policy, measure_prefill, resolve, run

pytestmark = pytest.mark.mesh


@pytest.mark.parametrize(
  'label', ['apb forward', pytest.param('ring', marks=pytest.mark.long)]
)
def test_a_layer_over_two_devices(label, tmp_path, capsys):
  values = run._plain(apb_speed.get_config('smoke,devices=2'))
  del values['kind'], values['compilation_cache']
  config = resolve.resolve(measure_prefill.Config, values)
  config = dataclasses.replace(config, methods={label: config.methods[label]})
  measure_prefill.run(config, tmp_path)
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  rows = {row['op']: row for row in map(json.loads, lines)}
  assert set(rows) == {'layer', *measure_prefill.PARTS}
  assert all(row['error'] is None for row in rows.values())
  layer, apart = rows['layer'], rows['communication']
  assert layer['devices'] == 2 and layer['peer'] == 'one device'
  assert layer['ratio'] == pytest.approx(layer['peer_ms'] / layer['ms'])
  # The collectives alone receive what the layer's do.
  assert layer['bytes'] and layer['bytes'].keys() == apart['bytes'].keys()
  for kind, moved in layer['bytes'].items():
    assert apart['bytes'][kind] == pytest.approx(moved, rel=0.01)
  assert not rows['projections']['bytes'] and not rows['feed_forward']['bytes']
  table = (tmp_path / 'report.md').read_text()
  assert table in capsys.readouterr().out and f'| 512 | {label} |' in table
  # A tenth of the bandwidth: what is sent takes ten times as long.
  (line,) = (x for x in table.splitlines() if f'| {label} |' in x)
  slow = layer['ms'] + 9 * apart['ms']
  assert line.split(' | ')[-1] == f'{slow:.2f} |'
  # A crossover can come of it: several devices against one.
  ((identity, ((length, ratio, _),)),) = fit_policy.groups([layer]).items()
  assert identity[:2] == ('prefill', label) and identity[2].startswith('2 x ')
  assert (length, ratio) == (512, round(layer['ratio'], 3))
