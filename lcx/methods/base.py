"""What a method is: a prefill, a cache and a decode part, each a dataclass.

A part is a frozen dataclass of numbers with pure functions. The engine calls
`attend` inside one `shard_map` over the mesh axes ("data", "seq", "model"), so
every array below is the shard's own piece, and collectives may name an axis of
`Context.axes`. Queries, keys and values arrive after projection, bias and QK
norm, but before rotation; `rope(x, positions)` rotates.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from kernels_pallas.append_token import Joint

Rope = Callable[[Float[Array, 'B T h H'], Int32[Array, 'B T']], Array]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One request: the tokens before the context, the context, the questions.

  Attributes:
    system: int32 [a] tokens before the context (template, instructions).
    context: int32 [c] the long part.
    questions: int32 arrays; each holds what follows the context up to the place
      where the answer starts (question, end of template, answer prefix).
  """

  system: np.ndarray
  context: np.ndarray
  questions: tuple[np.ndarray, ...] = ()

  def whole(self, question: int | None) -> np.ndarray:
    """All tokens with one question, or with none."""
    parts = [self.system, self.context]
    if question is not None:
      parts.append(self.questions[question])
    return np.concatenate(parts).astype(np.int32)

  def question(self, index: int | None) -> np.ndarray:
    """The question's tokens, empty where there is none."""
    if index is None:
      return np.zeros((0,), np.int32)
    return np.asarray(self.questions[index], np.int32)


class Layout(NamedTuple):
  """The tokens of one row in the order in which a prefill processes them.

  Attributes:
    tokens: int32 [T].
    positions: int32 [T] position ids, as rotation sees them.
    source: int32 [T] index of the token in the prompt; -1: padding; -2 - i: a
      copy of token i (in an anchor), whose output nobody reads. Tokens of the
      prompt after the last one laid out go through the decode path.
    valid: bool [T] False for padding.
  """

  tokens: np.ndarray
  positions: np.ndarray
  source: np.ndarray
  valid: np.ndarray


def plain_layout(tokens: np.ndarray, room: int) -> Layout:
  """The prompt in its own order, padded to `room`, positions counting on."""
  index = np.arange(room, dtype=np.int32)
  valid = index < len(tokens)
  return Layout(
    np.pad(np.asarray(tokens, np.int32), (0, room - len(tokens))),
    index,
    np.where(valid, index, -1).astype(np.int32),
    valid,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Axes:
  """Names of the mesh axes; collectives over an axis of size 1 are free."""

  data: str = dataclasses.field(default='data', metadata={'static': True})
  seq: str = dataclasses.field(default='seq', metadata={'static': True})
  model: str = dataclasses.field(default='model', metadata={'static': True})


class Tail(NamedTuple):
  """Where a row's next tokens go, on a mesh that shards the sequence.

  They fill the page that the prompt's last token lies in, so that pages are the
  same as on one device; what comes after it goes to the last shard, or to all
  in turn.

  Attributes:
    shard: int32 [B] the seq shard that holds that page.
    until: int32 [B] position after the page's last slot.
    turn: int32 [B] tokens of a page, which the shards after `shard` take by
      turns; None: the last shard takes all.
  """

  shard: Int32[Array, 'B']
  until: Int32[Array, 'B']
  turn: Int32[Array, 'B'] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What `attend` and `observe` know beside queries, keys and values.

  Attributes:
    positions: int32 [B T] of the tokens of this call, this shard's piece.
    valid: bool [B T] False for padding; a suffix of each row in decode.
    source: int32 [B T] as in `Layout`; in decode, the positions.
    lengths: int32 [B] tokens of the whole row (all shards), this call included,
      padding excluded.
    layer: int32 [] index of the layer, traced.
    key: PRNG key of this layer and step.
    tail: where new tokens go; None in prefill.
    learned: this layer's arrays of `Prefill.learned`; () where there are none.
    joint: queries and keys, rotated, and values of one decoded token, where a
      kernel makes them so; what of them and of q, k and v is not used is not
      computed.
    n_layers: static.
    room: static; padded tokens of the prompt over all shards; 0 in decode.
    sliding_window: static; the model's own window, or None. It intersects
      whatever a method selects.
    trace: static; True asks for a `Trace`.
    axes: names of the mesh axes.
  """

  positions: Int32[Array, 'B T']
  valid: Bool[Array, 'B T']
  source: Int32[Array, 'B T']
  lengths: Int32[Array, 'B']
  layer: Int32[Array, '']
  key: PRNGKeyArray
  tail: Tail | None = None
  learned: Any = ()
  joint: Joint | None = None
  n_layers: int = dataclasses.field(default=1, metadata={'static': True})
  room: int = dataclasses.field(default=0, metadata={'static': True})
  sliding_window: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  trace: bool = dataclasses.field(default=False, metadata={'static': True})
  axes: Axes = dataclasses.field(
    default_factory=Axes, metadata={'static': True}
  )

  @property
  def count(self) -> Int32[Array, 'B']:
    """Valid tokens of this call, a row, on this shard."""
    return jnp.sum(self.valid, axis=1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
  """What one attention call did, for audits and for "keys attended".

  Attributes:
    keys: float32 [B] keys seen, summed over this shard's valid queries and
      query heads; the engine sums over shards.
    pairs: float32 [B] what dense causal attention would have seen.
    ids: what was selected (method-specific), or None.
    scores: their scores, or None.
    mass: float32 [B] captured softmax mass summed like `keys`, or None.
    counters: named float32 [B] sums (cache hits, fallbacks), or empty. Names
      that end in `_mass` are of shares, summed like `mass`.
  """

  keys: Float[Array, 'B']
  pairs: Float[Array, 'B']
  ids: Any = None
  scores: Any = None
  mass: Any = None
  counters: dict[str, Any] = dataclasses.field(default_factory=dict)


class Part:
  """What prefill and decode parts share.

  Attributes:
    needs: capabilities that the cache or the other part must provide.
    provides: capabilities that this part adds.
  """

  needs: frozenset[str] = frozenset()
  provides: frozenset[str] = frozenset()

  def at_full_budget(self, length: int) -> 'Part | None':
    """This part with budgets that reach `length` tokens; None: never exact."""
    del length
    return self

  def at_tight_budget(self, length: int) -> 'Part':
    """This part with budgets so far below `length` that it must leave out."""
    del length
    return self

  def check(self, config: Any, capacity: int) -> None:
    """Raises ValueError where the model or the capacity cannot be served."""
    del config, capacity

  def misfit(self, cache: Any) -> str | None:
    """Why this part's numbers and the cache config's clash; None: they fit."""
    del cache
    return None


class Prefill(Part):
  """Attention over the prompt. Subclass as a frozen dataclass."""

  def pieces(self, shards: int) -> int:
    """Into how many equal pieces the padded prompt is cut.

    Args:
      shards: size of the mesh's `seq` axis, which must divide the result.
    """
    return shards

  def on(self, shards: int) -> 'Prefill':
    """What does the same over so many sequence shards, by less."""
    del shards
    return self

  def alone_below(self, config: Any, devices: str) -> int:
    """Prompts of fewer tokens are better read densely by one device.

    Args:
      config: the model's.
      devices: those that read one prompt: of one its kind, of several along
        the sequence also their number, as in '4 x NVIDIA H100 80GB HBM3'.
    """
    del config, devices
    return 0

  def learned(self, config: Any) -> tuple | None:
    """Trained arrays that `attend` finds in its context: a pytree a layer."""
    del config
    return None

  def learned_specs(self, axes: Axes) -> Any:
    """PartitionSpecs of one layer's `learned`."""
    del axes
    return ()

  def layout(
    self, prompt: Prompt, question: int | None, room: int, shards: int
  ) -> Layout:
    """Orders one row's tokens.

    Args:
      prompt: the request.
      question: index of the question that is read with it; None: none.
      room: tokens all rows are padded to, a multiple of 128 * `pieces`.
      shards: size of the mesh's `seq` axis; the layout is cut into as many
        equal parts.

    Returns:
      A layout of one length for every prompt of at most `room` tokens.
    """
    del shards
    return plain_layout(prompt.whole(question), room)

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    """Attends and fills the cache.

    Args:
      q: [B T N H] unrotated.
      k: [B T K H] unrotated.
      v: [B T K H].
      rope: rotation.
      cache: this layer's cache.
      ctx: the context.

    Returns:
      (out [B T N H], cache, Trace or None).
    """
    raise NotImplementedError

  def finish(self, cache):
    """Called once a layer after its attention: cuts, quantises, offloads."""
    return cache


class Decode(Part):
  """Attention of few queries over the cache. Subclass as frozen dataclass."""

  max_queries: int = 16

  def at_layer(self, layer: int) -> 'Decode':
    """The part that serves a layer, on the same cache and state."""
    del layer
    return self

  def init_state(self, shape) -> Any:
    """A pytree of this layer's state (leaves lead with B); () for none."""
    del shape
    return ()

  def state_specs(self, axes: Axes) -> Any:
    """PartitionSpecs of the state, a prefix of its tree."""
    return jax.sharding.PartitionSpec(axes.data)

  def observe(self, q, k, v, rope: Rope, state, ctx: Context) -> Any:
    """Gathers, during prefill, what selection needs later."""
    del q, k, v, rope, ctx
    return state

  def start(self, cache, state) -> Any:
    """Called once a layer when the prompt is in the cache; may run on hosts."""
    del cache
    return state

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    """Appends the new keys and attends over cache and new keys.

    Returns:
      (out [B T N H], cache, state, Trace or None).
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Method:
  """A composition: which keys are seen in prefill, kept, and seen in decode.

  Attributes:
    name: the preset's name, or 'prefill+cache+decode'.
    prefill: a `Prefill`.
    cache: a cache config of `lcx.cache`.
    decode: a `Decode`.
  """

  name: str
  prefill: Prefill
  cache: Any
  decode: Decode

  def at_full_budget(self, length: int) -> 'Method | None':
    """The same method with budgets that make it exact up to `length`."""
    parts: list[Any] = [
      p.at_full_budget(length) for p in (self.prefill, self.cache, self.decode)
    ]
    if any(p is None for p in parts):
      return None
    return Method(self.name, *parts)

  def at_tight_budget(self, length: int) -> 'Method':
    """The same method with budgets far below `length`, where it has any."""
    return dataclasses.replace(
      self,
      prefill=self.prefill.at_tight_budget(length),
      decode=self.decode.at_tight_budget(length),
    )
