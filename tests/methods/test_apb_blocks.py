"""APB cuts each row's document by its own length, whatever stands beside it."""

import chex
import numpy as np
import pytest

from lcx import methods, sharding
from lcx.engine import Engine
from lcx.methods.apb import ApbPrefill
from lcx.methods.apb_blocks import PAGE, cut
from tests.methods.test_distributed import CONFIG, hidden, request, weights

pytestmark = pytest.mark.mesh

SHORT = 420  # tokens; alone it has a room of 512


def long(**fields):
  return pytest.param('apb', fields, marks=pytest.mark.long)


@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    (
      'apb',
      {
        'shared_anchor': True,
        'order': 'zigzag',
        'overlap': True,
        'every': 2,
        'passing': 60,
      },
    ),
    long(),
    long(compressor='snapkv', passing=100, gap=True),
    long(compressor='random', density=0.5),
    long(hosts=3, first_sees_query=True, anchor=50),
    pytest.param('star', {}, marks=pytest.mark.long),
  ],
  ids=str,
)
def test_a_wider_room_changes_nothing(name, fields):
  """Outputs of a document, and the keys it sees, in two rooms."""
  method = methods.get_method(name, **fields)
  unit = 128 * method.prefill.pieces(1)
  got, want = (
    hidden(method, request(SHORT), question=0, room=rooms * unit)
    for rooms in (2, -(-(SHORT + 13) // unit))
  )
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_blocks_are_nearly_equal():
  """l_b = l_d / H, in whole pages; host 0's is the longest."""
  lengths = np.array([1, 63, 64, 300, 1000, 1004, 6000, 100_000])
  for hosts in (1, 3, 4, 8):
    first, size = cut(lengths, hosts)
    assert np.all(first[:, 0] == 0) and np.all(first % PAGE * (size > 0) == 0)
    assert np.all(first[:, 1:] == (first + size)[:, :-1])
    assert np.array_equal(size.sum(axis=1), lengths)
    assert np.all(size[:, :1] >= size)
    assert np.all(size[:, :1] - size < 2 * PAGE)
    assert np.all(size[:, 0] < lengths / hosts + PAGE)
  assert cut(1000, 4)[1].tolist() == [256, 256, 256, 232]
  assert cut(300, 4)[1].tolist() == [128, 64, 64, 44]


def test_anchor_and_block_of_a_row_in_a_wider_room():
  part = methods.get_method('apb').prefill
  layout = part.layout(request(996), 0, 6144, 1)
  source = layout.source.reshape(4, -1)
  # Padding, an anchor of 256 / 4 with 9 tokens of the question, the block.
  ahead, block = source[:, :384], source[:, 384:]
  copies = -2 - ahead[:, -64:]
  asked = np.arange(1000, 1009)
  want = np.concatenate([np.arange(4), asked, np.arange(4, 55)])
  assert np.all(ahead[:, :-64] == -1) and np.all(copies == want)
  for host, size in enumerate((256, 256, 256, 232)):
    begin = 256 * host
    assert block[host, :size].tolist() == list(range(begin, begin + size))
    assert np.all(block[host, size:] == -1)
  assert np.array_equal(layout.valid, layout.source != -1)


def test_lengths_asked_for_are_cut_to_short_prompts_and_refused_for_none():
  """A capacity of 8,192 has room for them, a prompt of 430 tokens has not."""
  fields = {'passing': 1000, 'anchor': 900, 'compressor': 'snapkv'}
  part = methods.get_method('apb', **fields).prefill
  assert isinstance(part, ApbPrefill)
  part.check(CONFIG, 8192)
  with pytest.raises(ValueError, match='exceeds the 124 tokens that a host'):
    part.check(CONFIG, 4000)
  assert part.sizes(8192) == (2048, 900, 900, 1000)
  assert part.sizes(512) == (128, 128, 128, 0)
  layout = part.layout(request(SHORT), None, 512, 1)
  # Each host has the first block as its anchor.
  assert np.sum(layout.source < -1) == 4 * 128


def test_hosts_hold_whole_pages():
  with pytest.raises(ValueError, match='cache.page=96 must divide 64'):
    methods.get_method('apb', **{'cache.page': 96})


@pytest.mark.long
def test_new_keys_follow_rows_whose_hosts_hold_unequal_blocks():
  """Over two shards as over one: the tail, its page, tokens by turns."""
  fields = {'hosts': 4, 'order': 'zigzag', 'compressor': 'snapkv'}
  method = methods.get_method('apb', **fields)

  def said(seq, **kwargs):
    runs = Engine(
      CONFIG,
      weights(),
      method,
      capacity=1536,
      batch=2,
      room=160,
      mesh=sharding.make_mesh(1, seq, 1),
      **kwargs,
    )
    session = runs.prefill([request(1000), request(170, seed=5)])
    _, status = runs.decode(session, 130)
    assert status == ['ok'] * 2
    assert np.all(session.caches[0].status == 0)
    return np.asarray(session.scores)

  chex.assert_trees_all_close(
    said(2, new_keys='round_robin'), said(1), rtol=2e-3, atol=2e-3
  )
