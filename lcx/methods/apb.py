"""APB: every host passes only its compressed, important keys on.

Huang et al., "APB: accelerating distributed long-context inference by passing
compressed context blocks across GPUs", arXiv:2502.12085, Algorithm 1. The
document is cut over hosts. Each host holds [anchor | local]: the anchor is the
system prompt, the question and the document's start; the local block is its
piece. A layer does:

  1. score the local keys, keep the best `passing` a kv head (compressor),
  2. send them to the later hosts,
  3. attend: anchor rows causally to the anchor; local rows to the passing
     blocks of earlier hosts, the anchor, and causally to their own block,
  4. drop anchor and passing keys; the cache holds local keys alone.

The question then runs through the decode path, exactly, over all hosts' caches.

With the passing blocks rolled so that earlier hosts' stand last, what a row
sees is one interval of [passing | anchor | local].

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
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse import block_sparse
from kernels_pallas.partial import Partial, merge
from kernels_pallas.passing_block import passing_block
from lcx import cache as caches
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

Order = Literal['contiguous', 'zigzag']
Exchange = Literal['gather', 'forward']
EVERY_TOKEN = -1  # passing: all of a block


@dataclasses.dataclass(frozen=True)
class ApbPrefill(Prefill):
  """Anchor, compressor, passing blocks, local attention.

  Attributes:
    hosts: pieces of the document; a multiple of the mesh's seq axis.
    anchor: tokens of the anchor, the question's included; None: a quarter of
      a block (table 8 of the paper); 0 is legal, too.
    passing: keys that a host passes on, a kv head; None: an eighth of a block;
      EVERY_TOKEN: all (exact, where the anchor holds no question).
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
    return measured('prefill', 'apb', config, devices)

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
    if self.order not in get_args(Order):
      raise ValueError(f'order={self.order!r} must be one of {get_args(Order)}')
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
    whole = 128 * self.hosts
    self.sizes(-(-capacity // whole) * whole)
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
    return self.hosts

  def sizes(self, room: int) -> tuple[int, int, int, int]:
    """(block, anchor, anchor rows a host, passing) for a padded prompt.

    Raises:
      ValueError: the passing length exceeds what a host has left to pass.
    """
    block = room // self.hosts
    if self.hosts == 1:  # nobody to pass to, nobody who lacks the start
      return block, 0, 0, 0
    anchor = block // 4 if self.anchor is None else self.anchor
    anchor = min(anchor, block)
    anchor -= anchor % self.hosts if self.shared_anchor else 0
    rows = anchor // self.hosts if self.shared_anchor else anchor
    passing = block // 8 if self.passing is None else self.passing
    if passing == EVERY_TOKEN:
      passing = block
    elif self.passing is None:
      passing = min(passing, block - anchor)
    elif passing > block - anchor:
      raise ValueError(
        f'passing={passing} exceeds the {block - anchor} tokens that a host '
        f'of {block} with an anchor of {anchor} has to pass: shorten it'
      )
    return block, anchor, rows, passing

  def _hosts_in_order(self, shards: int) -> np.ndarray:
    """[shards H/shards] which hosts a device plays."""
    hosts = np.arange(self.hosts)
    if self.order == 'contiguous' or self.hosts == shards:
      return hosts.reshape(shards, -1)
    if self.hosts % (2 * shards):
      raise ValueError(
        f"order='zigzag' needs hosts={self.hosts} to be a multiple of twice "
        f'the mesh axis seq={shards}'
      )
    chunks = hosts.reshape(2 * shards, -1)
    return np.concatenate([chunks[:shards], chunks[: shards - 1 : -1]], axis=1)

  def layout(
    self, prompt: Prompt, question: int | None, room: int, shards: int
  ) -> Layout:
    document = prompt.whole(None)
    if self.hosts > 1 and self.compressor == 'query' and question is None:
      raise ValueError(
        "compressor='query' scores keys by the question, but the prompt is "
        "read without one: take compressor='snapkv', or the protocol 'whole'"
      )
    block, anchor, rows, _ = self.sizes(room)
    index = np.arange(room).reshape(self.hosts, block)
    local = np.where(index < len(document), index, -1)
    copies = self._anchor(prompt, question, anchor)
    whole = np.concatenate([document, prompt.question(question)])
    # Room for the anchor where the document is shorter than it.
    copies = np.where(copies < len(whole), copies, -1)
    if self.shared_anchor:
      ahead = copies.reshape(self.hosts, rows)
      places = np.arange(anchor).reshape(self.hosts, rows)
    else:
      ahead = np.tile(copies, (self.hosts, 1))
      places = np.tile(np.arange(anchor), (self.hosts, 1))
    token = np.concatenate([ahead, local], axis=1)
    source = np.concatenate([np.where(ahead < 0, -1, -2 - ahead), local], 1)
    positions = np.concatenate([places, index], axis=1)
    order = self._hosts_in_order(shards).reshape(-1)

    def flat(x, dtype=np.int32):
      return x[order].reshape(-1).astype(dtype)

    return Layout(
      np.where(flat(token) < 0, 0, whole[np.maximum(flat(token), 0)]).astype(
        np.int32
      ),
      flat(positions),
      flat(source),
      flat(token >= 0, bool),
    )

  def _anchor(self, prompt: Prompt, question, anchor: int) -> np.ndarray:
    """Indices [anchor] into document + question: system, question, start."""
    document = len(prompt.system) + len(prompt.context)
    asked = len(prompt.question(question)) if self.query_in_anchor else 0
    asked = min(asked, anchor // 2)  # of a long question, its last tokens
    end = document + len(prompt.question(question))
    system = min(len(prompt.system), anchor - asked)
    return np.concatenate(
      [
        np.arange(system),
        np.arange(end - asked, end),
        np.arange(system, anchor - asked),
      ]
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
    copied = anchor - jnp.sum(asked, axis=1)  # document tokens in the anchor

    if self.gap:
      copied = jnp.full_like(copied, anchor)

    def pass_on():
      local = Block(
        q=q[:, rows:],
        k=keys[:, rows:],
        v=values[:, rows:],
        unrotated_q=raw_q[:, rows:],
        unrotated_k=raw[:, rows:],
        question=question,
        asked=asked,
        positions=positions[:, rows:],
        valid=valid[:, rows:],
        layer=ctx.layer,
        learned=ctx.learned,
        model_axis=ctx.axes.model,
      )
      passed = self._select(local, host, copied, passing)
      return tuple(
        self._roll(x, host, batch, passing)
        for x in self._exchanged(*passed, batch, ctx)
      )

    before = self.hosts * passing
    passed = tuple(x[:, :0] for x in (keys, values))
    # The first host's list begins with the keys that the anchor has, too.
    first = (self.hosts - host) * passing
    first = first + jnp.maximum(passing - (block - copied), 0)
    if passing and self.every > 1:
      now = ctx.layer % self.every == 0
      like = jax.eval_shape(pass_on)
      passed = jax.lax.cond(
        now, pass_on, lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in like)
      )
      first = jnp.where(now, first, before)
    elif passing:
      passed = pass_on()
    start, stop = self._intervals(host, first, rows, anchor, block, passing)
    spans = Spans(before, before + anchor, before + anchor + block)
    parts = self._interval_parts(
      q,
      passed,
      (anchor_k, anchor_v),
      (keys[:, rows:], values[:, rows:]),
      start,
      stop,
      spans,
    )
    seen = jnp.where(valid, stop - start, 0)[:, rows:].astype(jnp.float32)
    seen = jnp.sum(seen, axis=1) * n_heads
    if self.density is not None:
      part, keys_seen = self._sparse_local(
        q[:, rows:], keys[:, rows:], values[:, rows:], valid[:, rows:]
      )
      parts.append(_behind(rows, part))
      own = stop - jnp.maximum(start, spans.anchor)
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
    cache = self._store(cache, raw, keys, values, positions, valid, rows, batch)
    trace = self._trace(seen, n_heads, batch, ctx)
    return out.reshape(batch, -1, n_heads, dim), cache, trace

  def _select(self, local: Block, host, copied, passing: int):
    """Keys and values [E passing K H] of the best local tokens.

    Lists are ascending, with what may not be passed (padding, and the tokens of
    the first host that the anchor already holds) in front.
    """
    scores = COMPRESSORS[self.compressor](local)
    index = jnp.arange(scores.shape[1])
    barred = (host[:, None] == 0) & (index < copied[:, None])
    allowed = (local.valid & ~barred)[:, :, None]
    scores = jnp.where(allowed, scores.astype(jnp.float32), -jnp.inf)
    best, chosen = jax.lax.top_k(jnp.swapaxes(scores, 1, 2), passing)
    chosen = jnp.sort(jnp.where(best > -jnp.inf, chosen, -1), axis=-1)
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

  def _roll(self, x, host, batch: int, passing: int):
    """[B H n ...] to [E H n ...]: earlier hosts' blocks stand last."""
    owner = (jnp.arange(self.hosts) + host[:, None]) % self.hosts
    row = jnp.repeat(jnp.arange(batch), host.shape[0] // batch)
    x = x[row[:, None], owner]
    return x.reshape(x.shape[0], self.hosts * passing, *x.shape[3:])

  def _intervals(self, host, first, rows, anchor, block, passing):
    """(start, stop) int32 [E rows+block] of what each row sees."""
    before = self.hosts * passing
    base = host * rows if self.shared_anchor else jnp.zeros_like(host)
    place = base[:, None] + jnp.arange(rows)
    anchor_start = jnp.full_like(place, before)
    anchor_stop = before + place + 1
    local_start = jnp.where(host == 0, before + anchor, first)
    local_start = jnp.where((passing == 0) & (host > 0), before, local_start)
    local_start = jnp.broadcast_to(local_start[:, None], (len(host), block))
    local_stop = before + anchor + 1 + jnp.arange(block)
    local_stop = jnp.broadcast_to(local_stop, (len(host), block))
    return (
      jnp.concatenate([anchor_start, local_start], 1).astype(jnp.int32),
      jnp.concatenate([anchor_stop, local_stop], 1).astype(jnp.int32),
    )

  def _store(self, cache, raw, keys, values, positions, valid, rows, batch):
    """Local keys alone, host by host in this device's order."""
    kept = keys if cache.rotated else raw

    def local(x):
      x = x[:, rows:]
      return x.reshape(batch, -1, *x.shape[2:])

    count = jnp.sum(local(valid), axis=1, dtype=jnp.int32)
    return cache.append(local(kept), local(values), local(positions), count)

  def _interval_parts(self, q, passed, anchor, local, start, stop, spans):
    """Partials of each row's one interval, in one call or cut into several."""
    groups = [(0, [passed, anchor, local], spans.local)]
    if self.overlap and self.density is not None:
      groups = [
        (spans.passed, [anchor], spans.anchor),
        (0, [passed], spans.passed),
      ]
    elif self.overlap:
      groups = [
        (spans.passed, [anchor, local], spans.local),
        (0, [passed], spans.passed),
      ]
    elif self.density is not None:
      groups = [(0, [passed, anchor], spans.anchor)]
    return [
      _interval_part(
        q,
        pieces,
        jnp.clip(start, low, high) - low,
        jnp.clip(stop, low, high) - low,
      )
      for low, pieces, high in groups
      if high > low
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


class Spans(NamedTuple):
  """Where passing, anchor and local keys end in a row's list of keys."""

  passed: int
  anchor: int
  local: int


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
