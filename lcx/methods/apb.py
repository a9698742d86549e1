"""APB: every host passes only its compressed, important keys on.

Huang et al., "APB: accelerating distributed long-context inference by passing
compressed context blocks across GPUs", arXiv:2502.12085, Algorithm 1. The
document is cut over hosts, each row's by its own length (lcx/methods/
apb_blocks.py). Each host holds [anchor | local]: the anchor is the system
prompt, the question and the document's start; the local block is its piece. A
layer does:

  1. score the local keys, keep the best `passing` a kv head (compressor),
  2. send them to the later hosts,
  3. attend: anchor rows causally to the anchor; local rows to the passing
     blocks of earlier hosts, the anchor, and causally to their own block,
  4. drop anchor and passing keys; the cache holds local keys alone.

The question then runs through the decode path, exactly, over all hosts' caches.

With the passing blocks of earlier hosts packed right before the anchor, what a
row sees is one interval of [passing | anchor | local].

Bytes that a device receives a layer, the mean of P devices, L_h hosts each,
e bytes an element, S = L_h * 2 * B * passing * K * H * e (all that one device
passes on; tests/methods/test_distributed.py reads them off the programs):
  passing blocks   exchange='gather'               (P - 1) * S
                   exchange='forward', contiguous  (P - 1) / 2 * S
                   exchange='forward', zigzag      3 / 4 * (P - 1) * S
  shared anchor    (P - 1) / P * B * anchor * (2 K * H * e + 1) more; with a
                   query-aware compressor also its queries, N * H * e
Where `every` = m, all of it in one layer of m; Star passes nothing.

'forward' sends what is read and no more: contiguous hosts are followed by those
of later devices. Zigzag hosts read more: a device's second half follows every
device's first half (an all-gather) and the second halves of later devices. In
all three the busiest device (contiguous: the last; zigzag: the first) receives
(P - 1) * S: 'forward' helps where links are shared, not the busiest receiver.

Differences from the public code: the first host's compressor knows the
question, too (it holds the anchor; its local rows see the question only if
`first_sees_query`); what the first host may pass on are exactly the document
tokens that the anchor lacks (unless `gap`); hosts are virtual, so any number of
them runs on any number of devices.
"""

import dataclasses
import functools
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse import block_sparse
from kernels_pallas.partial import Partial, merge
from kernels_pallas.passing_block import passing_block
from lcx import cache as caches
from lcx.methods import apb_blocks
from lcx.methods.apb_blocks import EVERY_TOKEN, PAGE, Order, Widths
from lcx.methods.base import (
  Context,
  Layout,
  Method,
  Prefill,
  Prompt,
  Rope,
  Trace,
)
from lcx.methods.dense import DenseDecode, dense_pairs
from lcx.policy import measured
from lcx.select import retaining_head
from lcx.select.audit import listed_keys
from lcx.select.block_rows import check_budget
from lcx.select.compressors import COMPRESSORS, Block
from lcx.select.xattention import xattention

Exchange = Literal['gather', 'forward']


@dataclasses.dataclass(frozen=True)
class ApbPrefill(Prefill):
  """Anchor, compressor, passing blocks, local attention.

  Attributes:
    hosts: pieces of the document; a multiple of the mesh's seq axis.
    anchor: tokens of the anchor, the question's included; None: a quarter of
      the row's block (table 8 of the paper); 0 is legal, too. Cut to the block.
    passing: keys that a host passes on, a kv head; None: an eighth of the row's
      block; EVERY_TOKEN: all (exact, where the anchor holds no question). Of
      prompts shorter than the capacity, cut to what a block has beside the
      anchor; refused where the longest has not so many.
    compressor: a name of `COMPRESSORS`.
    query_in_anchor: whether the question is embedded in the anchor.
    shared_anchor: anchor rows are spread over the hosts, computed once, and
      gathered, instead of being computed by every host.
    order: 'zigzag' gives a device hosts i and H - 1 - i, for balance.
    exchange: 'gather' sends each passing block to all devices, 'forward' to
      those that read it, by P - 1 permutes that do not wait for one another;
      the results are the same bits.
    every: layers between two exchanges; the others see anchor and local keys.
    first_sees_query: the first host's local rows see the anchor's question, so
      that the block it passes on is query-aware (the paper's is not).
    gap: document tokens that the question displaces from the anchor are not
      passed on by the first host either (the public code; nobody sees them).
    overlap: passing blocks are attended apart and merged, so that they may
      travel while [anchor | local] is computed.
    density: share of the local blocks that local rows see, chosen by
      XAttention's antidiagonals; None: all.
    heads: file of trained heads, for the compressor 'retaining_head'.
    crossover: prompts of fewer tokens are read densely by one device; -1: what
      the policy file says was measured; 0: never.
  """

  hosts: int = 4
  anchor: int | None = None
  passing: int | None = None
  compressor: str = 'query'
  query_in_anchor: bool = True
  shared_anchor: bool = False
  order: Order = 'contiguous'
  exchange: Exchange = 'gather'
  every: int = 1
  first_sees_query: bool = False
  gap: bool = False
  overlap: bool = False
  density: float | None = None
  heads: str = ''
  crossover: int = -1

  measured_as: ClassVar[str] = 'apb'  # in the policy file

  def at_full_budget(self, length: int) -> 'ApbPrefill | None':
    del length
    return dataclasses.replace(
      self,
      passing=EVERY_TOKEN,
      query_in_anchor=False,
      compressor='random',
      every=1,
      density=None,
    )

  def alone_below(self, config, devices: str) -> int:
    if self.crossover >= 0:
      return self.crossover
    return measured('prefill', self.measured_as, config, devices)

  def learned(self, config):
    if self.compressor != 'retaining_head':
      return None
    found = retaining_head.load(self.heads)
    found.check(config)
    return found.layers()

  def learned_specs(self, axes):
    if self.compressor != 'retaining_head':
      return ()
    return retaining_head.specs(axes.model)

  def check(self, config, capacity: int) -> None:
    if self.hosts < 1:
      raise ValueError(f'hosts={self.hosts} must be at least 1')
    apb_blocks.check_order(self.order)
    if self.exchange not in get_args(Exchange):
      raise ValueError(
        f'exchange={self.exchange!r} must be one of {get_args(Exchange)}'
      )
    if self.compressor not in COMPRESSORS:
      raise ValueError(
        f'compressor={self.compressor!r} must be one of {sorted(COMPRESSORS)}'
      )
    if self.every < 1:
      raise ValueError(f'every={self.every} must be at least 1')
    if self.density is not None:
      check_budget(None, self.density)
    if self.compressor == 'retaining_head' and not self.heads:
      raise ValueError(
        "compressor='retaining_head' needs heads=FILE: train them with "
        'configs/train_retaining_head.py'
      )
    self.learned(config)
    self._check_passing(capacity)
    if config.sliding_window is not None:
      raise ValueError(
        f"sliding_window={config.sliding_window}: the model's own window and "
        'passed blocks do not compose; take prefill=ring'
      )
    if self.compressor == 'query' and not (
      self.query_in_anchor and self.anchor != 0
    ):
      raise ValueError(
        "compressor='query' needs the question in the anchor: set "
        'query_in_anchor=True and anchor > 0, or take another compressor'
      )

  # Geometry: H hosts of [anchor rows | block] each.

  def pieces(self, shards: int) -> int:
    if self.hosts % shards:
      raise ValueError(
        f'hosts={self.hosts} must be a multiple of the mesh axis seq={shards}'
      )
    self._hosts_in_order(shards)  # refuses what zigzag order does not divide
    return self.hosts

  def misfit(self, cache) -> str | None:
    if self.hosts == 1 or PAGE % cache.page == 0:
      return None
    return (
      f'cache.page={cache.page} must divide {PAGE}: hosts hold whole pages of '
      'so many tokens'
    )

  def _check_passing(self, capacity: int) -> None:
    """Refuses a passing length that no prompt of this capacity leaves."""
    block = int(apb_blocks.cut(capacity, self.hosts)[1][0])
    anchor, passing = self._budgets(block)
    if self.hosts > 1 and (self.passing or 0) > passing:
      raise ValueError(
        f'passing={self.passing} exceeds the {passing} tokens that a host '
        f'of {block} with an anchor of {anchor} has to pass: shorten it'
      )

  def _budgets(self, block, xp=np):
    """(anchor, passing) of rows whose longest block is `block`."""
    return apb_blocks.budgets(
      block, self.hosts, self.anchor, self.passing, self.shared_anchor, xp
    )

  def sizes(self, room: int) -> Widths:
    """Shapes of a padded prompt; what rows fill of them is their own."""
    block = room // self.hosts
    anchor, passing = map(int, self._budgets(block))
    rows = anchor // self.hosts if self.shared_anchor else anchor
    return Widths(block, anchor, rows, passing)

  def _hosts_in_order(self, shards: int) -> np.ndarray:
    return apb_blocks.hosts_in_order(self.hosts, self.order, shards)

  def layout(
    self, prompt: Prompt, question: int | None, room: int, shards: int
  ) -> Layout:
    if self.hosts > 1 and self.compressor == 'query' and question is None:
      raise ValueError(
        "compressor='query' scores keys by the question, but the prompt is "
        "read without one: take compressor='snapkv', or the protocol 'whole'"
      )
    document = len(prompt.system) + len(prompt.context)
    block = int(apb_blocks.cut(document, self.hosts)[1][0])
    return apb_blocks.laid_out(
      prompt,
      question,
      int(self._budgets(block)[0]),
      self.query_in_anchor,
      self.sizes(room),
      self._hosts_in_order(shards),
    )

  # One layer.

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, _, n_heads, dim = q.shape
    size = jax.lax.axis_size(ctx.axes.seq)
    block, anchor, rows, passing = self.sizes(ctx.room)
    played = jnp.asarray(self._hosts_in_order(size))
    played = played[jax.lax.axis_index(ctx.axes.seq)]  # [h]

    def by_host(x):
      return x.reshape(batch * len(played), rows + block, *x.shape[2:])

    rotated = rope(k, ctx.positions)
    raw_q, q = by_host(q), by_host(rope(q, ctx.positions))
    keys, values, raw = by_host(rotated), by_host(v), by_host(k)
    positions, source = by_host(ctx.positions), by_host(ctx.source)
    valid = by_host(ctx.valid)
    lengths = jnp.repeat(ctx.lengths, len(played))
    host = jnp.tile(played, batch)  # [E]

    question, asked = q[:, :rows], -2 - source[:, :rows] >= lengths[:, None]
    anchor_k, anchor_v = keys[:, :rows], values[:, :rows]
    if self.shared_anchor:
      anchor_k, anchor_v, question, asked = (
        self._gathered(x, batch, ctx)
        for x in (anchor_k, anchor_v, question, asked)
      )
    sizes = apb_blocks.cut(lengths, self.hosts, jnp)[1]  # [E H]
    filled, most = self._budgets(sizes[:, 0], jnp)  # of anchor and passing
    copied = filled  # document tokens in the anchor
    if not self.gap:
      copied -= jnp.sum(asked, axis=1)
    # The anchor has what the first host may not pass on.
    counts = sizes.at[:, 0].add(-copied)
    counts = jnp.clip(counts, 0, most[:, None]).astype(jnp.int32)  # [E H]
    earlier = jnp.arange(self.hosts) < host[:, None]
    passed_on = jnp.sum(jnp.where(earlier, counts, 0), axis=1)  # to each, [E]
    # Without overlap, passing keys stand right before the anchor's.
    behind = jnp.zeros_like(filled) if self.overlap else filled
    width = self.hosts * passing + (0 if self.overlap else anchor)

    def pass_on():
      local = Block(
        q=q[:, rows:],
        k=_padded_with_last(keys[:, rows:], valid[:, rows:]),
        v=_padded_with_last(values[:, rows:], valid[:, rows:]),
        unrotated_q=_padded_with_last(raw_q[:, rows:], valid[:, rows:]),
        unrotated_k=_padded_with_last(raw[:, rows:], valid[:, rows:]),
        question=question,
        asked=asked,
        positions=positions[:, rows:],
        valid=valid[:, rows:],
        layer=ctx.layer,
        learned=ctx.learned,
        model_axis=ctx.axes.model,
      )
      count = jnp.take_along_axis(counts, host[:, None], axis=1)[:, 0]
      passed = self._select(
        local, jnp.where(host == 0, copied, 0), count, passing
      )
      begin = width - behind - passed_on
      slot = jnp.maximum(jnp.arange(width) - begin[:, None], 0)
      lists = (1 + jnp.arange(self.hosts)) * passing - counts
      index = apb_blocks.follow(slot, counts, lists)
      # Slots of the anchor; its keys are laid over what is read there.
      index = jnp.minimum(index, self.hosts * passing - 1)
      return tuple(
        self._packed(x, index, batch)
        for x in self._exchanged(*passed, batch, ctx)
      )

    passed = tuple(x[:, :0] for x in (keys, values))
    if passing and self.every > 1:
      now = ctx.layer % self.every == 0
      like = jax.eval_shape(pass_on)
      passed = jax.lax.cond(
        now, pass_on, lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in like)
      )
      passed_on = jnp.where(now, passed_on, 0)
    elif passing:
      passed = pass_on()
    more, start, stop = apb_blocks.intervals(
      host, passed_on, filled, self.sizes(ctx.room)
    )
    parts = self._interval_parts(
      q,
      passed,
      (anchor_k, anchor_v),
      (keys[:, rows:], values[:, rows:]),
      more,
      start,
      stop,
      behind,
    )
    seen = jnp.where(valid, stop - start + more, 0)[:, rows:]
    seen = jnp.sum(seen.astype(jnp.float32), axis=1) * n_heads
    if self.density is not None:
      part, keys_seen = self._sparse_local(
        q[:, rows:], keys[:, rows:], values[:, rows:], valid[:, rows:]
      )
      parts.append(_behind(rows, part))
      own = stop - jnp.maximum(start, anchor)
      own = jnp.where(valid, own, 0)[:, rows:].astype(jnp.float32)
      seen += keys_seen - jnp.sum(own, axis=1) * n_heads
    if self.first_sees_query and anchor:
      begin = jnp.where(host == 0, jnp.argmax(asked, axis=1), 0)
      count = jnp.where(host == 0, jnp.sum(asked, axis=1), 0)
      local_row = jnp.arange(q.shape[1]) >= rows
      end = begin[:, None] + jnp.where(local_row, count[:, None], 0)
      begin = jnp.broadcast_to(begin[:, None], end.shape)
      parts.append(_interval_part(q, [(anchor_k, anchor_v)], begin, end))
      seen += count * jnp.sum(valid[:, rows:], axis=1) * n_heads
    out = _merged(parts).astype(q.dtype)
    held = jnp.take(sizes[:: len(played)], played, axis=1)  # [B h]
    cache = self._store(cache, raw, keys, values, positions, held, rows)
    trace = self._trace(seen, n_heads, batch, ctx)
    return out.reshape(batch, -1, n_heads, dim), cache, trace

  def _select(self, local: Block, barred, count, passing: int):
    """Keys and values [E passing K H] of the best local tokens.

    Of the first `barred` tokens, [E], none is taken: the first host's that the
    anchor already holds. Lists are ascending, their `count`, [E], tokens last.
    """
    scores = COMPRESSORS[self.compressor](local)
    index = jnp.arange(scores.shape[1])
    allowed = (local.valid & (index >= barred[:, None]))[:, :, None]
    scores = jnp.where(allowed, scores.astype(jnp.float32), -jnp.inf)
    _, chosen = jax.lax.top_k(jnp.swapaxes(scores, 1, 2), passing)
    taken = jnp.arange(passing) < count[:, None, None]
    chosen = jnp.sort(jnp.where(taken, chosen, -1), axis=-1)
    take = jnp.swapaxes(jnp.maximum(chosen, 0), 1, 2)[..., None]
    return (
      jnp.take_along_axis(local.k, take, axis=1),
      jnp.take_along_axis(local.v, take, axis=1),
    )

  def _gathered(self, x, batch: int, ctx: Context):
    """Anchor pieces [E rows ...] of all hosts as [E anchor ...], in order."""
    x = self._gathered_blocks(x, batch, ctx)  # [B H rows ...]
    whole = x.reshape(batch, 1, -1, *x.shape[3:])
    size = jax.lax.axis_size(ctx.axes.seq)
    whole = jnp.repeat(whole, self.hosts // size, axis=1)
    return whole.reshape(-1, *whole.shape[2:])

  def _gathered_blocks(self, x, batch: int, ctx: Context):
    """[E n ...] of this device's hosts to [B H n ...] of all, in host order."""
    size = jax.lax.axis_size(ctx.axes.seq)
    x = x.reshape(batch, -1, *x.shape[1:])
    if size > 1:
      x = jax.lax.all_gather(x, ctx.axes.seq, axis=1, tiled=True)
    inverse = np.argsort(self._hosts_in_order(size).reshape(-1))
    # In zigzag order, devices hold hosts from both ends.
    return x if self.order == 'contiguous' else x[:, inverse]

  def _exchanged(self, k, v, batch: int, ctx: Context):
    """Blocks [E n K H] as [B H n K H] of all hosts; unread ones may be 0."""
    size = jax.lax.axis_size(ctx.axes.seq)
    if self.exchange == 'gather' or size == 1:
      return tuple(self._gathered_blocks(x, batch, ctx) for x in (k, v))
    x = jnp.concatenate([k, v], axis=-1)  # one message a hop
    x = x.reshape(batch, -1, *x.shape[1:])
    hosts = self._hosts_in_order(size)
    if (np.diff(hosts.reshape(-1)) == 1).all():
      x = _sent_forward(x, ctx.axes.seq, 1)
    else:  # zigzag: second halves follow all first halves, and run backwards
      first, second = jnp.split(x, 2, axis=1)
      first = jax.lax.all_gather(first, ctx.axes.seq, axis=1)
      second = _sent_forward(second, ctx.axes.seq, -1)
      x = jnp.concatenate([first, second], axis=2)
    x = x.reshape(batch, self.hosts, *x.shape[3:])
    x = x[:, np.argsort(hosts.reshape(-1))]
    return tuple(jnp.split(x, [k.shape[-1]], axis=-1))

  def _packed(self, x, index, batch: int):
    """[B H n ...] of all hosts to [E W ...], the tokens that `index` names."""
    row = jnp.repeat(jnp.arange(batch), index.shape[0] // batch)
    return x.reshape(batch, -1, *x.shape[3:])[row[:, None], index]

  def _store(self, cache, raw, keys, values, positions, held, rows):
    """Local keys alone, host by host in this device's order.

    Args:
      cache: this layer's.
      raw: unrotated keys [E rows+block K H].
      keys: the same, rotated.
      values: like them.
      positions: int32 [E rows+block].
      held: int32 [B h] tokens of each host that this device plays.
      rows: of the anchor.
    """
    batch, hosts = held.shape
    block = keys.shape[1] - rows
    slot = jnp.broadcast_to(jnp.arange(hosts * block), (batch, hosts * block))
    first = jnp.broadcast_to(jnp.arange(hosts) * block, held.shape)
    index = apb_blocks.follow(slot, held, first)
    index = jnp.minimum(index, hosts * block - 1)

    def local(x):
      x = x[:, rows:].reshape(batch, -1, *x.shape[2:])
      if hosts == 1:
        return x
      return jnp.take_along_axis(
        x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1
      )

    return cache.append(
      local(keys if cache.rotated else raw),
      local(values),
      local(positions),
      jnp.sum(held, axis=1, dtype=jnp.int32),
    )

  def _interval_parts(
    self, q, passed, anchor, local, more, start, stop, behind
  ):
    """Partials of each row's one interval, in one call or cut into several.

    Args:
      q: queries.
      passed: keys and values, the row's at the end, but for `behind` slots.
      anchor: keys and values.
      local: keys and values.
      more: int32 [E T] passing keys that a row sees.
      start: int32 [E T] of the rest, in [anchor | local].
      stop: int32 [E T].
      behind: int32 [E] slots of the anchor, which `passed` has room for.
    """
    own = [anchor, local]
    if self.density is not None:  # local keys are listed block by block
      own, width = [anchor], anchor[0].shape[1]
      start, stop = jnp.minimum(start, width), jnp.minimum(stop, width)
    before = passed[0].shape[1]
    groups = [(own, start, stop)]
    if self.overlap:
      end = jnp.full_like(more, before)
      groups.append(([passed], end - more, end))
    elif before:
      width = anchor[0].shape[1]
      here = jnp.arange(before) >= before - behind[:, None]
      ahead = tuple(
        jnp.where(
          here[:, :, None, None],
          jnp.pad(a, ((0, 0), (before - width, 0), (0, 0), (0, 0))),
          p,
        )
        for p, a in zip(passed, anchor, strict=True)
      )
      before -= width
      groups = [([ahead, *own[1:]], before + start - more, before + stop)]
    return [
      _interval_part(q, pieces, low, high)
      for pieces, low, high in groups
      if sum(keys.shape[1] for keys, _ in pieces)
    ]

  def _sparse_local(self, q, k, v, valid):
    """A partial over chosen blocks of the own block; keys seen, [E]."""
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    where = {
      'q_start': jnp.zeros(len(q), jnp.int32),
      'lengths': jnp.sum(valid, axis=1, dtype=jnp.int32),
    }
    chosen = xattention(q, k, density=self.density, **where)
    part = block_sparse(q, k, v, chosen.blocks, **where)
    return part, listed_keys(chosen.blocks, sliding_window=None, **where)

  def _trace(self, seen, n_heads, batch, ctx: Context):
    if not ctx.trace:
      return None
    keys = jnp.sum(seen.reshape(batch, -1), axis=1)
    own = dataclasses.replace(ctx, valid=ctx.valid & (ctx.source >= 0))
    shape = jnp.zeros((batch, 1, n_heads, 1))
    return Trace(keys=keys, pairs=dense_pairs(shape, own))


def _sent_forward(x, axis: str, way: int):
  """[B h ...] of each device as [B P h ...]; zeros for those not before it.

  Args:
    x: this device's.
    axis: of the mesh.
    way: 1: device i comes before i + 1; -1: after it.
  """
  size = jax.lax.axis_size(axis)
  hops = [
    [(i, i + way * k) for i in range(size) if 0 <= i + way * k < size]
    for k in range(1, size)
  ]
  # All are issued before one is read: none waits for another.
  pieces = jnp.stack([x, *(jax.lax.ppermute(x, axis, h) for h in hops)], axis=1)
  hop = way * (jax.lax.axis_index(axis) - jnp.arange(size)) % size
  return pieces[:, hop]


def _padded_with_last(x, valid):
  """[E b ...] with its last valid token in place of padding.

  Compressors take maxima over neighbours: those of a block's last token then
  are what they are where the block ends with the array.
  """
  last = jnp.maximum(jnp.sum(valid, axis=1) - 1, 0)[:, None]
  shape = (1,) * (x.ndim - 2)
  last = jnp.take_along_axis(x, last.reshape(-1, 1, *shape), axis=1)
  return jnp.where(valid.reshape(*valid.shape, *shape), x, last)


def _interval_part(q, pieces, start, stop) -> Partial:
  """`passing_block` over pieces (keys, values) [E n K H] laid end to end."""
  k, v = (
    jnp.swapaxes(jnp.concatenate(p, axis=1), 1, 2)
    for p in zip(*pieces, strict=True)
  )
  return passing_block(q, k, v, start.astype(jnp.int32), stop.astype(jnp.int32))


def _behind(rows: int, part: Partial) -> Partial:
  """A partial of the local rows as one of [anchor rows | local rows]."""
  ahead = ((0, 0), (rows, 0), (0, 0))
  return Partial(
    jnp.pad(part.out, (*ahead, (0, 0))),
    jnp.pad(part.lse, ahead, constant_values=-jnp.inf),
  )


def _merged(parts: list[Partial]):
  """Partials over disjoint keys as one output."""
  if len(parts) == 1:
    return parts[0].out
  wide = [Partial(p.out.astype(jnp.float32), p.lse) for p in parts]
  return functools.reduce(merge, wide).out


METHOD = Method('apb', ApbPrefill(), caches.CONFIGS['dense'], DenseDecode())
