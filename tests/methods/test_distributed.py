"""Prefill over sequence shards: exactness, APB's limits, bytes that move."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.collectives import collective_bytes, permuted
from lcx import methods, sharding
from lcx.cache import CacheShape, Shards
from lcx.engine import Engine, steps
from lcx.engine.plan import Plan
from lcx.methods.apb import EVERY_TOKEN
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS

pytestmark = pytest.mark.mesh

# Two layers, 4 query heads of 2 kv heads: groups, and more devices than heads.
CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
EXACT = {  # devices, fields
  'ring': (4, {}),
  'ring_contiguous': (4, {}),
  'ring_striped': (4, {}),
  'ulysses': (4, {}),
  'usp': (8, {'method': 'ring', 'prefill.ulysses': 2}),
  'usp_contiguous': (
    8,
    {'method': 'ring_contiguous', 'prefill.ulysses': 4},
  ),
  'dense': (8, {}),  # by an all-gather
}


def tokens(seed, n):
  draw = np.random.default_rng(seed)
  return draw.integers(0, CONFIG.vocab_size, n).astype(np.int32)


def request(context=1000, seed=0):
  return Prompt(tokens(seed, 4), tokens(seed + 1, context), (tokens(2, 9),))


def make(name, **fields):
  return methods.get_method(fields.pop('method', name), **fields)


@functools.cache
def weights(config=CONFIG):
  return transformer.init(config, jax.random.key(0))


def make_context(plan, row, layer, room, learned=()):
  return plan.context(
    positions=row['positions'],
    valid=row['valid'],
    source=row['source'],
    lengths=jnp.max(row['source'], axis=1) + 1,
    layer=layer,
    key=jax.random.key(0),
    room=room,
    learned=learned,
  )


def hidden(method, prompt, seq=1, config=CONFIG, question=None, room=None):
  """The document's last hidden states [T D], in its own order; the trace."""
  mesh = sharding.make_mesh(1, seq, 1)
  plan = Plan(config, method, mesh)
  part = method.prefill
  whole = 128 * part.pieces(seq)
  length = len(prompt.whole(question))
  room = room or -(-length // whole) * whole
  layout = part.layout(prompt, question, room, seq)
  row = {k: jnp.asarray(v)[None] for k, v in layout._asdict().items()}
  shape = CacheShape(
    1,
    config.n_kv_heads,
    config.head_dim,
    2 * len(layout.tokens),
    'float32',
    shards=Shards(1, seq, 1),
  )

  @jax.jit  # one program for all layers
  def run(weights, x, row, layer, learned):
    x, _, _, sums = steps.prefill_layer(
      weights,
      x,
      method.cache.init(shape),
      method.decode.init_state(shape),
      row['positions'],
      row['source'],
      row['valid'],
      jnp.max(row['source'], axis=1) + 1,
      layer,
      jnp.int32(0),
      learned,
      plan=plan,
      room=room,
    )
    return x, sums

  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  model, row = jax.device_put((weights(config), row), where)
  spread = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('data', 'seq')
  )
  x = transformer.embed(model.embed, row['tokens'], config)
  x = jax.device_put(x, spread)
  learned = part.learned(config) or ((),) * config.n_layers
  seen = []
  for i, layer in enumerate(model.layers):
    x, sums = run(layer, x, row, jnp.int32(i), learned[i])
    seen.append(sums)
  order = np.full(length, -1)
  source = np.asarray(layout.source)
  order[source[source >= 0]] = np.flatnonzero(source >= 0)
  return np.asarray(x)[0][order[order >= 0]], seen


@functools.cache
def dense(context=1000):
  return hidden(make('dense'), request(context))[0]


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.long) if n == 'usp_contiguous' else n
    for n in EXACT
  ],
)
def test_exact_methods_agree(name):
  """Ring in all layouts = Ulysses = both in two dimensions = dense."""
  size, fields = EXACT[name]
  got, _ = hidden(make(name, **fields), request(), size)
  chex.assert_trees_all_close(got, dense(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  'name', ['ring', 'ring_contiguous', 'ring_striped', 'ulysses']
)
def test_on_one_device_exact_methods_are_dense(name):
  """So that an evaluation there says nothing of them that dense does not."""
  one, plain = methods.get_method(name), methods.get_method('dense')
  assert one.prefill.on(1) == plain.prefill
  assert (one.cache, one.decode) == (plain.cache, plain.decode)


# APB's invariants, section 12 of the facts.


def apb(**fields):
  return make('apb', **{'hosts': 8, 'compressor': 'random'} | fields)


@pytest.mark.parametrize(
  ('fields', 'seq'),
  [
    ({}, 8),
    ({'order': 'zigzag', 'overlap': True}, 4),
    ({'shared_anchor': True}, 2),
    pytest.param(
      {'overlap': True, 'density': 1.0, 'hosts': 4}, 1, marks=pytest.mark.long
    ),
  ],
  ids=str,
)
def test_every_token_passed_and_no_question_is_dense(fields, seq):
  """Each earlier token is seen exactly once, so all layers are dense."""
  method = apb(passing=EVERY_TOKEN, query_in_anchor=False, **fields)
  got, _ = hidden(method, request(), seq)
  chex.assert_trees_all_close(got, dense(), rtol=2e-5, atol=2e-5)


OPTIONS = {
  'plain': {},
  'snapkv': {'compressor': 'snapkv'},
  'zigzag': {'order': 'zigzag'},
  'shared_anchor': {'shared_anchor': True},
  'every_second_layer': {'every': 2},
  'first_sees_query': {'first_sees_query': True},
  'gap': {'gap': True},
  'overlap': {'overlap': True},
  'density': {'density': 0.5, 'hosts': 2},
}


@functools.cache
def answered(seq, option, context=1000):
  method = apb(**{'compressor': 'query'} | OPTIONS[option])
  return hidden(method, request(context), seq, question=0)


LONG = ('snapkv', 'gap', 'density', 'overlap', 'first_sees_query')


@pytest.mark.parametrize(
  'option',
  [
    pytest.param(o, marks=pytest.mark.long) if o in LONG else o for o in OPTIONS
  ],
)
def test_options_sharded_equal_virtual_hosts(option):
  got, seen = answered(2, option)
  want, wanted = answered(1, option)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_close(seen, wanted, rtol=1e-6)
  assert not np.allclose(want, dense(), atol=1e-3)


@pytest.mark.parametrize('option', ['zigzag', 'shared_anchor', 'overlap'])
def test_options_that_change_no_result(option):
  chex.assert_trees_all_close(
    answered(1, option), answered(1, 'plain'), rtol=1e-4, atol=1e-4
  )


BALANCED = {'order': 'zigzag', 'overlap': True, 'every': 2}


@pytest.mark.parametrize(
  ('seq', 'fields'),
  [
    (2, {}),
    pytest.param(4, {}, marks=pytest.mark.long),
    pytest.param(8, {}, marks=pytest.mark.long),
    pytest.param(2, {'order': 'zigzag'}, marks=pytest.mark.long),
    (4, BALANCED),
  ],
  ids=str,
)
def test_blocks_sent_forward_answer_as_gathered_ones(seq, fields):
  """The same bits: what is not sent is not read."""
  method = functools.partial(apb, compressor='query', **fields)
  want = hidden(method(), request(), seq, question=0)
  got = hidden(method(exchange='forward'), request(), seq, question=0)
  chex.assert_trees_all_equal(got, want)


def block_of(host, x, hosts=8, room=1024):
  return x[host * room // hosts : (host + 1) * room // hosts]


def test_options_that_change_what_is_seen():
  """Each where it says it does: in blocks of some hosts, in some layers."""
  plain, keys = answered(1, 'plain')
  asking, asking_keys = answered(1, 'first_sees_query')
  assert not np.allclose(block_of(0, plain), block_of(0, asking), atol=1e-3)
  # 1,004 tokens, of which 128 stand on host 0, see 9 more keys in 4 heads.
  more = np.asarray(asking_keys[0]['keys'] - keys[0]['keys'])
  assert more.tolist() == [128 * 9 * 4]
  rare, rare_keys = answered(1, 'every_second_layer')
  assert rare_keys[0]['keys'] == keys[0]['keys']
  star = hidden(apb(passing=0), request(), question=0)[1]
  assert rare_keys[1]['keys'] == star[1]['keys']
  assert not np.allclose(block_of(3, plain), block_of(3, rare), atol=1e-3)


@pytest.mark.long
def test_local_blocks_may_be_chosen():
  """All of them: what the interval attends to; some: less."""
  method = functools.partial(apb, hosts=2, compressor='query')
  whole, keys = hidden(method(), request(), question=0)
  full, full_keys = hidden(method(density=1.0), request(), question=0)
  chex.assert_trees_all_close(full, whole, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_close(full_keys, keys, rtol=1e-5)
  _, some_keys = answered(1, 'density')
  assert some_keys[0]['keys'] < 0.9 * keys[0]['keys']


def test_no_document_token_falls_between_anchor_and_passing():
  """With all passed, only the public code's gap leaves tokens unseen."""
  everything = {'passing': EVERY_TOKEN, 'compressor': 'random'}
  _, seen = hidden(apb(**everything), request(), question=0)
  _, gap = hidden(apb(**everything, gap=True), request(), question=0)
  # 9 tokens of the question displace 9 of the document from the anchor; the
  # 876 tokens behind host 0 lose them, in 4 heads.
  lost = np.asarray(seen[0]['keys'] - gap[0]['keys'])
  assert lost.tolist() == [(1004 - 128) * 9 * 4]


def test_one_host_is_plain_and_nothing_passed_is_star():
  one, _ = hidden(apb(hosts=1), request())
  chex.assert_trees_all_close(one, dense(), rtol=2e-5, atol=2e-5)
  whole = {'anchor': 2**30, 'query_in_anchor': False}
  none, _ = hidden(apb(passing=0, **whole), request())
  star, _ = hidden(make('star', hosts=8), request())
  chex.assert_trees_all_close(none, star, rtol=0, atol=0)
  assert not np.allclose(star, dense(), atol=1e-3)


def one_layer(method, hosts, change=None, room=1024):
  """Attention of random tokens [rows a host + block], host by host."""
  plan = Plan(CONFIG, method, sharding.make_mesh())
  layout = method.prefill.layout(request(room - 30), 0, room, 1)
  row = {k: jnp.asarray(v)[None] for k, v in layout._asdict().items()}
  total = len(layout.tokens)
  shape = CacheShape(1, 2, CONFIG.head_dim, 2 * total, 'float32')
  # A token's vectors depend on the token, so that copies are equal.
  place = np.where(layout.source < 0, -2 - layout.source, layout.source)
  table = jax.random.normal(jax.random.key(0), (room, 8, CONFIG.head_dim))
  if change is not None:
    table = table.at[change].multiply(-2.0)
  qkv = table[np.clip(place, 0, room - 1)][None]
  q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]

  def attend(q, k, v):
    ctx = make_context(plan, row, jnp.int32(0), room)
    rope = transformer.make_rope(CONFIG)
    return method.prefill.attend(q, k, v, rope, method.cache.init(shape), ctx)

  specs = jax.sharding.PartitionSpec()
  run = plan.sharded(attend, (specs,) * 3, specs)
  out, cache, _ = jax.jit(run)(q, k, v)
  return np.asarray(out)[0].reshape(hosts, -1, *out.shape[2:]), cache


def test_anchor_rows_are_the_same_on_every_host_whatever_is_passed():
  out, cache = one_layer(apb(), 8)
  rows = 128 // 4
  anchor = out[:, :rows]
  assert np.ptp(anchor, axis=0).max() < 1e-6
  # Tokens of host 5's block: they reach hosts 5 to 7 and no anchor.
  changed, _ = one_layer(apb(), 8, change=slice(640, 768))
  same = np.abs(changed - out).max(axis=(1, 2, 3)) < 1e-6
  assert same.tolist() == [True] * 5 + [False] * 3
  chex.assert_trees_all_close(changed[:, :rows], anchor, rtol=0, atol=1e-6)
  # Anchor and passing keys are dropped: the cache holds the document's tokens.
  assert int(cache.used.sum()) == 1024 - 30 + 4


# Bytes.


def long(*values):
  return pytest.param(*values, marks=pytest.mark.long)


def program(method, seq, trace=False, room=None):
  """Compiled prefill of one layer, and the padded tokens of its prompt."""
  plan = Plan(CONFIG, method, sharding.make_mesh(1, seq, 1), trace)
  room = room or 128 * method.prefill.pieces(seq)
  layout = method.prefill.layout(request(room - 30), 0, room, seq)
  total = len(layout.tokens)
  shape = CacheShape(
    1, 2, CONFIG.head_dim, 2 * room, 'float32', shards=Shards(1, seq, 1)
  )

  def at(shape, dtype, *spec):
    where = sharding.named(plan.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def run(weights, x, positions, source, valid, lengths, zero):
    return steps.prefill_layer(
      weights,
      x,
      method.cache.init(shape),
      method.decode.init_state(shape),
      positions,
      source,
      valid,
      lengths,
      zero,
      zero,
      plan=plan,
      room=room,
    )

  prompt = [
    at((1, total), dtype, 'data', 'seq') for dtype in ('int32', 'int32', bool)
  ]
  args = (
    jax.tree.map(
      lambda w: at(w.shape, w.dtype), transformer.abstract(CONFIG).layers[0]
    ),
    at((1, total, CONFIG.d_model), 'float32', 'data', 'seq'),
    *prompt,
    at((1,), 'int32', 'data'),
    at((), 'int32'),
  )
  return jax.jit(run).lower(*args).compile().as_text() or '', room


N, K, H, E = CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim, 4


FORWARD = {'exchange': 'forward'}


def apb_bytes(size, hosts, room, fields):
  """The docstring of lcx/methods/apb.py."""
  block = room // hosts
  passed = (size - 1) * (hosts // size) * 2 * (block // 8) * K * H * E
  found = {'all-gather': float(passed)}
  if fields.get('exchange') == 'forward':
    found = {'collective-permute': passed / 2}
    if fields.get('order') == 'zigzag' and hosts > size:
      found = {'all-gather': passed / 2, 'collective-permute': passed / 4}
  if fields.get('shared_anchor'):
    anchor = block // 4
    found['all-gather'] = found.get('all-gather', 0) + (
      (size - 1) / size * anchor * ((2 * K + N) * H * E + 1)
    )
  return found


def ring_bytes(size, group, room):
  """The docstring of lcx/methods/ring.py."""
  group, ring = group or size, size // (group or size)
  kv = K * (group // np.gcd(K, group))
  found = {
    'collective-permute': (ring - 1)
    * (room / ring)
    * (2 * kv / group * H * E + 4),
    'all-to-all': (group - 1)
    / group
    * (room / size)
    * ((2 * N + 2 * kv) * H * E),
    'all-gather': (group - 1) * room / size * 8,
  }
  return {name: n for name, n in found.items() if n}


@pytest.mark.parametrize(
  ('size', 'fields'),
  [(2, {}), long(4, {}), (8, {}), (4, {'shared_anchor': True})]
  + [long(n, {'shared_anchor': True}) for n in (2, 8)]
  + [long(2, FORWARD), (4, FORWARD | {'order': 'zigzag'}), (8, FORWARD)]
  + [long(2, FORWARD | BALANCED), long(8, FORWARD | BALANCED)]
  + [long(4, FORWARD | {'shared_anchor': True}), long(4, FORWARD)],
  ids=str,
)
def test_bytes_of_apb(size, fields):
  hosts = 16 if size == 8 and 'order' in fields else 8
  text, room = program(make('apb', hosts=hosts, **fields), size)
  want = apb_bytes(size, hosts, room, fields)
  assert collective_bytes(text, size) == pytest.approx(want)


def test_hops_of_blocks_sent_forward_do_not_wait_for_one_another():
  """P (P - 1) / 2 pairs in P - 1 hops, each of what a device has itself."""
  text, _ = program(make('apb', hosts=4, exchange='forward'), 4)
  hops = re.findall(r'(%\S+) = \S+ collective-permute\((%[^,)]+)', text)
  assert len(hops) == 3
  assert not {name for name, _ in hops} & {operand for _, operand in hops}
  pairs = sorted(permuted(x) for x in text.splitlines() if permuted(x))
  assert pairs == [((0, 1), (1, 2), (2, 3)), ((0, 2), (1, 3)), ((0, 3),)]


@pytest.mark.parametrize(('size', 'room'), [(2, 4096), long(4, 512), (8, 1024)])
def test_bytes_of_an_all_gather(size, room):
  """4,096: chunks of the feed-forward do not cross the shards."""
  text, room = program(make('dense'), size, room=room)
  want = {'all-gather': (size - 1) / size * 2 * room * K * H * E}
  assert collective_bytes(text, size) == pytest.approx(want)


@pytest.mark.parametrize(
  ('size', 'group'),
  [(4, 1), (4, 0)]
  + [long(*x) for x in ((8, 4), (8, 1), (2, 1), (2, 0), (4, 2))],
)
def test_bytes_of_ring_and_ulysses(size, group):
  text, room = program(make('ring', **{'prefill.ulysses': group}), size)
  want = ring_bytes(size, group, room)
  assert collective_bytes(text, size) == pytest.approx(want)


@pytest.mark.parametrize(
  ('size', 'fields'),
  [(8, {}), long(2, {}), long(4, {}), long(4, FORWARD)],
  ids=str,
)
def test_star_sends_nothing(size, fields):
  text, _ = program(make('star', hosts=8, **fields), size)
  assert collective_bytes(text, size) == {}


# Block selectors score keys where they live; the attention gathers them.


def selecting(name):
  fields = {'threshold': None, 'density': 0.3, 'dense_below': 0}
  if name == 'spargeattn':
    fields['similarity'] = -1  # trusts every mean, so some blocks are left out
  return make(name, **{f'prefill.{k}': v for k, v in fields.items()})


@functools.cache
def selected(name, seq):
  return hidden(selecting(name), request(), seq)


@pytest.mark.parametrize(
  ('name', 'seq'),
  [('xattention', 4), long('xattention', 2)]
  + [long('spargeattn', n) for n in (2, 4)],
)
def test_blocks_selected_over_shards_are_those_of_one_device(name, seq):
  """Outputs, keys seen and estimated masses of both layers."""
  got, seen = selected(name, seq)
  want, wanted = selected(name, 1)
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
  for sums, full in zip(*map(jax.device_get, (seen, wanted))):
    assert sums['keys'] == full['keys'] < 0.7 * full['pairs']
    np.testing.assert_allclose(
      sums['estimated_mass'], full['estimated_mass'], rtol=1e-5
    )
  assert not np.allclose(want, dense(), atol=1e-3)


def selector_bytes(name, size, room):
  """Docstrings of lcx/methods/{block_prefill,xattention,spargeattn}.py."""
  other, piece = size - 1, room // size
  keys_and_values = other * 2 * piece * K * H * E
  if name == 'spargeattn':
    means = other * K * (piece // 128) * (4 * H + 1)
    return {'all-gather': keys_and_values + means}
  queries = other * piece * (N * H * E + 4 / 16)
  normalisers = 2 * other / size * 2 * N * (room // 16) * 4
  return {
    'all-gather': keys_and_values + queries,
    'all-to-all': other * N * (piece // 128) ** 2 * 4,
    'all-reduce': normalisers,
  }


@pytest.mark.parametrize(
  ('name', 'size'),
  [('xattention', 2), ('spargeattn', 4), long('xattention', 4)],
)
def test_bytes_of_selectors(name, size):
  text, room = program(selecting(name), size, room=1024)
  want = selector_bytes(name, size, room)
  assert collective_bytes(text, size) == pytest.approx(want)


# Bad input.


def refused(match, seq=1, **fields):
  with pytest.raises(ValueError, match=match) as error:
    engine = Engine(
      CONFIG,
      weights(),
      make(fields.pop('method', 'apb'), **fields),
      capacity=1024,
      mesh=sharding.make_mesh(1, seq, 1),
    )
    engine.prefill([request(300)])
  assert '\n' not in str(error.value)


def test_bad_input_is_refused_before_anything_runs():
  refused('hosts=4 must be a multiple of the mesh axis seq=8', 8, hosts=4)
  refused('passing=300 exceeds the 192 tokens', hosts=4, passing=300)
  zigzag = {'order': 'zigzag', 'compressor': 'snapkv'}
  refused("order='zigzag' needs hosts=6", 2, hosts=6, **zigzag)
  refused('every=0 must be at least 1', every=0)
  refused("exchange='all' must be one of", exchange='all')
  refused('density', density=1.5)
  refused('compressor=', compressor='best')
  refused('needs the question in the anchor', query_in_anchor=False)
  refused('scores keys by the question, but the prompt is read without')
  refused('needs heads=FILE', compressor='retaining_head')
  refused('do not exist', compressor='retaining_head', heads='/nowhere')
  refused('ulysses=3 must divide', method='ring', **{'prefill.ulysses': 3})
  refused('ulysses=8 must divide the 4 query heads', 8, method='ulysses')
  with pytest.raises(ValueError, match='needs 16 devices; this process has 8'):
    sharding.make_mesh(1, 16, 1)
