"""LServe where it chooses nothing: short caches, and what the policy says."""

import dataclasses
import functools

import jax
import numpy as np

from lcx import methods, policy
from lcx.methods import lserve
from lcx.methods.dense import DenseDecode
from lcx.methods.lserve import LServeDecode, TwoWayPaged
from tests.methods.test_lserve import (
  CACHE,
  CAPACITY,
  DECODE,
  HEADS,
  PAGE,
  H,
  K,
  Line,
  step,
  tokens,
)


def test_within_the_budget_it_is_dense_to_the_last_bit():
  plain = TwoWayPaged(page=PAGE, logical_page=4)
  wide = dataclasses.replace(DECODE, budget=CAPACITY)
  # A list that is reused has room for pages to come: sums take another order.
  same = dataclasses.replace(wide, reuse=1)
  below = dataclasses.replace(DECODE, crossover=CAPACITY)
  lines = [Line(plain, d) for d in (DenseDecode(), same, below, wide)]
  for line in lines:
    line.read(3, 100)
  for i in range(6):
    want, *exact, near = (line.feed(i)[0] for line in lines)
    for out in exact:
      np.testing.assert_array_equal(out, want)
    np.testing.assert_allclose(near, want, rtol=1e-5, atol=1e-6)
  # The list is every page there is, in order.
  slots = np.asarray(lines[-1].state.slots)[0]
  n = -(-lines[-1].length // PAGE)
  assert all(row[row >= 0].tolist() == list(range(n)) for row in slots)


def measured(crossover):
  """A policy that knows one crossover, on this device."""
  entry = policy.Entry(
    op='step',
    method='lserve',
    device=jax.devices()[0].device_kind,
    heads=HEADS,
    kv_heads=K,
    head_dim=H,
    bits=32,
    crossover=crossover,
    evidence=((crossover - 1, 0.5, ''), (crossover, 1.5, '')),
  )
  return policy.Policy((entry,))


def sees_all(monkeypatch, decode, config=CACHE):
  """Whether a step lists no pages; traced alone."""
  line, listed = Line(config, decode), []

  def note(self, q, cache, state, ctx):
    listed.append(self)
    return state, cache.page_ids(), cache.page_starts()

  with monkeypatch.context() as patch:
    patch.setattr(LServeDecode, '_listed', note)
    row = jax.ShapeDtypeStruct((1,), 'int32')
    jax.eval_shape(
      functools.partial(step.__wrapped__, decode=decode),
      *tokens(0, 1),
      line.cache,
      decode.start(line.cache, None),
      row,
      row,
    )
  return not listed


def test_an_entry_is_read_for_the_numbers_it_has(monkeypatch):
  """A cache with room for fewer tokens is seen whole, but for rings."""
  own = {name: getattr(DECODE, name) for name in lserve.MEASURED}
  monkeypatch.setattr(lserve, 'MEASURED', own)
  plain = TwoWayPaged(page=PAGE, logical_page=4)
  for crossover, fields, config, want in (
    (CAPACITY + 1, {}, CACHE, True),
    (CAPACITY, {}, CACHE, False),
    (CAPACITY + 1, {'sink': 3}, CACHE, False),
    (CAPACITY + 1, {'crossover': 0}, CACHE, False),
    (CAPACITY + 1, {}, plain, False),  # rows are of half the heads streaming
  ):
    monkeypatch.setattr(policy, 'load', lambda n=crossover: measured(n))
    decode = dataclasses.replace(DECODE, **({'crossover': -1} | fields))
    assert sees_all(monkeypatch, decode, config) == want


def test_the_measured_numbers_are_those_of_the_policys_rows():
  decode = methods.get_method('lserve').decode
  assert decode.crossover == policy.AS_MEASURED
  assert decode.measured_as == 'lserve'
  others = ('budget', 2048), ('reuse', 8), ('group', 'sum'), ('looseness', 0.7)
  for name, number in others:
    assert dataclasses.replace(decode, **{name: number}).measured_as == ''
  said = ', '.join(f'{name}={x!r}' for name, x in lserve.MEASURED.items())
  found = [e for e in policy.load().entries if e.method == 'lserve']
  assert found
  for entry in found:
    for *_, setting in entry.evidence:
      assert setting == f'LServeDecode({said}, crossover=0)'
