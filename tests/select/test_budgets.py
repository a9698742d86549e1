"""Selections repeat themselves bit by bit and grow with any budget drawn."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_choice import gpu
from kernels_pallas.selected_token import contiguous
from lcx.select.snapkv import snapkv
from lcx.select.sparge import sparge
from lcx.select.xattention import xattention
from tests.kernels import test_block_choice
from tests.select import test_selectors as cases
from tests.select import test_snapkv

BLOCK, BATCH, HEADS, LENGTH = (
  cases.BLOCK,
  cases.BATCH,
  cases.HEADS,
  cases.LENGTH,
)
SHARE = st.floats(0.01, 1)
FEW = hypothesis.settings(max_examples=10, deadline=None)


def assert_bitwise(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize('name', cases.SELECTORS)
def test_a_second_run_gives_the_same_bits(name):
  q, k = cases.draw(31)
  one, other = (cases.select(name, q, k) for _ in range(2))
  assert_bitwise(one, other)


def test_a_second_run_keeps_the_same_tokens():
  q, at, k = test_snapkv.draw(31)
  assert_bitwise(kept(q, at, k, 12), kept(q, at, k, 12))


def test_the_gpus_choice_gives_the_same_bits_again():
  given = test_block_choice.case(5, (3, 70), ties=True)
  run = jax.jit(
    functools.partial(gpu.choose_blocks, width=9, bounded=True, interpret=True)
  )
  assert_bitwise(run(**given), run(**given))


# Programs whose budget is an argument: name -> (q, k, budget) -> Selected.
def program(select, field='threshold', **static):
  def run(q, k, budget):
    return select(
      q,
      k,
      q_start=jnp.zeros(BATCH, jnp.int32),
      lengths=jnp.asarray(cases.LENGTHS, jnp.int32),
      block_q=BLOCK,
      block_k=BLOCK,
      **{field: budget},
      **static,
    )

  return jax.jit(run)


DRAWN = {
  'xattention': program(xattention, stride=4),
  'grouped': program(xattention, stride=4, per='group'),
  'sparge': program(sparge, similarity=0.3),
  'sparge density': program(sparge, 'density', similarity=0.3),
}


def judge(q, k, small, large):
  """What is listed, what the selector says of it, and the softmax's own."""
  exact = np.asarray(cases.block_mass(q, k))
  marked = []
  for found in (small, large):
    mask = np.zeros(exact.shape, bool)
    for at, row in cases.sets(found.blocks).items():
      mask[*at, list(row)] = True
    marked.append(mask)
  assert np.all(marked[0] <= marked[1])
  captured = np.asarray(large.captured) - np.asarray(small.captured)
  assert np.all(captured >= -1e-6)
  exact = (exact * marked[1]).sum(-1) - (exact * marked[0]).sum(-1)
  assert np.all(exact >= -1e-6)


@pytest.mark.parametrize('name', DRAWN)
@FEW
@hypothesis.given(
  seed=st.integers(0, 2**20), budgets=st.tuples(SHARE, SHARE).map(sorted)
)
def test_mass_never_falls_as_a_drawn_budget_grows(name, seed, budgets):
  q, k = cases.draw(seed)
  judge(q, k, *(DRAWN[name](q, k, jnp.float32(x)) for x in budgets))


@FEW
@hypothesis.given(
  seed=st.integers(0, 2**20),
  goals=st.lists(st.tuples(SHARE, SHARE).map(sorted), min_size=4, max_size=4),
)
def test_mass_never_falls_as_thresholds_of_heads_grow(seed, goals):
  q, k = cases.draw(seed)
  budgets = jnp.asarray(goals, jnp.float32).T
  judge(q, k, *(DRAWN['xattention'](q, k, x) for x in budgets))


# Budgets that size arrays: a program each, so a few are drawn from.
DENSITIES = (0.2, 0.5, 0.8, 1)


@pytest.mark.parametrize(
  'per', ['head', pytest.param('group', marks=pytest.mark.long)]
)
@FEW
@hypothesis.given(
  seed=st.integers(0, 2**20),
  budgets=st.tuples(*[st.sampled_from(DENSITIES)] * 2).map(sorted),
)
def test_mass_never_falls_as_the_density_grows(per, seed, budgets):
  q, k = cases.draw(seed)
  judge(q, k, *(cases.select('fixed', q, k, x, per=per) for x in budgets))


CROSSED = ((1, 1), (24, 6), (24, 60))  # columns, diagonals


@functools.cache
def crossing(columns, diagonals):
  def run(q, k):
    return cases.slashes(
      q,
      k,
      q_start=jnp.zeros(BATCH, jnp.int32),
      lengths=jnp.asarray(cases.LENGTHS, jnp.int32),
      columns=columns,
      diagonals=diagonals,
      block_q=BLOCK,
      block_k=BLOCK,
    )

  return jax.jit(run)


@FEW
@hypothesis.given(
  seed=st.integers(0, 2**20),
  budgets=st.tuples(*[st.sampled_from(CROSSED)] * 2).map(sorted),
)
def test_mass_never_falls_as_columns_and_diagonals_grow(seed, budgets):
  q, k = cases.draw(seed)
  judge(q, k, *(crossing(*x)(q, k) for x in budgets))


@functools.partial(jax.jit, static_argnames='keep')
def kept(q, at, k, keep):
  pages, ids, starts = contiguous(k, k, test_snapkv.PAGE)
  since = jnp.asarray(test_snapkv.LENGTHS - test_snapkv.WINDOW, jnp.int32)
  return snapkv(q, at, pages, ids, starts, since=since, keep=keep)


@hypothesis.settings(FEW, max_examples=6)
@hypothesis.given(
  seed=st.integers(0, 2**20),
  keeps=st.tuples(*[st.sampled_from((1, 12, 128))] * 2).map(sorted),
)
def test_kept_votes_never_fall_as_more_are_kept(seed, keeps):
  """Raw votes, as the last queries' softmax gives them."""
  q, at, k = test_snapkv.draw(seed)
  positions = [np.asarray(kept(q, at, k, keep)[1]) for keep in keeps]
  for b, h in np.ndindex(*positions[0].shape[:2]):
    group = np.asarray(q[b], np.float64).reshape(
      test_snapkv.KV_HEADS, -1, *q.shape[2:]
    )[h]
    votes = test_snapkv.votes_of(
      group, np.asarray(k[b, h], np.float64), test_snapkv.LENGTHS[b]
    )
    small, large = (
      {int(p) for p in x[b, h] if p < test_snapkv.LENGTH} for x in positions
    )
    assert small <= large and len(small) <= keeps[0]
    assert votes[sorted(small)].sum() <= votes[sorted(large)].sum() + 1e-9
