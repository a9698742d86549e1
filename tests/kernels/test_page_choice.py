"""Page choice: every implementation makes the definition's, tie for tie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from experiments import gpu_schedule
from kernels_pallas import page_choice
from kernels_pallas.page_choice import gpu, reference, xla
from lcx.cache.stats import Moments

NEVER = 2**30
IMPLEMENTATIONS = {
  'xla': xla.choose_pages,
  'gpu': functools.partial(gpu.choose_pages, interpret=True),
}


def case(
  seed=0,
  *,
  lengths=(290, 7, 130, 61),
  count=(2, 1, 2, 0),
  kv=2,
  group=4,
  h=64,
  width=37,
  per_page=4,
  n=9,
  unscored=(True, False),
  rows=2,
  page=8,
  dtype=jnp.bfloat16,
  draw='normal',
  loose=False,
):
  """Ragged rows: more pages than n, fewer, some, and nothing to answer.

  What must not be read is NaN: queries that are not valid, unused pages.
  """
  rng = np.random.default_rng(seed)
  b, t = len(lengths), max(count)
  rows = rows if unscored else kv
  newest = np.asarray(lengths, np.int32) - 1
  starts = np.broadcast_to(np.arange(width) * page, (b, kv, width))
  unused = starts > newest[:, None, None]
  starts = np.where(unused, NEVER, starts).astype(np.int32)
  valid = np.arange(t) < np.asarray(count)[:, None]

  def numbers(*shape):
    if draw == 'ties':  # sums of small integers are exact, and often equal
      return rng.integers(-1, 2, shape) * (rng.random(shape) < 0.1)
    return rng.normal(size=shape)

  q = numbers(b, t, kv * group, h)
  q = np.where(valid[:, :, None, None], q, np.nan)
  one, two = (numbers(b, rows, width * per_page, h) for _ in range(2))
  never = np.repeat(unused[:, :1], per_page, axis=2)[..., None]
  low = np.where(never, np.nan, np.minimum(one, two))
  high = np.where(never, np.nan, np.maximum(one, two))
  args = (
    *(jnp.asarray(x, dtype) for x in (q, low, high)),
    *(jnp.asarray(x) for x in (starts, newest, valid)),
  )
  off = jnp.asarray(abs(numbers(b, rows, h)), jnp.float32)
  return args, {
    'loose': off if loose else None,
    'unscored': jnp.asarray(unscored) if unscored else None,
    'held': jnp.asarray(rng.integers(-1, width, (b, kv, n)), jnp.int32),
    'due': jnp.array(True),
    'n': n,
    'sink': 4,
    'recent': 20,
    'page': page,
    'group': 'max',
  }


def run(name, args, kwargs):
  """An implementation's choice, or the reference's, jitted."""
  arrays = {k: kwargs[k] for k in ('loose', 'unscored', 'held', 'due')}
  static = {k: v for k, v in kwargs.items() if k not in arrays}
  choose = IMPLEMENTATIONS.get(name, reference.choose_pages)
  call = functools.partial(choose, **static)
  return np.asarray(jax.jit(lambda a, k: call(*a, **k))(args, arrays))


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize(
  'shape, rest',
  (
    ({}, {}),
    ({'group': 1, 'unscored': (False, False), 'draw': 'ties'}, {}),
    (
      {'kv': 4, 'unscored': (False, True, False, False), 'group': 8}
      | {'dtype': jnp.float32},
      {},
    ),
    ({'group': 3, 'per_page': 1, 'draw': 'ties'}, {'group': 'sum'}),
    ({'loose': True}, {}),
    ({'loose': True, 'group': 3, 'draw': 'ties'}, {'group': 'sum'}),
    (
      {'loose': True, 'kv': 4, 'unscored': (False, True, False, False)}
      | {'dtype': jnp.float32},
      {},
    ),
    ({'group': 1, 'unscored': None, 'h': 128}, {'held': None, 'due': None}),
    ({'unscored': None, 'n': 37, 'dtype': jnp.float16}, {'sink': 0}),
    ({'n': 2, 'draw': 'ties'}, {'recent': 200}),  # more forced than chosen
  ),
)
def test_it_equals_the_definition(name, shape, rest):
  args, kwargs = case(**shape)
  kwargs |= rest
  want = run('reference', args, kwargs)
  got = run(name, args, kwargs)
  np.testing.assert_array_equal(got, want)
  assert np.any(want[0] >= 0)
  if kwargs['held'] is None:
    assert np.all(got[3] == -1)  # nothing to answer, nothing held
    return
  np.testing.assert_array_equal(got[3], kwargs['held'][3])
  if kwargs['unscored'] is not None:
    np.testing.assert_array_equal(got[0][kwargs['unscored']], -1)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_what_is_held_stays_until_it_is_due(name):
  (q, low, _, *rest), kwargs = case()
  poison = jnp.full_like(low, jnp.nan)
  kwargs['due'] = jnp.array(False)
  got = run(name, (q, poison, poison, *rest), kwargs)
  np.testing.assert_array_equal(got, kwargs['held'])


def test_a_head_with_loose_bounds_does_not_own_the_list():
  """One of two query heads is ten times as long, along a channel of noise.

  All keys of channel 0 lie within -1 and 1, pages' middles are all 0: what the
  long query's bounds say is noise. The short one asks for pages 20 to 24.
  """
  rng = np.random.default_rng(0)
  high = np.zeros((1, 1, 37, 64), np.float32)
  high[..., 0] = 1 + 0.01 * rng.random((1, 1, 37))
  low = -high
  low[:, :, 20:25, 1] = high[:, :, 20:25, 1] = 1
  q = np.zeros((1, 1, 2, 64), np.float32)
  q[0, 0, 0, 0], q[0, 0, 1, 1] = 100, 10
  starts = np.arange(37, dtype=np.int32).reshape(1, 1, 37) * 8
  loose = high[:, :, :, :].mean(2)

  def choose(loose):
    slots = page_choice.choose_pages(
      *map(jnp.asarray, (q, low, high, starts)),
      jnp.array([37 * 8 - 1]),
      jnp.ones((1, 1), bool),
      loose=loose,
      n=7,
      sink=1,
      recent=1,
      page=8,
    )
    return set(np.asarray(slots)[0, 0].tolist())

  assert not choose(None) >= set(range(20, 25))
  assert choose(jnp.asarray(loose)) == {0, 20, 21, 22, 23, 24, 36}


@pytest.mark.parametrize('loose', (False, True))
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize('how', page_choice.GROUPS)
def test_scores_of_the_kernel_and_of_xla_agree(dtype, how, loose):
  args, rest = case(
    group=3, kv=2, unscored=None, n=1, dtype=dtype, per_page=2, loose=loose
  )
  loose = rest['loose']
  q, low, high, starts, newest, valid = args
  call = gpu.Call(valid, None, None)
  rules = {'n': 1, 'page': 8, 'group': how, 'loose': loose}
  work = gpu.Scoring.of(q, low, starts, newest, call, **rules)
  got, _ = gpu.page_scores(q, low, high, work, interpret=True)
  want = page_choice.kv_page_scores(
    q, low, high, valid, width=37, kv_heads=2, group=how, loose=loose
  )
  got, want = (
    page_choice.forced_scores(x, starts, newest, sink=4, recent=20, page=8)
    for x in (got, want)
  )
  answers = np.asarray(valid[:, 0])
  got, want = np.asarray(got)[answers], np.asarray(want)[answers]
  np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
  some = np.isfinite(want)
  np.testing.assert_allclose(got[some], want[some], rtol=1e-4, atol=1e-3)


# Rows whose newest logical page is full, has one token, or three.
SUMS = {
  'lengths': (290, 7, 289, 61),
  'group': 3,
  'per_page': 2,
  'unscored': None,
  'n': 1,
}


def sums_of_keys(args, offset=0.0):
  """`case`'s arguments with sums of keys for bounds: (arguments, keys).

  A logical page has four keys. Those of pages that no token entered are NaN;
  the newest one's are as many as it holds.
  """
  q, low, _, starts, newest, valid = args
  rng = np.random.default_rng(1)
  b, rows, pages, h = low.shape
  keys = np.float32(rng.normal(size=(b, rows, pages, 4, h)))
  # Pages differ as those of a text do, and channels lie off the middle.
  keys = keys + rng.normal(size=(b, rows, pages, 1, h)) + offset
  keys = np.asarray(jnp.asarray(keys, q.dtype), np.float64)
  there = np.arange(pages * 4) <= np.asarray(newest)[:, None]
  there = there.reshape(b, 1, pages, 4, 1)
  nobody = ~there.any(axis=3)

  def total(x):
    x = np.where(nobody, np.nan, np.where(there, x, 0).sum(axis=3))
    return jnp.asarray(x, jnp.float32)

  return (q, total(keys), total(keys**2), starts, newest, valid), keys


def scores_by_sums(args, how, page=8, logical=4, **run):
  """The kernel's scores and those of XLA, of forced and unused pages inf."""
  q, total, square, starts, newest, valid = args
  rules = {'n': 1, 'page': page, 'group': how}
  call = gpu.Call(valid, None, None)
  work = gpu.Scoring.of(q, total, starts, newest, call, moments=True, **rules)
  got, _ = gpu.page_scores(q, total, square, work, **run)
  mean, deviation = Moments(total, square).mean_std(newest + 1, logical)
  shape = {'width': starts.shape[2], 'kv_heads': starts.shape[1]}
  want = page_choice.kv_page_scores(
    q, mean, deviation, valid, group=how, moments=True, **shape
  )
  seen = {'sink': 4, 'recent': 20, 'page': page}
  return (
    np.asarray(page_choice.forced_scores(x, starts, newest, **seen))
    for x in (got, want)
  )


def check_sums(dtype, how, **run):
  args, _ = sums_of_keys(case(**SUMS, dtype=dtype)[0])
  got, want = scores_by_sums(args, how, **run)
  answers = np.asarray(args[-1][:, 0])
  got, want = got[answers], want[answers]
  np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
  some = np.isfinite(want)
  assert some.sum() > 100
  # Scores are about 30, a sum of three 90; squares are rounded to 16 bits.
  error = np.abs(got[some] - want[some]).max()
  assert error < (1e-3 if dtype == jnp.float32 else 0.1), error


@pytest.mark.parametrize('programs', (512, 16))
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float16, jnp.float32))
@pytest.mark.parametrize('how', page_choice.GROUPS)
def test_scores_by_sums_are_those_of_moments(dtype, how, programs, monkeypatch):
  """Also where a program scores more than one tile, the last beyond the end."""
  sizes = gpu.Sizes(tile_bytes=4096, programs=programs)
  monkeypatch.setattr(gpu, 'SIZES', sizes)
  check_sums(dtype, how, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float16, jnp.float32))
@pytest.mark.parametrize('how', page_choice.GROUPS)
def test_they_are_on_a_gpu(dtype, how, monkeypatch):
  monkeypatch.setattr(gpu, 'SIZES', gpu.Sizes(tile_bytes=4096, programs=16))
  check_sums(dtype, how)


def check_long_sums(pages, t, logical, **run):
  """Of Llama 3 8B's heads with bounds, the last page of which has one token."""
  draw = jax.random.split(jax.random.key(t + logical))
  shape = 1, 4, pages * 64 // logical, logical, 128
  keys = 1 + jax.random.normal(draw[0], shape, jnp.bfloat16)
  keys = keys.astype(jnp.float32)
  q = jax.random.normal(draw[1], (1, t, 16, 128), jnp.bfloat16)
  starts = jnp.arange(pages, dtype=jnp.int32) * 64
  args = (
    q,
    jnp.sum(keys, axis=3),
    jnp.sum(keys**2, axis=3),
    jnp.broadcast_to(starts, (1, 4, pages)),
    starts[-1:],
    jnp.ones((1, t), bool),
  )
  got, want = scores_by_sums(args, 'max', 64, logical, **run)
  np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
  some = np.isfinite(want)
  assert some.sum() > 3 * pages
  np.testing.assert_allclose(got[some], want[some], atol=0.1, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize('logical', (4, 16))
@pytest.mark.parametrize('t', (1, 16))
def test_they_are_at_128k_on_a_gpu(t, logical):
  check_long_sums(2056, t, logical)


@pytest.mark.parametrize(
  'dtype, offset, most',
  (
    # Scores are 30 +- 5, and with the offset 160 +- 81.
    (jnp.bfloat16, 0, 0.03),
    (jnp.bfloat16, 20, 0.03),
    (jnp.float32, 0, 1e-4),
    (jnp.float32, 20, 1e-3),
  ),
)
def test_scores_by_sums_are_near_float64(dtype, offset, most):
  """Also of keys that lie off the middle by 20 of their deviations."""
  args, keys = sums_of_keys(case(**SUMS, dtype=dtype)[0], offset)
  got, _ = scores_by_sums(args, 'max', interpret=True)
  q, valid = np.asarray(args[0], np.float64), np.asarray(args[-1])
  b, t, _, h = q.shape
  q = q.reshape(b, t, 2, 3, 1, h)
  mean, deviation = keys.mean(axis=3), keys.std(axis=3)
  middle = (q * mean[:, None, :, None]).sum(axis=-1)
  spread = np.square(q * deviation[:, None, :, None]).sum(axis=-1)
  want = (middle + 2 * np.sqrt(spread)).reshape(b, t, 2, 3, 37, 2)
  want = np.where(valid[:, :, None, None, None, None], want, -np.inf)
  want = want.max(axis=(1, 3, 5))
  some = np.isfinite(got) & valid[:, :1, None]
  assert some.sum() > 100
  error = np.abs(got[some] - want[some]).max()
  assert error < most


@pytest.mark.gpu
@pytest.mark.parametrize('draw', ('ties', 'normal'))
@pytest.mark.parametrize('width, t', ((2056, 1), (2056, 16), (16392, 1)))
def test_on_a_gpu(width, t, draw):
  """Compiled: choices where sums are exact, scores where they are rounded."""
  args, kwargs = case(
    lengths=(width * 64 - 70, 3000, 100000),
    count=(t, t, 0),
    kv=8,
    h=128,
    width=width,
    n=65,
    unscored=(True, False) * 4,
    rows=4,
    page=64,
    draw=draw,
    loose=draw == 'normal',
  )
  kwargs |= {'sink': 64, 'recent': 256}
  q, low, high, starts, newest, valid = args
  want = np.asarray(reference.choose_pages(*args, **kwargs))
  got = np.asarray(
    page_choice.choose_pages(*args, **kwargs, implementation='gpu')
  )
  np.testing.assert_array_equal(got[1:], want[1:])
  if draw == 'ties':
    np.testing.assert_array_equal(got, want)
  kept = page_choice.choose_pages(
    *args, **kwargs | {'due': jnp.array(False)}, implementation='gpu'
  )
  np.testing.assert_array_equal(kept, kwargs['held'])
  heads = page_choice.scored_heads(kwargs['unscored'], 4)
  how = {'width': width, 'kv_heads': 8, 'heads': heads}
  scores = page_choice.kv_page_scores(
    q, low, high, valid, loose=kwargs['loose'], **how
  )
  rule = {k: kwargs[k] for k in ('sink', 'recent', 'page')}
  scores = page_choice.forced_scores(scores, starts[:, heads], newest, **rule)
  scores = np.asarray(scores[0])
  for row, head in enumerate(np.asarray(heads)):
    best = np.sort(scores[row])[::-1][:65]
    mine = np.sort(scores[row, got[0, head]])[::-1]
    np.testing.assert_allclose(mine, best, rtol=1e-3, atol=1e-3)


def hard_scores(rng, width):
  """Rows that a search by value can stumble over."""
  normal = rng.normal(size=width)
  inf = np.full(width, np.inf)
  spread = np.exp(rng.normal(size=width) * 20) * rng.choice((-1, 1), width)
  holes = np.where(rng.random(width) < 0.5, -inf, normal)
  return np.stack(
    [
      normal,
      np.zeros(width),
      np.where(rng.random(width) < 0.5, 0.0, -0.0),
      rng.integers(-3, 3, width),
      -inf,
      inf,
      np.where(rng.random(width) < 0.3, inf, holes),
      spread,
      holes,
      1 + rng.integers(0, 5, width) * 2.0**-23,
    ]
  ).astype(np.float32)


def as_scored(rows, width):
  """A rule by which all pages are used, and none is seen whatever it scores."""
  starts = jnp.zeros((rows, 1, width), jnp.int32)
  newest = jnp.full((rows,), NEVER - 1, jnp.int32)
  return gpu.Always(starts, newest, sink=0, recent=1, page=1)


@pytest.mark.parametrize(
  'width, n', ((1, 1), (37, 5), (37, 37), (1500, 1), (1500, 64), (2100, 700))
)
def test_the_n_best_of_scores_that_are_hard_to_tell_apart(width, n):
  scores = hard_scores(np.random.default_rng(width + n), width)
  order = np.argsort(-scores, axis=1, kind='stable')[:, :n]
  kept = np.take_along_axis(scores, order, axis=1) > -np.inf
  want = np.sort(np.where(kept, order, width), axis=1)
  want = np.where(want < width, want, -1)
  call = gpu.Call(jnp.ones((len(scores), 1), bool), None, None)
  rule = as_scored(len(scores), width)
  got = jax.jit(
    lambda x: gpu.best_pages(x, None, call, rule, n=n, interpret=True)
  )(jnp.asarray(scores[:, None]))
  np.testing.assert_array_equal(np.asarray(got)[:, 0], want)


def test_scores_that_are_no_numbers_stay_within_the_list():
  scores = jnp.full((1, 1, 40), jnp.nan).at[0, 0, ::3].set(jnp.inf)
  call = gpu.Call(jnp.ones((1, 1), bool), None, None)
  rule = as_scored(1, 40)
  got = gpu.best_pages(scores, None, call, rule, n=7, interpret=True)
  np.testing.assert_array_equal(got[0, 0], np.arange(7))


@pytest.mark.parametrize(
  'change, message',
  (
    ({'n': 0}, 'n=0'),
    ({'n': 38}, 'within 1 and W=37'),
    ({'group': 'mean'}, "group='mean'"),
    ({'due': None}, 'come together'),
    ({'unscored': jnp.zeros((3,), bool)}, r'unscored is bool\[3\]'),
    ({'low': jnp.zeros((4, 3, 148, 64))}, 'h = 2'),
    ({'due': jnp.ones((1,), bool)}, r'due is bool\[1\]'),
    ({'implementation': 'tpu'}, 'cannot be loaded'),
  ),
)
def test_bad_arguments_are_refused(change, message):
  args, kwargs = case()
  names = ('q', 'low', 'high', 'starts', 'newest', 'valid')
  with pytest.raises(ValueError, match=message):
    page_choice.choose_pages(**{**dict(zip(names, args)), **kwargs, **change})


@pytest.mark.parametrize(
  'size, reason',
  (
    ({'h': 32}, 'head dim 32'),
    ({'per_page': 3}, '3 logical pages'),
    ({'t': 16, 'n_heads': 18}, '16 x 9'),
    ({'width': 2**16}, '65536 pages'),
    ({'dtype': jnp.int8}, 'int8'),
  ),
)
def test_the_gpu_names_what_it_cannot_take(size, reason):
  size = {'t': 1, 'n_heads': 8, 'h': 64, 'width': 9, 'per_page': 1} | size
  dtype = size.get('dtype', jnp.float16)
  bounds = (1, 2, size['width'] * size['per_page'], size['h'])
  bounds = jax.ShapeDtypeStruct(bounds, dtype)
  q = (1, size['t'], size['n_heads'], size['h'])
  q = jax.ShapeDtypeStruct(q, jnp.float16)
  starts = jax.ShapeDtypeStruct((1, 2, size['width']), jnp.int32)
  found = gpu.refuse('choose_pages', q, bounds, bounds, starts)
  assert (found is not None) == bool(reason) and reason in found


# Shapes of Llama 3 8B: (pages, heads with bounds, pages chosen, T).
SIZES = ((2056, 4, 65, 1), (16392, 4, 65, 1), (2056, None, 17, 16))


def on_an_h100(width, rows, n, t):
  """(function, shapes) of a choice."""
  bounds = ((1, rows or 8, width * 4, 128), jnp.bfloat16)
  specs = [((1, t, 32, 128), jnp.bfloat16), bounds, bounds]
  specs += [((1, 8, width), jnp.int32), ((1,), jnp.int32), ((1, t), bool)]
  if rows:
    specs += [((8,), bool), ((1, 8, n), jnp.int32), ((), bool)]
    specs += [((1, rows, 128), jnp.float32)]

  def choose(*args):
    unscored, held, due, loose = args[6:] if rows else (None,) * 4
    return gpu.choose_pages(
      *args[:6], n=n, sink=64, recent=256, page=64, group='max',
      loose=loose, unscored=unscored, held=held, due=due
    )  # fmt: skip

  return choose, specs


def lower(function, args, **how):
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(function, **how).trace(*args)
    return traced.lower(lowering_platforms=('cuda',))


@pytest.mark.h100_aot
@pytest.mark.parametrize('size', SIZES)
def test_it_lowers_through_triton(size):
  choose, specs = on_an_h100(*size)
  lowered = lower(choose, [jax.ShapeDtypeStruct(*spec) for spec in specs])
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == 2


@pytest.mark.h100_aot
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize('logical', (4, 16))
def test_scores_by_sums_lower_through_triton(logical, dtype):
  """Of Llama 3 8B at 128K, half of whose heads stream."""
  pages = 2056
  starts = jax.ShapeDtypeStruct((1, 8, pages), jnp.int32)
  q = jax.ShapeDtypeStruct((1, 1, 32, 128), dtype)
  total = jax.ShapeDtypeStruct((1, 4, pages * 64 // logical, 128), jnp.float32)

  def score(q, total, square, newest, valid, unscored):
    call = gpu.Call(valid, unscored, None)
    work = gpu.Scoring.of(
      q, total, starts, newest, call, n=65, page=64, group='max', moments=True
    )
    assert 256 < np.prod(work.grid) <= 516
    return gpu.page_scores(q, total, square, work)[0]

  rest = (((1,), jnp.int32), ((1, 1), jnp.bool_), ((8,), jnp.bool_))
  rest = [jax.ShapeDtypeStruct(*spec) for spec in rest]
  lowered = lower(score, [q, total, total, *rest])
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == 1


@pytest.mark.h100_aot
@pytest.mark.skipif(
  gpu_schedule.missing() is not None,
  reason='jax-cuda13-plugin, which compiles for CUDA, is not installed',
)
@pytest.mark.parametrize('size', SIZES)
def test_it_compiles_for_an_h100(size):
  """Registers and shared memory suffice; nothing but the two kernels runs."""
  choose, specs = on_an_h100(*size)
  topology = topologies.get_topology_desc(
    platform='cuda',
    topology_name='h100',
    topology='1x1x1',
    target_config=gpu_schedule.H100,
  )
  chip = jax.sharding.SingleDeviceSharding(topology.devices[0])
  args = [jax.ShapeDtypeStruct(*spec, sharding=chip) for spec in specs]
  held = [7] if len(args) > 7 else []  # its memory is the output's
  text = lower(choose, args, donate_argnums=held).compile().as_text()
  entry = text[text.index('ENTRY') :]
  assert entry.count(' custom-call(') == 2
  assert ' copy(' not in entry and ' fusion(' not in entry
