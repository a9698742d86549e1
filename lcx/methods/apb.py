"""APB: every host passes only its compressed, important keys on.

Huang et al., "APB: accelerating distributed long-context inference by passing
compressed context blocks across GPUs", arXiv:2502.12085, Algorithm 1. The
document is cut over hosts. Each host holds [anchor | local]: the anchor is the
system prompt, the question and the document's start; the local block is its
piece. A layer does:

  1. score the local keys, keep the best `passing` a kv head (compressor),
  2. all-gather them,
  3. attend: anchor rows causally to the anchor; local rows to the passing
     blocks of earlier hosts, the anchor, and causally to their own block,
  4. drop anchor and passing keys; the cache holds local keys alone.

The question then runs through the decode path, exactly, over all hosts' caches.

With the gathered blocks rolled so that earlier hosts' stand last, what a row
sees is one interval of [passing | anchor | local]. Bytes that a host receives a
layer: (P - 1) * 2 * B * passing * K * H * e for P hosts, e bytes an element;
with a shared anchor (P - 1) / P * 2 * B * anchor * K * H * e more.

Differences from the public code: the first host knows the question, too (it
holds the anchor for its compressor's sake, and its local rows do not see it);
what the first host may pass on are exactly the document tokens that the anchor
lacks; hosts are virtual, so any number of them runs on any number of devices.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

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
from lcx.select.compressors import COMPRESSORS, Block

Order = Literal['contiguous', 'zigzag']
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
  """

  hosts: int = 4
  anchor: int | None = None
  passing: int | None = None
  compressor: str = 'query'
  query_in_anchor: bool = True
  shared_anchor: bool = False
  order: Order = 'contiguous'

  def at_full_budget(self, length: int) -> 'ApbPrefill':
    del length
    return dataclasses.replace(
      self, passing=EVERY_TOKEN, query_in_anchor=False, compressor='random'
    )

  def check(self, config, capacity: int) -> None:
    if self.hosts < 1:
      raise ValueError(f'hosts={self.hosts} must be at least 1')
    if self.order not in get_args(Order):
      raise ValueError(f'order={self.order!r} must be one of {get_args(Order)}')
    if self.compressor not in COMPRESSORS:
      raise ValueError(
        f'compressor={self.compressor!r} must be one of {sorted(COMPRESSORS)}'
      )
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
    q = by_host(rope(q, ctx.positions))
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

    pieces_k = [anchor_k, keys[:, rows:]]
    pieces_v = [anchor_v, values[:, rows:]]
    first = jnp.zeros_like(host)
    if passing:
      local = Block(
        q=q[:, rows:],
        k=keys[:, rows:],
        v=values[:, rows:],
        question=question,
        asked=asked,
        positions=positions[:, rows:],
        valid=valid[:, rows:],
        layer=ctx.layer,
      )
      passed = self._select(local, host, copied, passing)
      passed_k, passed_v = (
        self._roll(self._gathered_blocks(x, batch, ctx), host, batch, passing)
        for x in passed
      )
      pieces_k = [passed_k, *pieces_k]
      pieces_v = [passed_v, *pieces_v]
      # The first host's list begins with the keys that the anchor has, too.
      first = (self.hosts - host) * passing + jnp.maximum(
        passing - (block - copied), 0
      )
    start, stop = self._intervals(host, first, rows, anchor, block, passing)
    out, _ = passing_block(
      q,
      *(
        jnp.swapaxes(jnp.concatenate(p, 1), 1, 2) for p in (pieces_k, pieces_v)
      ),
      start,
      stop,
    )
    cache = self._store(cache, raw, keys, values, positions, valid, rows, batch)
    trace = self._trace(start, stop, valid, rows, n_heads, batch, ctx)
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

  def _trace(self, start, stop, valid, rows, n_heads, batch, ctx: Context):
    if not ctx.trace:
      return None
    seen = jnp.where(valid, stop - start, 0)[:, rows:]
    keys = jnp.sum(seen.reshape(batch, -1), axis=1, dtype=jnp.float32)
    own = dataclasses.replace(ctx, valid=ctx.valid & (ctx.source >= 0))
    shape = jnp.zeros((batch, 1, n_heads, 1))
    return Trace(keys=keys * n_heads, pairs=dense_pairs(shape, own))


METHOD = Method('apb', ApbPrefill(), caches.CONFIGS['dense'], DenseDecode())
