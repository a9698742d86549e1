"""Choosing and listing blocks, against sorting."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import block_choice
from lcx.select import block_rows

ROWS, COLUMNS = 6, 24


@jax.jit
def chosen_by(score, reachable, forced, always, limit, threshold):
  return block_choice.choose(
    score,
    reachable=reachable,
    forced=forced,
    always=always,
    limit=limit,
    threshold=threshold,
  )


def expected(score, reachable, forced, always, limit, threshold):
  """One row by sorting, in float64."""
  total = score[reachable].sum()
  chosen = set(np.flatnonzero(forced))
  mass = score[sorted(chosen)].sum() if chosen else 0.0
  rest = [j for j in np.flatnonzero(reachable) if j not in chosen]
  rest.sort(key=lambda j: (not always[j], -score[j], j))
  for j in rest:
    done = threshold < 1 and mass >= threshold * total
    if (done and not always[j]) or len(chosen) >= limit:
      break
    chosen.add(j)
    mass += score[j]
  return chosen


def draw_rows(seed: int, ties: bool):
  rng = np.random.default_rng(seed)
  shape = (ROWS, COLUMNS)
  if ties:  # sums of eighths are exact: no rounding hides behind a tie
    score = rng.integers(0, 5, shape) / 8
  else:
    score = rng.exponential(size=shape) ** 3
  reachable = np.arange(COLUMNS) <= rng.integers(0, COLUMNS, (ROWS, 1))
  forced = reachable & (rng.random(shape) < 0.1)
  always = rng.random(shape) < 0.1
  return score.astype(np.float32), reachable, forced, always


@hypothesis.given(
  seed=st.integers(0, 2**30),
  ties=st.booleans(),
  limit=st.integers(0, COLUMNS + 1),
  threshold=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
)
def test_choose_is_the_sorted_prefix(seed, ties, limit, threshold):
  rows = draw_rows(seed, ties)
  got = np.asarray(chosen_by(*rows, limit, threshold))
  for i in range(ROWS):
    want = expected(*(x[i] for x in rows), limit, threshold)
    assert set(np.flatnonzero(got[i])) == want


@hypothesis.given(
  seed=st.integers(0, 2**30),
  limits=st.tuples(st.integers(0, COLUMNS), st.integers(0, COLUMNS)),
  thresholds=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
def test_larger_budgets_hold_smaller_ones(seed, limits, thresholds):
  rows = draw_rows(seed, ties=seed % 2 == 0)
  small = chosen_by(*rows, min(limits), min(thresholds))
  large = chosen_by(*rows, max(limits), max(thresholds))
  assert np.all(np.asarray(large) | ~np.asarray(small))


def test_lists_are_the_chosen_in_order():
  chosen = np.random.default_rng(0).random((5, 40)) < 0.2
  width = chosen.sum(1).max()
  ids, count = block_choice.to_list(jnp.asarray(chosen), int(width))
  for row, row_ids, n in zip(chosen, np.asarray(ids), np.asarray(count)):
    assert list(row_ids[:n]) == list(np.flatnonzero(row))
    assert not row_ids[n:].any()


def test_density_counts_causal_blocks():
  reachable = np.arange(16) < np.array([[1], [8], [10], [16]])
  got = block_rows.blocks_at_density(jnp.asarray(reachable), 0.1)
  assert got[:, 0].tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize('width', [0, 1, 2, -3])
def test_a_width_that_cannot_hold_the_diagonal_is_refused(width):
  with pytest.raises(ValueError, match='width=.* must be at least 3'):
    block_rows.list_width(width, 8, 64, 128, 128)
  with pytest.raises(ValueError, match='must be at least 32'):
    block_rows.list_width(8, 8, 64, 128, 128, dense_below=4096)


def test_the_default_width_keeps_lists_within_256_mib():
  million = block_rows.list_width(None, 32 * 8192, 8192, 128, 128)
  assert million * 32 * 8192 * 4 <= 2**28
  assert block_rows.list_width(None, 32 * 1024, 1024, 128, 128) == 1024
  assert block_rows.list_width(None, 1, 1024, 128, 128, density=1 / 8) == 128


@pytest.mark.parametrize(
  'threshold, density',
  [(0.0, None), (1.1, None), (-1, None), (None, 0), (None, 2.0)],
)
def test_budgets_outside_the_unit_interval_are_refused(threshold, density):
  with pytest.raises(ValueError, match=r'must lie in \(0, 1\]'):
    block_rows.check_budget(threshold, density)


@pytest.mark.parametrize('both', [(None, None), (0.5, 0.5)])
def test_one_budget_is_given(both):
  with pytest.raises(ValueError, match='give one of'):
    block_rows.check_budget(*both)
