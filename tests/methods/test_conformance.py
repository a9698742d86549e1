"""Every method, and every legal composition, keeps the contract."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx import methods, sharding
from lcx.cache import CacheShape
from lcx.engine import Engine, make_sampling, steps
from lcx.methods.base import Prompt, Tail
from lcx.methods.compose import legal
from lcx.models import transformer
from lcx.models.presets import PRESETS

# They differ from `ring` in their layout, which test_distributed compares;
# a_shape is a prefill of streaming's and dense's decode.
ALIKE = ('ring_contiguous', 'ring_striped', 'a_shape')


def each(part='', elsewhere=()):
  """Every method; where a test is of one part, those that have a part anew.

  The others, which have dense's, are left to the long run. All on one worker,
  and method by method (which scope='module' does): what is sharded is compared
  with programs that the tests before it compiled. What `elsewhere` names has a
  stricter test of its own in the default run.
  """
  dense, params = methods.get_method('dense'), []
  for name in methods.names():
    method, marks = methods.get_method(name), [pytest.mark.xdist_group('mesh')]
    again = part and getattr(method, part) == getattr(dense, part)
    if name in (*ALIKE, *elsewhere) or (again and name != 'dense'):
      marks.append(pytest.mark.long)
    params.append(pytest.param(name, marks=marks))
  return pytest.mark.parametrize('name', params, scope='module')


every_method = each()

CONFIG = dataclasses.replace(PRESETS['tiny'], dtype='float32')
CAPACITY = 384
CONTEXT = 300


def crossed():
  """One legal composition a decode part, its prefill another method's."""
  found = {}
  for parts in legal():
    prefill, cache, decode = parts
    fitness = (cache == 'paged_int8') + 2 * (prefill != decode)
    if fitness > found.get(decode, (-1,))[0]:
      found[decode] = (fitness, parts)
  return [parts for _, parts in found.values()]


def is_again(decode):
  """Whether it is dense's decode under the name of another prefill."""
  part = methods.get_method(decode).decode
  return decode != 'dense' and part == methods.get_method('dense').decode


CROSSED = [
  pytest.param(
    parts,
    marks=[pytest.mark.long]
    * (
      # Their caches and lists are the others': pages of int8, tokens of a row.
      parts[2] in ('snapkv', 'retrieval_cluster')
      or (is_again(parts[2]) and parts[0] != 'apb')
    ),
  )
  for parts in crossed()
]
# Methods that cut a prompt over hosts, virtual ones on one device.
SPLITTING = [
  n for n in methods.names() if hasattr(methods.get_method(n).prefill, 'hosts')
]


def prompt(seed: int, context: int = CONTEXT, questions: int = 1) -> Prompt:
  draw = np.random.default_rng(seed)

  def tokens(n):
    return draw.integers(0, CONFIG.vocab_size, n).astype(np.int32)

  return Prompt(
    tokens(4), tokens(context), tuple(tokens(9) for _ in range(questions))
  )


def full(method):
  method = method.at_full_budget(CAPACITY)
  if method is None:
    pytest.skip('its docstring says why it is never exact')
  return method


def answer_scores(engine, prompts, steps=5, question=0):
  """Greedy tokens and the logits after them."""
  session = engine.prefill(prompts, question)
  tokens, status = engine.decode(session, steps)
  assert status == ['ok'] * engine.batch
  return tokens, np.asarray(session.scores)


@functools.cache
def weights():
  return transformer.init(CONFIG, jax.random.key(0))


@functools.cache
def make_engine(method, mesh=(1, 1, 1), sliding_window=None, capacity=CAPACITY):
  """An engine of two rows; its programs serve several tests."""
  return Engine(
    dataclasses.replace(CONFIG, sliding_window=sliding_window),
    weights(),
    method,
    capacity=capacity,
    batch=2,
    room=64,
    mesh=sharding.make_mesh(*mesh),
  )


def tight(name):
  """An engine of a method whose budgets bite at this file's lengths."""
  return make_engine(methods.get_method(name).at_tight_budget(CONTEXT))


def dense_answer(prompts, **kwargs):
  return answer_scores(
    make_engine(methods.get_method('dense')), prompts, **kwargs
  )


@every_method
def test_full_budget_equals_dense(name):
  method = full(methods.get_method(name))
  prompts = [prompt(1), prompt(2, context=170)]
  tokens, scores = answer_scores(make_engine(method), prompts)
  want_tokens, want = dense_answer(prompts)
  assert tokens == want_tokens
  chex.assert_trees_all_close(scores, want, rtol=2e-3, atol=2e-3)


@every_method
def test_padding_and_batch_order_do_not_matter(name):
  engine = tight(name)
  prompts = [prompt(2), prompt(3, context=190)]
  tokens, scores = answer_scores(engine, prompts)
  swapped, swapped_scores = answer_scores(engine, prompts[::-1])
  assert swapped == tokens[::-1]
  chex.assert_trees_all_close(
    scores, swapped_scores[::-1], rtol=1e-4, atol=1e-4
  )
  for row, one in enumerate(prompts):  # the other row is now a copy
    alone, alone_scores = answer_scores(engine, [one])
    assert alone[0] == tokens[row]
    chex.assert_trees_all_close(
      alone_scores[0], scores[row], rtol=2e-3, atol=2e-3
    )


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.long) if n == 'star' else n
    for n in SPLITTING
  ],
)
def test_a_longer_neighbour_does_not_matter(name):
  """Beside it a prompt is padded to more, and cut over hosts as it is alone."""
  engine = make_engine(methods.get_method(name), capacity=1024)
  scores = [
    np.asarray(engine.prefill(prompts, 0).scores)[0]
    for prompts in ([prompt(2)], [prompt(2), prompt(3, context=900)])
  ]
  chex.assert_trees_all_close(*scores, rtol=1e-4, atol=1e-4)


# test_retrieval rewinds where the index is used.
# quest reads lserve's pages, snapkv tokens of dense's cache.
@each('decode', elsewhere=('retrieval_cluster', 'quest', 'snapkv'))
def test_what_was_rewound_leaves_no_trace(name):
  """Tokens after a mark, and their answers, are as if they had never been."""
  engine = tight(name)
  draw = np.random.default_rng(5)
  first, other = (
    draw.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in (5, 9)
  )
  session = engine.prefill([prompt(4)], 0)
  mark = engine.mark(session)
  engine.extend(session, [first])
  before = np.asarray(session.scores)
  engine.rewind(session, mark)
  engine.extend(session, [other])
  engine.decode(session, 3)
  engine.rewind(session, mark)
  engine.extend(session, [first])
  chex.assert_trees_all_close(
    np.asarray(session.scores), before, rtol=1e-4, atol=1e-4
  )


@each('prefill')
def test_no_value_from_the_future_reaches_an_output(name):
  """Of the prompt's outputs, none depends on a later token's value.

  Values alone are changed: a selector may read later keys, if it says so.
  """
  method = methods.get_method(name).at_tight_budget(CONTEXT)
  length = 256 * method.prefill.pieces(1)
  plan = dataclasses.replace(
    make_engine(methods.get_method('dense')).plan, method=method
  )
  shape = CacheShape(1, CONFIG.n_kv_heads, CONFIG.head_dim, 2 * length)
  layout = method.prefill.layout(prompt(20, context=length - 20), 0, length, 1)
  row = {k: jnp.asarray(v)[None] for k, v in layout._asdict().items()}
  total = len(layout.tokens)
  draw = jax.random.split(jax.random.key(0), 4)
  heads = (CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.n_kv_heads)
  q, k, v = (
    jax.random.normal(key, (1, total, n, CONFIG.head_dim))
    for key, n in zip(draw[:3], heads, strict=True)
  )
  # The token at two thirds of the prompt, all its copies included.
  changed = 2 * length // 3
  at = (row['source'] == changed) | (row['source'] == -2 - changed)
  other = jnp.where(at[..., None, None], 7.0, v)

  def run(v):
    def attend(q, k, v):
      ctx = plan.context(
        positions=row['positions'],
        valid=row['valid'],
        source=row['source'],
        lengths=jnp.max(row['source'], axis=1) + 1,
        layer=jnp.int32(0),
        key=draw[3],
        room=length,
      )
      cache = method.cache.init(shape)
      rope = transformer.make_rope(CONFIG)
      return method.prefill.attend(q, k, v, rope, cache, ctx)[0]

    specs = jax.sharding.PartitionSpec()
    return jax.jit(plan.sharded(attend, (specs,) * 3, specs))(q, k, v)

  same = np.asarray(jnp.all(run(v) == run(other), axis=(2, 3)))[0]
  source = np.asarray(layout.source)
  before = (source >= 0) & (source < changed)
  assert np.all(same[before])
  assert not np.all(same[source >= changed])


@each('decode')
def test_decode_traces_once(name):
  engine = tight(name)
  session = engine.prefill([prompt(6)], 0)
  engine.decode(session, 3)
  compiled = engine.compilations
  engine.decode(session, 5)
  session = engine.prefill([prompt(7)], 0)
  engine.decode(session, 2)
  assert engine.compilations == compiled


@every_method
def test_sharded_equals_unsharded(name):
  prompts = [prompt(8), prompt(9, context=211)]
  tokens, scores = answer_scores(tight(name), prompts)
  method = methods.get_method(name).at_tight_budget(CONTEXT)
  mesh = (2, 2, 2)
  if not getattr(method.cache, 'shards_sequence', True):
    with pytest.raises(ValueError, match='mesh axis seq=2 must be 1'):
      make_engine(method, mesh).prefill(prompts, 0)
    mesh = (2, 1, 2)
  got, got_scores = answer_scores(make_engine(method, mesh), prompts)
  assert got == tokens
  chex.assert_trees_all_close(got_scores, scores, rtol=2e-3, atol=2e-3)


@pytest.mark.xdist_group('mesh')
@pytest.mark.parametrize(
  'decode', ['dense', pytest.param('snapkv', marks=pytest.mark.long)]
)
def test_a_sliding_window_reaches_over_shards(decode):
  prompts = [prompt(8), prompt(9, context=211)]
  method = methods.compose('dense', 'paged', decode)
  tokens, scores = answer_scores(
    make_engine(method, sliding_window=70), prompts, steps=12
  )
  got, got_scores = answer_scores(
    make_engine(method, (1, 2, 1), 70), prompts, steps=12
  )
  assert got == tokens
  chex.assert_trees_all_close(got_scores, scores, rtol=2e-3, atol=2e-3)


def trace_programs(method):
  """Shapes of one prefill layer and one decode call, nothing compiled."""
  plan = make_engine(methods.get_method('dense')).plan
  plan = dataclasses.replace(plan, method=method)
  room = 256 * method.prefill.pieces(1)
  request = prompt(1, context=room - 20)
  length = len(method.prefill.layout(request, 0, room, 1).tokens)
  shape = CacheShape(1, CONFIG.n_kv_heads, CONFIG.head_dim, length, 'float32')

  def programs(weights, tokens):
    x = steps.embed_tokens(weights.embed, tokens, plan=plan)
    places = jnp.arange(length, dtype=jnp.int32)[None]
    x, cache, state, sums = steps.prefill_layer(
      weights.layers[0],
      x,
      method.cache.init(shape),
      method.decode.init_state(shape),
      places,
      places,
      places >= 0,
      jnp.array([length], jnp.int32),
      jnp.int32(0),
      jnp.int32(0),
      plan=plan,
      room=room,
    )
    state = steps.start_layer(cache, state, plan=plan)
    one = dataclasses.replace(weights, layers=weights.layers[:1])
    few = steps.few_tokens(
      one,
      (cache,),
      (state,),
      tokens[:, : method.decode.max_queries],
      jnp.array([length], jnp.int32),
      Tail(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)),
      jnp.array([1], jnp.int32),
      jnp.int32(0),
      plan=plan,
    )
    return sums, few[0], few[3]

  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return jax.eval_shape(programs, transformer.abstract(CONFIG), tokens)


@pytest.mark.parametrize(
  'together',
  [1, pytest.param(2, marks=pytest.mark.long)],
  ids=['every part', 'any two parts'],
)
def test_parts_that_may_meet_trace_together(together):
  """Shapes and dtypes fit, for every part, or pair of parts, in a legal one.

  Parts that meet run, too: each decode in CROSSED, all in the long run.
  """
  compositions = legal()
  print(f'{len(compositions)} legal compositions')
  assert ('dense', 'dense', 'dense') in compositions
  met = set()
  for parts in compositions:
    here = set(itertools.combinations(enumerate(parts), together))
    if here <= met:
      continue
    met |= here
    sums, scores, few_sums = trace_programs(methods.compose(*parts))
    assert scores.shape == (1, CONFIG.vocab_size), parts
    assert {'keys', 'pairs'} <= set(sums) & set(few_sums), parts


def check_composition(prefill, cache, decode):
  """Runs it; at full budget it equals dense, where the cache is exact."""
  method = methods.compose(prefill, cache, decode)
  exact = method.at_full_budget(CAPACITY)
  prompts = [prompt(10, context=100)]
  # Budgets made for long contexts are refused by short ones.
  engine = make_engine(exact or method.at_tight_budget(100))
  tokens, scores = answer_scores(engine, prompts, steps=2)
  assert np.all(np.isfinite(scores))
  if exact and getattr(method.cache, 'bits', 16) >= 16:
    want_tokens, want = dense_answer(prompts, steps=2)
    assert tokens == want_tokens
    chex.assert_trees_all_close(scores, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('parts', CROSSED, ids='+'.join)
def test_foreign_parts_run_together(parts):
  """Each decode after a foreign prefill, on the int8 cache where it can be."""
  check_composition(*parts)


@pytest.mark.long
@pytest.mark.parametrize('parts', legal(), ids='+'.join)
def test_every_legal_composition_runs(parts):
  check_composition(*parts)


def test_an_illegal_composition_is_refused():
  with pytest.raises(ValueError, match='needs .*nearest legal choice is'):
    methods.compose('dense', 'streaming', 'dense')
  # The cache gives way: decode is what was asked for.
  with pytest.raises(ValueError, match='choice is dense[+]paged[+]quest'):
    methods.compose('dense', 'dense', 'quest')


def test_unknown_names_and_fields_are_refused():
  with pytest.raises(ValueError, match='unknown method'):
    methods.get_method('nothing')
  with pytest.raises(ValueError, match='no part has a field'):
    methods.get_method('quest', bogus=1)
  with pytest.raises(ValueError, match='takes int'):
    methods.get_method('quest', budget='many')


def test_context_longer_than_the_cache_is_refused():
  engine = make_engine(methods.get_method('dense'))
  with pytest.raises(ValueError, match='exceeds the cache'):
    engine.prefill([prompt(11, context=500)])
  session = engine.prefill([prompt(11)], 0)
  with pytest.raises(ValueError, match='exceed the cache'):
    engine.decode(session, 500)


def test_several_questions_of_one_context():
  """Context first, rewound between questions, equals asking each afresh."""
  engine = make_engine(methods.get_method('dense'))
  both = prompt(12, questions=2)
  answers = engine.generate([both], 4, protocol='context_first')[0]
  for i, answer in enumerate(answers):
    alone = dataclasses.replace(both, questions=(both.questions[i],))
    fresh = engine.generate([alone], 4, protocol='context_first')[0][0]
    assert fresh.tokens == answer.tokens
    whole = engine.generate([alone], 4)[0][0]
    assert whole.tokens == answer.tokens
  assert answers[0].density == 1.0


def test_rows_stop_and_sample_on_their_own():
  engine = make_engine(methods.get_method('dense'))
  session = engine.prefill([prompt(13), prompt(14)], 0)
  tokens, _ = engine.decode(session, 6)
  stop = tokens[0][2]
  sampling = make_sampling(2, stop=[(stop,), ()])
  session = engine.prefill([prompt(13), prompt(14)], 0)
  stopped, _ = engine.decode(session, 6, sampling)
  cut = tokens[0].index(stop) + 1
  assert stopped == [tokens[0][:cut], tokens[1]]
  hot = make_sampling(2, temperature=[0.0, 1.0], top_p=0.9, seed=[1, 2])
  session = engine.prefill([prompt(13), prompt(14)], 0)
  warm, _ = engine.decode(session, 6, hot)
  assert warm[0] == tokens[0] and warm[1] != tokens[1]
