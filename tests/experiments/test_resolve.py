"""Unknown and ill-typed fields die with the place and the nearest name."""

import dataclasses
from typing import Any, Literal

import pytest

from experiments.resolve import resolve


@dataclasses.dataclass(frozen=True)
class Inner:
  budget: int = 3
  share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
  model: str
  lengths: tuple[int, ...] = (1,)
  inner: Inner = Inner()
  table: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  kind: Literal['a', 'b'] = 'a'
  seed: int | None = None
  pair: tuple[int, str] = (0, '')


def test_values_arrive():
  config = {
    'model': 'm',
    'lengths': [1, 2],
    'inner': {'budget': 4, 'share': 1},
    'table': {'quest': {'n': 1, 'inner': {'x': [1]}}},
    'kind': 'b',
    'seed': 7,
    'pair': (1, 'x'),
  }
  table = {'quest': {'n': 1, 'inner': {'x': (1,)}}}
  expected = Outer('m', (1, 2), Inner(4, 1.0), table, 'b', 7, (1, 'x'))
  assert resolve(Outer, config) == expected


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'modell': 'm'}, r"config\.modell does not exist; did you mean 'model'"),
    ({'inner': {'budgett': 1}}, r'config\.inner\.budgett does not exist'),
    ({'inner': {'budget': 0.5}}, r'config\.inner\.budget=0\.5 must be int'),
    ({'inner': {'budget': True}}, r'config\.inner\.budget=True must be int'),
    ({'inner': 3}, r'config\.inner=3'),
    ({'model': 3}, r'config\.model=3 must be str'),
    ({'lengths': 1024}, r'config\.lengths=1024'),
    ({'lengths': (1, 'a')}, r"config\.lengths\[1\]='a' must be int"),
    ({'kind': 'c'}, r"config\.kind='c' must be one of a, b"),
    ({'seed': 'x'}, r"config\.seed='x'"),
    ({'table': {'q': 1}}, r'config\.table\.q=1'),
    ({'pair': (1,)}, r'config\.pair'),
  ],
)
def test_refusals(change, says):
  with pytest.raises(ValueError, match=says) as caught:
    resolve(Outer, {'model': 'm'} | change)
  assert '\n' not in str(caught.value)


def test_missing():
  with pytest.raises(ValueError, match=r'config\.model is missing: str'):
    resolve(Outer, {})
