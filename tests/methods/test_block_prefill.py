"""Block-selecting prefills: below the measured crossover they read densely."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcx import cache as caches
from lcx import methods, policy, sharding
from lcx.cache import CacheShape
from lcx.methods.base import Context
from lcx.methods.block_prefill import BlockPrefill
from lcx.methods.lserve import LServePrefill, TwoWayPaged
from lcx.models.presets import PRESETS
from lcx.policy import AS_MEASURED, Policy

HEADS, K, H = 4, 2, 8
SELECTORS = {
  'xattention': 'xattention_16',
  'spargeattn': 'sparge',
  'vertical_slash': 'vertical_slash_128_128',
}


def tight(name, **fields) -> BlockPrefill:
  part = methods.get_method(name).prefill
  if name == 'spargeattn':
    fields = {'similarity': -0.1} | fields  # as it was timed
  return dataclasses.replace(part.at_tight_budget(1024), **fields)


def measured(method, crossover, **fields):
  """A policy that knows one crossover, on this device."""
  where = {
    'device': jax.devices()[0].device_kind,
    'heads': HEADS,
    'kv_heads': K,
    'head_dim': H,
    'bits': 32,
  }
  evidence = ((crossover // 2, 0.5, '1/8'), (crossover, 1.5, '1/8'))
  return Policy(
    (
      policy.Entry(
        op='attention',
        method=method,
        crossover=crossover,
        evidence=evidence,
        **(where | fields),
      ),
    )
  )


def tokens(length):
  """q [1 T N H], k and v [1 T K H]."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(1, length, n, H)).astype(np.float32) for n in (HEADS, K, K)
  )


def layer(part, length, cache=caches.CONFIGS['dense']):
  """(lengths -> (out, trace)) of one row of `length` places."""
  q, k, v = map(jnp.asarray, tokens(length))
  held = cache.init(CacheShape(1, K, H, length, jnp.float32, layer=0))
  at = jnp.arange(length, dtype=jnp.int32)[None]

  def run(held, lengths):
    ctx = Context(
      positions=at,
      valid=at < lengths[:, None],
      source=at,
      lengths=lengths,
      layer=jnp.int32(0),
      key=jax.random.key(0),
      trace=True,
    )
    out, _, trace = part.attend(q, k, v, lambda x, _: x, held, ctx)
    return out, trace

  call = jax.shard_map(
    run,
    mesh=sharding.make_mesh(),
    in_specs=P(),
    out_specs=P(),
    check_vma=False,
  )
  return lambda lengths: call(held, jnp.asarray(lengths, jnp.int32))


def selects(monkeypatch, part, length=128) -> bool:
  """Whether a selector is traced for prompts of up to `length` tokens."""
  chooser = part.chooser() if isinstance(part, LServePrefill) else part
  select, calls = type(chooser).select, []

  def counted(self, *args, **kwargs):
    calls.append(self)
    return select(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(type(chooser), 'select', counted)
    cache = TwoWayPaged(page=8, logical_page=4, ring_heads=((False, True),))
    if chooser is part:
      cache = caches.CONFIGS['dense']
    jax.eval_shape(layer(part, length, cache), np.array([length]))
  return bool(calls)


def test_short_prompts_are_read_densely_long_ones_are_not(monkeypatch):
  monkeypatch.setattr(policy, 'load', lambda: measured('xattention_16', 1000))
  run = jax.jit(layer(tight('xattention', dense_below=AS_MEASURED), 1024))
  out, trace = run([999])
  assert trace.keys == trace.pairs == HEADS * 999 * 1000 / 2
  assert trace.mass == trace.counters['estimated_mass'] == 999 * HEADS
  q, k, v = (x[0] for x in tokens(1024))
  weight = np.exp(k[:999, 1] @ q[998, 3] * H**-0.5)
  want = weight @ v[:999, 1] / weight.sum()
  np.testing.assert_allclose(out[0, 998, 3], want, rtol=1e-4, atol=1e-5)
  _, trace = run([1000])
  assert trace.keys < 0.6 * trace.pairs
  assert trace.mass < 1000 * HEADS


def test_a_window_says_what_it_captures():
  part = methods.get_method('a_shape').prefill
  mass = [
    float(jax.jit(layer(p, 256))([200])[1].mass[0]) / (200 * HEADS)
    for p in (part.at_full_budget(256), part.at_tight_budget(256))
  ]
  np.testing.assert_allclose(mass[0], 1, rtol=1e-5)
  assert 0.1 < mass[1] < 0.9


@pytest.mark.parametrize('name', SELECTORS)
def test_an_entry_is_read_where_it_fits(monkeypatch, name):
  part = tight(name, dense_below=AS_MEASURED)
  assert methods.get_method(name).prefill.dense_below == AS_MEASURED
  known = SELECTORS[name]
  monkeypatch.setattr(policy, 'load', lambda: measured(known, 129))
  assert not selects(monkeypatch, part)
  assert selects(monkeypatch, dataclasses.replace(part, dense_below=0))
  monkeypatch.setattr(policy, 'load', lambda: measured('other', 129))
  assert selects(monkeypatch, part)


def test_spargeattn_reads_the_entry_of_its_similarity(monkeypatch):
  part = tight('spargeattn', dense_below=AS_MEASURED, similarity=0.2)
  for name, want in ('sparge_20', False), ('sparge', True), ('sparge_60', True):
    found = measured(name, 129)
    monkeypatch.setattr(policy, 'load', lambda found=found: found)
    assert selects(monkeypatch, part) == want


@pytest.mark.parametrize(
  ('name', 'crossover'),
  [('xattention', 4096), ('spargeattn', 16384), ('vertical_slash', 65536)],
)
def test_defaults_find_the_committed_entries(monkeypatch, name, crossover):
  """On the device and heads that were measured, here under this one's names."""
  part = methods.get_method(name).prefill
  here = policy.load().entries
  measured_at = {'heads': 32, 'kv_heads': 8, 'head_dim': 128, 'bits': 16}
  known = policy.load().crossover(
    'attention', part.measured_as, device='NVIDIA H200', **measured_at
  )
  assert known == crossover
  where = {'heads': HEADS, 'kv_heads': K, 'head_dim': H, 'bits': 32}
  where['device'] = jax.devices()[0].device_kind
  here = Policy(tuple(dataclasses.replace(e, **where) for e in here))
  monkeypatch.setattr(policy, 'load', lambda: here)
  assert not selects(monkeypatch, part, crossover - 1)
  assert selects(monkeypatch, part, crossover)


def test_another_device_or_shape_has_no_entry(monkeypatch):
  part = tight('spargeattn', dense_below=AS_MEASURED)
  for found in (
    measured('sparge', 128),  # faster from 128 tokens on
    measured('sparge', 129, device='4 x cpu'),
    measured('sparge', 129, heads=8),
    measured('sparge', 129, bits=16),
    policy.load(),  # what is committed says nothing of CPUs
  ):
    monkeypatch.setattr(policy, 'load', lambda found=found: found)
    assert selects(monkeypatch, part), found


def test_lserve_reads_the_entry_of_the_heads_it_selects_for(monkeypatch):
  part = LServePrefill(dynamic='xattention', sink=5, local=37)
  shape = {'heads': HEADS // K, 'kv_heads': 1}
  for found, want in (
    (measured('xattention_16', 129, **shape), False),
    (measured('xattention_16', 129), True),
  ):
    monkeypatch.setattr(policy, 'load', lambda found=found: found)
    assert selects(monkeypatch, part) == want
  assert not selects(monkeypatch, dataclasses.replace(part, dense_below=200))


@pytest.mark.parametrize(
  ('name', 'fields', 'known'),
  [
    ('xattention', {'stride': 8}, 'xattention_8'),
    ('xattention', {'per': 'group'}, ''),
    ('vertical_slash', {'columns': 9, 'diagonals': 5}, 'vertical_slash_9_5'),
    ('vertical_slash', {'window': 32}, ''),
    ('spargeattn', {'similarity': -1.0}, 'sparge'),
    ('spargeattn', {'similarity': 0.0}, 'sparge_0'),
    ('spargeattn', {'similarity': 0.6}, 'sparge_60'),
  ],
)
def test_what_was_not_measured_has_no_entry(monkeypatch, name, fields, known):
  part = tight(name, dense_below=AS_MEASURED, **fields)
  assert part.measured_as == known
  for entry in (SELECTORS[name], 'xattention_8', 'vertical_slash_9_5'):
    monkeypatch.setattr(policy, 'load', lambda x=entry: measured(x, 129))
    assert selects(monkeypatch, part) == (entry != known)


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    (name, fields, message)
    for name in ('xattention', 'spargeattn')
    for fields, message in (
      ({'threshold': 0.0}, r'threshold=0.0 must lie in \(0, 1\]'),
      ({'threshold': 1.5}, r'threshold=1.5 must lie in \(0, 1\]'),
      ({'threshold': None, 'density': 2}, r'density=2 must lie in \(0, 1\]'),
      ({'density': 0.5}, 'give one of threshold and density, not both'),
      ({'threshold': None}, 'not neither'),
    )
  ]
  + [
    (name, {'width': 0}, r'prefill.width=0 must be at least 3: a row always')
    for name in SELECTORS
  ]
  + [
    ('xattention', {'stride': 3}, 'prefill.stride=3 must divide 128'),
    ('xattention', {'stride': 0}, 'prefill.stride=0 must divide 128'),
    ('xattention', {'per': 'x'}, "prefill.per='x' must be 'head' or 'group'"),
    ('spargeattn', {'similarity': 1.5}, 'prefill.similarity=1.5 must lie'),
    ('vertical_slash', {'columns': 0}, 'prefill.columns=0 must be at least 1'),
    ('vertical_slash', {'diagonals': 0}, 'prefill.diagonals=0 must be'),
    ('vertical_slash', {'window': 0}, 'prefill.window=0 must be at least 1'),
  ],
)
def test_a_budget_that_cannot_be_is_refused(name, fields, message):
  part = methods.get_method(name).prefill
  with pytest.raises(ValueError, match=message) as error:
    dataclasses.replace(part, **fields).check(None, 1000)
  assert '\n' not in str(error.value)


def test_bad_numbers_are_refused():
  with pytest.raises(ValueError, match=r'dense_below=-2 must be at least -1'):
    tight('xattention', dense_below=-2).check(None, 1000)
  with pytest.raises(ValueError, match='tail=-1 must be at least 0'):
    tight('xattention', tail=-1).check(None, 1000)
  with pytest.raises(ValueError, match='lserve reads no tail'):
    LServePrefill(dynamic=tight('xattention', tail=64)).check(None, 1000)
  with pytest.raises(ValueError, match="0 with positions='rank'"):
    part = methods.get_method('tokenselect').prefill
    part = dataclasses.replace(part, positions='rank', tail=64)
    part.check(PRESETS['tiny'], 10_000)


@pytest.mark.parametrize(
  ('name', 'tail'),
  [('xattention', 40)]
  + [
    pytest.param(name, tail, marks=pytest.mark.long)
    for name in SELECTORS
    for tail in (1, 40, 700)
    if (name, tail) != ('xattention', 40)
  ],
)
def test_the_tail_of_a_prompt_sees_everything(name, tail):
  length = 600
  plain = tight(name, dense_below=0)
  out, trace = jax.jit(layer(plain, 640))([length])
  got, read = jax.jit(layer(dataclasses.replace(plain, tail=tail), 640))(
    [length]
  )
  q, k, v = (x[0] for x in tokens(640))
  first = max(length - tail, 0)
  np.testing.assert_array_equal(got[0, :first], out[0, :first])
  for row in {first, length - 1}:
    weight = np.exp(k[: row + 1, 1] @ q[row, 3] * H**-0.5)
    want = weight @ v[: row + 1, 1] / weight.sum()
    np.testing.assert_allclose(got[0, row, 3], want, rtol=1e-4, atol=1e-5)
  if tail > 1:
    assert trace.keys < read.keys <= read.pairs
  if tail >= length:
    np.testing.assert_allclose(read.mass, length * HEADS, rtol=1e-5)
  else:
    assert np.any(np.abs(got[0, first:length] - out[0, first:length]) > 1e-4)
