"""SnapKV's decode: what it reads of a short cache, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcx import methods, policy, sharding
from lcx.cache import CONFIGS, CacheShape
from lcx.engine import Engine
from lcx.methods import snapkv
from lcx.methods.base import Context, Prompt
from lcx.models import transformer
from lcx.models.presets import preset

CONFIG = preset('tiny', n_layers=1)
CAPACITY = 256


def answers(method):
  weights = transformer.init(CONFIG, jax.random.key(0))
  engine = Engine(CONFIG, weights, method, capacity=CAPACITY, room=64)
  tokens = np.arange(180, dtype=np.int32) % CONFIG.vocab_size
  session = engine.prefill([Prompt(tokens[:0], tokens, ())])
  written, _ = engine.decode(session, 6)
  sums = session.sums
  return np.asarray(written), np.asarray(session.scores), sums


def test_a_short_cache_is_read_whole(monkeypatch):
  tokens, scores, _ = answers(methods.get_method('dense'))
  method = methods.get_method('snapkv')
  tight = dataclasses.replace(method.decode, budget=24, window=8)
  made = {}
  for crossover in (0, CAPACITY):
    decode = dataclasses.replace(tight, crossover=crossover)
    made[crossover] = answers(dataclasses.replace(method, decode=decode))
  # Below the crossover exactly what dense answers.
  np.testing.assert_array_equal(made[CAPACITY][0], tokens)
  np.testing.assert_array_equal(made[CAPACITY][1], scores)
  assert not np.allclose(made[0][1], scores, atol=1e-4)
  seen = {n: float(np.sum(sums['keys'])) for n, (_, _, sums) in made.items()}
  assert seen[0] < 0.5 * seen[CAPACITY]

  monkeypatch.setattr(policy, 'load', lambda: measured(CAPACITY + 1))
  # Another window: programs of the one above must not be found again.
  decode = dataclasses.replace(tight, window=7, crossover=-1)
  numbers = {name: getattr(decode, name) for name in snapkv.MEASURED}
  monkeypatch.setattr(snapkv, 'MEASURED', numbers)
  np.testing.assert_array_equal(
    answers(dataclasses.replace(method, decode=decode))[1], scores
  )


def measured(crossover):
  """A policy that knows one crossover, on this device."""
  entry = policy.Entry(
    op='layer',
    method='snapkv',
    device=jax.devices()[0].device_kind,
    heads=CONFIG.n_heads,
    kv_heads=CONFIG.n_kv_heads,
    head_dim=CONFIG.head_dim,
    bits=32,
    crossover=crossover,
    evidence=((crossover - 1, 0.5, ''), (crossover, 1.5, '')),
  )
  return policy.Policy((entry,))


def reads_whole(monkeypatch, decode) -> bool:
  """Whether a cache with room for CAPACITY tokens is read densely."""
  heads = (CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.n_kv_heads)
  shape = CacheShape(1, CONFIG.n_kv_heads, CONFIG.head_dim, CAPACITY, 'float32')
  read = []

  def run(q, k, v):
    cache = CONFIGS['dense'].init(shape)
    window = snapkv.Window(
      jnp.zeros((1, CONFIG.n_heads, decode.window, CONFIG.head_dim)),
      jnp.zeros((1, CONFIG.n_kv_heads, decode.window), jnp.int32),
    )
    at = jnp.zeros((1, 1), jnp.int32)
    ctx = Context(
      positions=at,
      valid=at >= 0,
      source=at,
      lengths=at[0] + 1,
      layer=jnp.int32(0),
      key=jax.random.key(0),
    )
    state = decode.start(cache, window)
    out, *_ = decode.attend(q, k, v, lambda x, _: x, cache, state, ctx)
    return out

  def dense(self, q, *_):
    read.append(self)
    return q, None, None, None

  with monkeypatch.context() as patch:
    patch.setattr(snapkv.DenseDecode, 'attend', dense)
    jax.eval_shape(
      jax.shard_map(
        run,
        mesh=sharding.make_mesh(),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
      ),
      *(
        jax.ShapeDtypeStruct((1, 1, n, CONFIG.head_dim), 'float32')
        for n in heads
      ),
    )
  return bool(read)


def test_an_entry_is_read_for_the_numbers_it_has(monkeypatch):
  decode = methods.get_method('snapkv').decode
  assert decode.crossover == policy.AS_MEASURED
  for crossover, want in ((CAPACITY + 1, True), (CAPACITY, False)):
    monkeypatch.setattr(policy, 'load', lambda n=crossover: measured(n))
    assert reads_whole(monkeypatch, decode) == want
    other = dataclasses.replace(decode, budget=1024)
    assert not reads_whole(monkeypatch, other)


def test_the_measured_numbers_are_those_of_the_policys_rows():
  decode = methods.get_method('snapkv').decode
  assert decode.measured_as == 'snapkv'
  for name, number in (
    ('budget', 1024),
    ('window', 16),
    ('kernel', 7),
    ('pool', 'max'),
    ('room', 4096),
  ):
    assert dataclasses.replace(decode, **{name: number}).measured_as == ''
  said = ', '.join(f'{name}={x!r}' for name, x in snapkv.MEASURED.items())
  found = [e for e in policy.load().entries if e.method == 'snapkv']
  assert found
  for entry in found:
    assert all(said in setting for *_, setting in entry.evidence)


@pytest.mark.parametrize(
  ('field', 'number', 'message'),
  [
    ('crossover', -2, 'crossover=-2'),
    ('budget', 8, 'budget=8 must exceed'),
    ('kernel', 4, 'kernel=4 must be odd'),
    ('pool', 'sum', "pool='sum'"),
    ('room', 0, 'room=0'),
  ],
)
def test_what_is_refused(field, number, message):
  decode = methods.get_method('snapkv').decode
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(decode, **{field: number}).check(CONFIG, CAPACITY)
