"""selected_token against the float64 oracle: the reference, the XLA path."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kernels_pallas import selected_token as family
from kernels_pallas.keys import Pages
from kernels_pallas.selected_token.rows import row_lists
from tests import oracle
from tests.kernels import cases

PAGES = jax.jit(family.attend_pages, static_argnames='implementation')
TOKENS = jax.jit(family.attend_tokens, static_argnames='implementation')
CASES = {
  'f32_group4': {},
  'f32_streaming': {'streaming': True},
  'bf16_group8_page64': {
    'dtype': jnp.bfloat16,
    'kv': 1,
    'group': 8,
    'page': 64,
  },
  'f16_group1_h128_one_query': {
    'dtype': jnp.float16,
    'kv': 4,
    'group': 1,
    'h': 128,
    't': 1,
  },
  'bf16_h256_16_queries': {'dtype': jnp.bfloat16, 'h': 256, 't': 16},
  'int8': {'bits': 8, 'streaming': True},
  'int8_bf16_queries': {'bits': 8, 'dtype': jnp.bfloat16, 'page': 128},
  'int4': {'bits': 4, 'h': 128},
  'int4_bf16_queries': {'bits': 4, 'dtype': jnp.bfloat16, 'streaming': True},
}


def _kind(args):
  q, pages = args[:2]
  if q.dtype == jnp.float32:
    return 'float32'
  return f'int{pages.bits}' if pages.bits < 16 else str(q.dtype)


def _pages_oracle(args, kwargs):
  q, pages, ids, starts = args
  rows, positions = oracle.rows_of_pages(ids, starts, pages.page)
  return oracle.selected(q, pages, rows, positions, **kwargs)


RUNS = [(name, 'xla') for name in CASES]
RUNS += [(name, 'reference') for name in ('f32_streaming', 'int8', 'int4')]


@pytest.mark.parametrize(('name', 'implementation'), RUNS)
def test_pages_equal_the_oracle(name, implementation):
  args, kwargs = cases.page_case(**CASES[name])
  got = PAGES(*args, **kwargs, implementation=implementation)
  oracle.assert_close(got, _pages_oracle(args, kwargs), _kind(args))
  assert got.out.dtype == jnp.float32


@pytest.mark.parametrize(('name', 'implementation'), RUNS)
def test_a_contiguous_cache_equals_the_oracle(name, implementation):
  args, kwargs = cases.contiguous_case(**CASES[name])
  run = functools.partial(
    jax.jit(family.attend_contiguous, static_argnames='implementation'),
    implementation=implementation,
  )
  got = run(*args, **kwargs)
  q, pages, starts, used = args
  lists = row_lists(pages, starts, used)
  want = _pages_oracle((q, pages, *lists), kwargs)
  oracle.assert_close(got, want, _kind(args))


def test_the_output_may_have_another_dtype():
  args, kwargs = cases.contiguous_case(dtype=jnp.bfloat16)
  run = jax.jit(family.attend_contiguous, static_argnames='out_dtype')
  got, want = (
    run(*args, **kwargs, out_dtype=dtype)
    for dtype in (jnp.bfloat16, jnp.float32)
  )
  assert got.out.dtype == jnp.bfloat16 and got.lse.dtype == jnp.float32
  np.testing.assert_array_equal(got.out, want.out.astype(jnp.bfloat16))


@pytest.mark.parametrize(('name', 'implementation'), RUNS)
def test_tokens_equal_the_oracle(name, implementation):
  args, kwargs = cases.token_case(**CASES[name])
  got = TOKENS(*args, **kwargs, implementation=implementation)
  oracle.assert_close(got, oracle.selected(*args, **kwargs), _kind(args))


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 10**6), streaming=st.booleans())
def test_lists_of_any_content(seed, streaming):
  args, kwargs = cases.page_case(seed, streaming=streaming)
  got = PAGES(*args, **kwargs)
  oracle.assert_close(got, _pages_oracle(args, kwargs), 'float32')


@hypothesis.settings(max_examples=4)
@hypothesis.given(
  t=st.integers(1, 16),
  kv=st.integers(1, 3),
  group=st.integers(1, 3),
  page=st.sampled_from([16, 32, 48]),
  width=st.integers(3, 9),
  bits=st.sampled_from([32, 8, 4]),
  seed=st.integers(0, 99),
)
def test_shapes(t, kv, group, page, width, bits, seed):
  args, kwargs = cases.page_case(
    seed, t=t, kv=kv, group=group, h=16, page=page, width=width, bits=bits
  )
  got = PAGES(*args, **kwargs)
  oracle.assert_close(got, _pages_oracle(args, kwargs), 'float32')


@pytest.mark.parametrize('chunk', [1, 4])
def test_chunks_do_not_matter(chunk):
  args, kwargs = cases.page_case(streaming=True, width=7)
  run = functools.partial(family.attend_pages, block_sizes={'chunk': chunk})
  got = jax.jit(run)(*args, **kwargs)
  oracle.assert_close(got, _pages_oracle(args, kwargs), 'float32')


@pytest.mark.parametrize('at_home', [True, False])
def test_contiguous_cache_is_dense_attention(at_home):
  rng = np.random.default_rng(0)
  q = cases.floats(rng, (2, 1, 4, 16), jnp.float32)
  k, v = (cases.floats(rng, (2, 2, 96, 16), jnp.float32) for _ in range(2))
  at = jnp.asarray([[70], [31]], jnp.int32)

  def attend(q, k, v):
    pages, ids, starts = family.contiguous(k, v, page=16)
    used = starts <= at[:, :, None]
    ids = jnp.where(used, ids, -1)
    if not at_home:  # the same pages in another order: they are gathered
      ids, starts = ids[..., ::-1], starts[..., ::-1]
    return family.attend_pages(
      q, pages, ids, starts, q_positions=at, block_sizes={'chunk': 4}
    )

  mask = np.arange(96) <= np.asarray(at)[:, None, :, None]
  mask = np.broadcast_to(mask, (2, 4, 1, 96))
  want = oracle.attend(q, k, v, mask, 0.25)
  oracle.assert_close(jax.jit(attend)(q, k, v), want, 'float32')


def test_no_page_at_all():
  (q, pages, ids, starts), kwargs = cases.page_case()
  for width in (0, 6):
    none = jnp.full_like(ids, -1)[..., :width]
    got = PAGES(q, pages, none, starts[..., :width], **kwargs)
    np.testing.assert_array_equal(got.out, 0)
    np.testing.assert_array_equal(got.lse, -np.inf)


def test_page_scores_bound_every_key():
  rng = np.random.default_rng(0)
  q = cases.floats(rng, (2, 3, 4, 16), jnp.float32)
  k = cases.floats(rng, (2, 2, 5, 8, 16), jnp.float32)
  k = np.asarray(k)
  got = jax.jit(family.page_scores)(q, k.min(axis=3), k.max(axis=3))
  keys = np.repeat(k, 2, axis=1)
  exact = np.einsum('btnh,bncsh->btncs', q, keys)
  assert np.all(np.asarray(got)[..., None] >= exact - 1e-5)
  low, high = (np.repeat(x(k, axis=3), 2, 1) for x in (np.min, np.max))
  wide = np.asarray(q, np.float64)[:, :, :, None]
  low, high = low[:, None], high[:, None]
  want = np.maximum(wide * low, wide * high).sum(-1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_soft_vote_gives_each_head_one_vote():
  rng = np.random.default_rng(0)
  q = cases.floats(rng, (2, 3, 4, 16), jnp.float32)
  k = cases.floats(rng, (2, 2, 50, 16), jnp.float32)
  soft_vote = jax.jit(family.soft_vote)
  scores = jax.jit(family.token_scores)(q, k)
  want = np.einsum('btnh,bnsh->btns', q, np.repeat(k, 2, 1)) / 4
  np.testing.assert_allclose(scores, want, atol=1e-5)
  visible = np.arange(50) < np.asarray([[50], [0]])
  vote = np.asarray(soft_vote(scores, visible))
  want = np.exp(scores[0] - np.max(scores[0], axis=-1, keepdims=True))
  want = (want / want.sum(axis=-1, keepdims=True)).sum(1)
  np.testing.assert_allclose(vote[0], want, atol=1e-6)
  np.testing.assert_array_equal(vote[1], 0)
  np.testing.assert_allclose(soft_vote(scores)[0], want, atol=1e-6)
  best, index = family.top_k(vote[0], 5)
  np.testing.assert_array_equal(index, np.argsort(-want, -1)[:, :5])
  np.testing.assert_array_equal(best, np.take_along_axis(vote[0], index, -1))
  with pytest.raises(ValueError, match='k=51'):
    family.top_k(vote, 51)


def _fix(change):
  (q, pages, ids, starts), kwargs = cases.page_case(h=16, streaming=True)
  named = {'q': q, 'pages': pages, 'ids': ids, 'starts': starts, **kwargs}
  return {**named, **{k: f(named[k]) for k, f in change.items()}}


def _replace(**leaves):
  def change(pages):
    return Pages(**{'k': pages.k, 'v': pages.v, **leaves})

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'q': lambda x: jnp.repeat(x, 6, 1)}, 'T=18 queries'),
    ({'q': lambda x: x[..., :8]}, 'pages.head_dim'),
    ({'q': lambda x: x.astype(jnp.int32)}, 'q.dtype'),
    ({'ids': lambda x: x[:, :, 1:]}, 'starts shape'),
    ({'ids': lambda x: x.astype(jnp.float32)}, 'ids.dtype'),
    ({'q_positions': lambda x: x[:, 1:]}, 'q_positions.shape'),
    ({'sink': lambda x: None}, 'sink and window must come together'),
    ({'window': lambda x: x[1:]}, 'window.shape'),
    ({'pages': lambda x: jax.tree.map(jnp.int8, x)}, 'pages.k.dtype'),
    ({'pages': _replace(k_scale=jnp.zeros((2, 16)))}, 'pages.k_scale.shape'),
    ({'pages': _replace(k_scale=jnp.zeros((27, 16)))}, 'come together'),
  ],
)
def test_bad_arguments_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    family.attend_pages(**_fix(change))


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('q', lambda x: jnp.repeat(x, 6, 1), 'T=18 queries'),
    ('starts', lambda x: x[1:], 'starts.shape'),
    ('starts', lambda x: x[:, :5], 'starts.shape'),
    ('starts', lambda x: x * 1.0, 'starts.dtype'),
    ('used', lambda x: x[1:], 'used must be int32'),
    ('used', lambda x: x * 1.0, 'used must be int32'),
  ],
)
def test_bad_arguments_of_a_contiguous_cache_are_named(name, change, message):
  args, kwargs = cases.contiguous_case(h=16)
  named = dict(zip(('q', 'pages', 'starts', 'used'), args))
  named[name] = change(named[name])
  with pytest.raises(ValueError, match=message):
    family.attend_contiguous(**named, **kwargs)


@pytest.mark.parametrize(
  ('function', 'page', 'shape', 'message'),
  [
    ('attend_pages', 48, {}, 'pages.page=48'),
    ('attend_contiguous', 48, {}, 'pages.page=48'),
    ('attend_contiguous', 16, {'bits': 8}, 'pages.page=16'),
    ('attend_pages', 64, {'h': 96}, 'head dim 96'),
    ('attend_tokens', 64, {'bits': 4}, 'head dim 64'),
    ('attend_tokens', 64, {'dtype': jnp.float32}, 'pages.k.dtype'),
  ],
)
def test_the_hopper_kernel_refuses_with_the_reason(
  function, page, shape, message
):
  case = {
    'attend_pages': cases.page_case,
    'attend_contiguous': cases.contiguous_case,
    'attend_tokens': cases.token_case,
  }[function]
  args, kwargs = case(page=page, **{'dtype': jnp.bfloat16, **shape})
  with pytest.raises(ValueError, match=message):
    getattr(family, function)(*args, **kwargs, implementation='gpu')


def test_page_must_divide_a_contiguous_cache():
  k = jnp.zeros((1, 1, 100, 16))
  with pytest.raises(ValueError, match='page=64 must divide'):
    family.contiguous(k, k)


@pytest.mark.parametrize('function', ['attend_pages', 'attend_tokens'])
def test_debug_mode_checks_values(function):
  case = cases.page_case if function == 'attend_pages' else cases.token_case
  (q, pages, ids, where), kwargs = case(h=16)
  run = jax.jit(
    checkify.checkify(
      functools.partial(getattr(family, function), implementation='reference')
    )
  )
  run(q, pages, ids, where, **kwargs)[0].throw()
  for wrong, message in ((ids + 10**6, 'must be below'), (ids * 0, 'once')):
    error, _ = run(q, pages, wrong, where, **kwargs)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
      error.throw()


def test_debug_mode_checks_what_a_contiguous_cache_holds():
  args, kwargs = cases.contiguous_case(h=16)
  run = jax.jit(checkify.checkify(family.attend_contiguous))
  run(*args, **kwargs)[0].throw()
  error, _ = run(*args[:3], args[3] + 1, **kwargs)
  with pytest.raises(checkify.JaxRuntimeError, match='used must be'):
    error.throw()
