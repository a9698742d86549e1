"""Prefill, question, decode, rewind: one method over a batch of rows."""

import dataclasses
import functools
import time
import weakref
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lcx import sharding
from lcx.cache import CacheShape, HostCache, Shards, Status
from lcx.cache.base import ROWS
from lcx.cache.host_calls import host_fault
from lcx.engine import steps
from lcx.engine.generation import (
  Generation,
  counters,
  density,
  prefill_masses,
)
from lcx.engine.meter import Meter
from lcx.engine.placement import NewKeys, Placement
from lcx.engine.plan import Plan, Residual
from lcx.engine.readings import Reading, Readings
from lcx.engine.sampling import Sampling, make_sampling
from lcx.methods.base import Layout, Method, Prompt, Tail
from lcx.models.config import ModelConfig
from lcx.models.transformer import Weights, weight_specs
from lcx.sharding import to_host

Protocol = Literal['whole', 'context_first']
DECODE_ROOM = 64  # tokens chosen a dispatch, at most


@dataclasses.dataclass
class Session:
  """Rows whose prompt has been read; its caches are donated at every call.

  Attributes:
    caches: one a layer.
    states: one a layer.
    lengths: int32 [B] tokens in the cache.
    scores: float32 [B V] logits of the next token.
    tail: where new tokens go.
    used: what each cache holds, at a `mark`; () in a live session.
    prompt_lengths: int [B] of what the prefill read.
    sums: what attention did since the prefill, by name, float [B].
    prefill_sums: the same of the prefill.
    shared_ms: time of a shared prefill, which was not spent here.
    steps: that decode ran, those after all rows had ended included.
  """

  caches: tuple
  states: tuple
  lengths: jax.Array
  scores: jax.Array
  tail: Tail
  used: tuple
  prompt_lengths: np.ndarray
  sums: dict[str, np.ndarray]
  prefill_sums: dict[str, np.ndarray]
  shared_ms: float = 0.0
  steps: int = 0


class Engine:
  """Runs one method on one model; holds programs, never requests.

  Args:
    config: the model.
    weights: its arrays; spread over the mesh here.
    method: what attends.
    capacity: tokens that a row may reach, answer included.
    batch: rows.
    mesh: with axes ("data", "seq", "model"); None: one device.
    room: of `capacity`, tokens that come after the prompt.
    new_keys: which sequence shards these live on: 'last', or all by turns.
    residual: whether prefill's activations are spread over "model", too.
    trace: sums keys attended; off, results say 0.
    readings: dense prefills shared with other engines of the same weights.

  Raises:
    ValueError: a part refuses the model or the capacity, or the mesh does not
      divide batch, heads or pages.
  """

  def __init__(
    self,
    config: ModelConfig,
    weights: Weights,
    method: Method,
    *,
    capacity: int,
    batch: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    room: int = 256,
    new_keys: NewKeys = 'last',
    residual: Residual = 'whole',
    trace: bool = True,
    readings: Readings | None = None,
  ):
    mesh = mesh if mesh is not None else sharding.make_mesh()
    if batch % mesh.shape['data']:
      raise ValueError(
        f'mesh axis data={mesh.shape["data"]} must divide {batch=}'
      )
    for part in (method.prefill, method.decode):
      part.check(config, capacity)
    method.cache.check(config, capacity, batch, method.decode)
    method.prefill.pieces(mesh.shape['seq'])  # refuses what does not divide
    prefill = method.prefill.on(mesh.shape['seq'])
    method = dataclasses.replace(method, prefill=prefill)
    self.config, self.method, self.mesh = config, method, mesh
    self.batch, self.capacity = batch, capacity
    self.placement = Placement(
      method, mesh.shape['seq'], capacity, room, new_keys
    )
    self.plan = Plan(config, method, mesh, trace, residual)
    specs = weight_specs(config, mesh)
    where = sharding.fitted(mesh, specs, weights)
    self.weights = sharding.place(weights, where)
    self.learned: tuple = ((),) * config.n_layers
    learned = method.prefill.learned(config)
    if learned is not None:
      where = sharding.named(mesh, self.plan.learned_specs())
      self.learned = tuple(sharding.place(x, where) for x in learned)
    self.compilations, self.compile_s = 0, 0.0
    self._readings = readings
    self._programs: dict[Any, Any] = {}

  # Programs.

  def _call(self, name: str, function, *args, donate=(), **static):
    """Calls a program, compiled ahead so that its time is known apart."""
    # Of every array in every call: the device waits meanwhile.
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple((x.shape, x.dtype) for x in leaves)
    key = (name, shapes, tree, tuple(sorted(static.items())))
    if key not in self._programs:
      # Else a compilation, whose time is taken out, hides the device's.
      jax.block_until_ready(args)
      start = time.perf_counter()
      jitted = jax.jit(
        functools.partial(function, plan=self.plan, **static),
        donate_argnums=donate,
      )
      self._programs[key] = jitted.lower(*args).compile()
      self.compile_s += time.perf_counter() - start
      self.compilations += 1
    return self._programs[key](*args)

  def _rows(self, x, *spec):
    """An array with leading rows, placed on the mesh."""
    spec = jax.sharding.PartitionSpec('data', *spec)
    return sharding.place(x, jax.sharding.NamedSharding(self.mesh, spec))

  def _scalar(self, value: int):
    return sharding.place(
      np.int32(value),
      jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()),
    )

  def _empty(self) -> tuple[tuple, tuple]:
    """Caches and states of all layers, made where they live."""
    mesh = self.mesh.shape
    shape = CacheShape(
      batch=self.batch,
      n_kv_heads=self.config.n_kv_heads,
      head_dim=self.config.head_dim,
      capacity=self.placement.cache_capacity(),
      dtype=self.config.dtype,
      shards=Shards(mesh['data'], mesh['seq'], mesh['model']),
    )

    layers = range(self.config.n_layers)

    def make(*, plan):
      caches = tuple(
        plan.method.cache.init(dataclasses.replace(shape, layer=i))
        for i in layers
      )
      states = tuple(plan.method.decode.init_state(shape) for _ in layers)
      return jax.lax.with_sharding_constraint((caches, states), places)

    specs = (self.plan.cache_specs(), self.plan.state_specs())
    one = sharding.named(self.mesh, specs)
    places = tuple((x,) * self.config.n_layers for x in one)
    return self._call('empty', make)

  # Requests.

  def prefill(
    self, prompts: list[Prompt], question: int | None = None
  ) -> Session:
    """Reads prompts, whole with one question each, or their contexts alone.

    Args:
      prompts: 1 to `batch`; rows without one repeat the last.
      question: index of the question to read with the context; None: none.

    Raises:
      ValueError: a prompt that does not fit into the capacity.
    """
    if not 1 <= len(prompts) <= self.batch:
      raise ValueError(f'{len(prompts)} prompts do not fit {self.batch} rows')
    prompts = prompts + prompts[-1:] * (self.batch - len(prompts))
    wholes = [p.whole(question) for p in prompts]
    longest = max(len(w) for w in wholes)
    if longest > self.capacity:
      raise ValueError(
        f'a prompt of {longest} tokens exceeds the cache of {self.capacity}: '
        'raise the capacity or shorten the context'
      )
    shards, part = self.mesh.shape['seq'], self.method.prefill
    room = self.placement.padded(longest)
    rows = [part.layout(p, question, room, shards) for p in prompts]
    tokens, positions, source, valid = (
      np.stack([getattr(r, f) for r in rows]) for f in Layout._fields
    )
    read = np.max(source, axis=1) + 1
    last = np.argmax(source == read[:, None] - 1, axis=1).astype(np.int32)
    tail = jax.tree.map(self._rows, self.placement.tail(source, last, read))
    lengths = self._rows(read.astype(np.int32))
    positions = self._rows(positions, 'seq')
    source = self._rows(source, 'seq')
    valid = self._rows(valid, 'seq')
    found = self._read(tokens, (positions, source, valid, lengths), last, room)
    session = Session(
      found.filled[0],
      found.filled[1],
      lengths,
      found.scores,
      tail,
      (),
      read,
      {},  # decode may count other things
      found.sums,
      found.shared_ms,
    )
    for cache in session.caches:
      if isinstance(cache, HostCache):  # its memory is not the arrays'
        weakref.finalize(session, cache.owned())
    rest = [w[n:] for w, n in zip(wholes, read, strict=True)]
    if any(len(r) for r in rest):
      self.extend(session, rest)
    return session

  def _read(self, tokens, places, last, room: int) -> Reading:
    """All layers over the prompt; a shared dense prefill is not done again."""
    shared = self._readings
    if shared is not None and not shared.fits(self.plan, tokens.shape):
      shared = None
    key = (self.plan.residual, self.mesh, tokens.tobytes(), tokens.shape)
    known = shared.get(key) if shared is not None else None
    caches, states = map(list, self._empty())
    start, compiled = time.perf_counter(), self.compile_s
    inputs, sums, x = [], [], None
    if known is None:
      tokens = self._rows(tokens, 'seq')
      x = self._call('embed', steps.embed_tokens, self.weights.embed, tokens)
    for i, layer in enumerate(self.weights.layers):
      rest = (*places, self._scalar(i), self._scalar(0))
      if known is not None:
        caches[i], states[i] = self._call(
          'fill',
          steps.fill_layer,
          layer,
          known.inputs[i],
          caches[i],
          states[i],
          *rest,
          donate=(2, 3),
          room=room,
        )
      else:
        if shared is not None:
          inputs.append(x)
        x, caches[i], states[i], more = self._call(
          'prefill' if shared is None else 'prefill kept',
          steps.prefill_layer,
          layer,
          x,
          caches[i],
          states[i],
          *rest,
          self.learned[i],
          donate=(1, 2, 3) if shared is None else (2, 3),
          room=room,
        )
        sums.append(more)
      # Here, so that an index is built in the host while later layers are read.
      states[i] = self._call('start', steps.start_layer, caches[i], states[i])
    filled = tuple(caches), tuple(states)
    if known is not None:
      return dataclasses.replace(
        known, filled=filled, scores=jnp.copy(known.scores)
      )
    scores = self._call(
      'logits', steps.last_logits, self.weights, x, self._rows(last)
    )
    sums = jax.tree.map(lambda *s: np.sum([to_host(a) for a in s], 0), *sums)
    found = Reading(filled, scores, sums)
    if shared is not None:
      jax.block_until_ready(scores)
      ms = 1e3 * (time.perf_counter() - start - self.compile_s + compiled)
      shared.put(key, found, tuple(inputs), ms)
    return found

  def extend(self, session: Session, tokens: list[np.ndarray]) -> None:
    """Feeds more tokens a row through the decode path, in pieces.

    Raises:
      ValueError: they do not fit into the capacity.
    """
    piece = self.method.decode.max_queries
    for scores, fed in self._feed(session, tokens, piece, steps.few_tokens):
      session.scores = self._rows(
        jnp.where(fed[:, None] > 0, scores, session.scores)
      )

  def score(
    self, session: Session, tokens: list[np.ndarray], piece: int = 0
  ) -> list[np.ndarray]:
    """Feeds as `extend`, and returns what the model says of every token.

    Args:
      session: goes on after the tokens.
      tokens: of each row.
      piece: tokens fed at once, of which a method may select keys together; 1
        is what decoding does; 0: as many as the method takes.

    Returns:
      float32 [n V] a row: row i of it are the logits before its token i.

    Raises:
      ValueError: they do not fit into the capacity.
    """
    most = self.method.decode.max_queries
    logits = [[np.asarray(x)[None]] for x in to_host(session.scores)]
    for scores, fed in self._feed(
      session, tokens, min(piece or most, most), steps.every_logits
    ):
      scores, fed = to_host(scores), to_host(fed)
      for row, n in enumerate(fed):
        logits[row].append(scores[row, :n])
    logits = [np.concatenate(x) for x in logits]
    session.scores = self._rows(np.stack([x[-1] for x in logits]))
    return [x[:-1] for x in logits[: len(tokens)]]

  def _feed(self, session: Session, tokens, piece: int, function):
    """Yields (what `function` says, tokens fed a row), piece by piece."""
    tokens = tokens + tokens[-1:] * (self.batch - len(tokens))
    longest = max(len(t) for t in tokens)
    after = to_host(session.lengths) + np.array([len(t) for t in tokens])
    if np.max(after) > self.capacity:
      raise ValueError(
        f'{np.max(after)} tokens exceed the cache of {self.capacity}'
      )
    for first in range(0, longest, piece):
      part = np.zeros((self.batch, piece), np.int32)
      count = np.zeros((self.batch,), np.int32)
      for row, t in enumerate(tokens):
        t = t[first : first + piece]
        part[row, : len(t)] = t
        count[row] = len(t)
      fed = self._rows(count)
      scores, session.caches, session.states, sums = self._call(
        function.__name__,
        function,
        self.weights,
        session.caches,
        session.states,
        self._rows(part),
        session.lengths,
        session.tail,
        fed,
        self._scalar(first),
        donate=(1, 2),
      )
      session.lengths = self._rows(session.lengths + fed)
      _add(session, sums)
      yield scores, fed

  def decode(
    self, session: Session, n: int, sampling: Sampling | None = None
  ) -> tuple[list[list[int]], list[str]]:
    """Chooses and feeds up to n tokens a row.

    Returns:
      Tokens of each row (the stop token included, where one came) and a status
      of each row: 'ok', 'nan' (logits were not finite), or why its cache took
      no more: the name of an `lcx.cache.Status` ('out_of_pages'), 'host_full',
      'host_gone' or 'host_failed'. Such a row ends with the token that its
      cache did not take; the others go on.
    """
    sampling = sampling or make_sampling(self.batch)
    if int(np.max(to_host(session.lengths))) + n > self.capacity:
      raise ValueError(
        f'{n} more tokens after {int(np.max(to_host(session.lengths)))} '
        f'exceed the cache of {self.capacity}: raise the capacity'
      )
    sampling = jax.tree.map(self._rows, sampling)
    done = self._rows(np.zeros(self.batch, bool))
    tokens: list[list[int]] = [[] for _ in range(self.batch)]
    finite = np.ones(self.batch, bool)
    ended = np.zeros(self.batch, np.int32)
    for first in range(0, max(n, 1), DECODE_ROOM):
      out = self._call(
        'decode',
        functools.partial(steps.decode_loop, room=DECODE_ROOM),
        self.weights,
        session.caches,
        session.states,
        session.scores,
        session.lengths,
        session.tail,
        done,
        sampling,
        self._scalar(min(DECODE_ROOM, n - first)),
        donate=(1, 2, 3, 4),
      )
      chosen, session.scores, session.caches, session.states = out[:4]
      session.lengths, done, ok, sums, status, ran = out[4:]
      session.lengths, done = self._rows(session.lengths), self._rows(done)
      session.scores = self._rows(session.scores)
      _add(session, sums)
      finite &= to_host(ok)
      ended = to_host(status)
      session.steps += int(to_host(ran))
      for row, line in zip(tokens, to_host(chosen), strict=True):
        row.extend(int(t) for t in line if t >= 0)
      if np.all(to_host(done)):
        break
    return tokens, [
      (host_fault(w) or Status(w).name.lower()) if finite[b] else 'nan'
      for b, w in enumerate(ended.tolist())
    ]

  def mark(self, session: Session) -> Session:
    """A copy of all but the caches, to which `rewind` returns."""
    copy = functools.partial(jax.tree.map, jnp.copy)
    return Session(
      (),
      copy(session.states),
      jnp.copy(session.lengths),
      jnp.copy(session.scores),
      session.tail,
      session.used or copy(tuple(c.used for c in session.caches)),
      session.prompt_lengths,
      {k: v.copy() for k, v in session.sums.items()},
      session.prefill_sums,
    )

  def rewind(self, session: Session, mark: Session) -> None:
    """Drops what came after the mark: several questions a context."""
    specs = self.plan.cache_specs()

    def truncate(caches, used, *, plan):
      cut = plan.sharded(lambda c, n: c.truncate(n), (specs, ROWS), specs)
      return tuple(cut(c, n) for c, n in zip(caches, used, strict=True))

    session.caches = self._call(
      'rewind', truncate, session.caches, mark.used, donate=(0,)
    )
    fresh = self.mark(mark)
    session.states, session.lengths = fresh.states, fresh.lengths
    session.scores, session.sums = fresh.scores, fresh.sums

  def generate(
    self,
    prompts: list[Prompt],
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    *,
    sampling: Sampling | None = None,
    protocol: Protocol = 'whole',
  ) -> list[list[Generation]]:
    """Answers every question of every prompt.

    Args:
      prompts: 1 to `batch`, with equally many questions each.
      max_new_tokens: of each answer.
      stop_ids: tokens that end an answer, where `sampling` is not given.
      sampling: how rows choose; greedy by default.
      protocol: 'whole': context and question are read together, once a
        question. 'context_first': the context is read (compressed, indexed)
        before any question is seen; questions go through the decode path.

    Returns:
      A list per prompt of one `Generation` a question.
    """
    counts = {len(p.questions) for p in prompts}
    if len(counts) != 1 or 0 in counts:
      raise ValueError('prompts must have equally many questions, at least one')
    if protocol == 'context_first':
      self._check_way_back(prompts, max_new_tokens)
    sampling = sampling or make_sampling(self.batch, stop=tuple(stop_ids))
    answers: list[list[Generation]] = [[] for _ in prompts]
    session = mark = None
    read_ms = 0.0
    for i in range(counts.pop()):
      meter = Meter(self)
      if protocol == 'whole':
        session = self.prefill(prompts, i)
        read_ms = meter.lap(session.scores) + session.shared_ms
      elif protocol == 'context_first':
        if session is None or mark is None:
          session = self.prefill(prompts)
          mark = self.mark(session)
          read_ms = meter.lap(session.scores) + session.shared_ms
        else:
          self.rewind(session, mark)
        self.extend(session, [p.question(i) for p in prompts])
        meter.lap(session.scores)
      else:
        raise ValueError(f"{protocol=} must be 'whole' or 'context_first'")
      lengths, before = to_host(session.lengths), session.steps
      tokens, status = self.decode(session, max_new_tokens, sampling)
      spent = meter.lap(session.scores)
      steps_done = max(1, session.steps - before)
      for row in range(len(prompts)):
        answers[row].append(
          self._generation(
            session,
            row,
            tokens[row],
            status[row],
            int(lengths[row]),
            read_ms,
            spent / steps_done,
            meter,
          )
        )
    return answers

  def _check_way_back(self, prompts: list[Prompt], new: int) -> None:
    """Refuses several questions where a cache cannot go back to the context."""
    back = [
      len(p.question(i)) + new
      for p in prompts
      for i in range(len(p.questions) - 1)
    ]
    slack = getattr(self.method.cache, 'slack', None)
    bounded = self.method.cache.rewindable(max(back, default=0))
    if bounded != self.method.cache:
      raise ValueError(
        f'a question and its answer take up to {max(back)} tokens, from which '
        f'streaming heads cannot go back to the context: their cache keeps '
        f'{slack=} more than they see; raise cache.slack'
      )

  def _generation(
    self, session, row, tokens, status, length, prefill_ms, token_ms, meter
  ) -> Generation:
    read, spent = session.prefill_sums, session.sums
    keys = float(spent['keys'][row]) if 'keys' in spent else 0.0
    prompt = int(session.prompt_lengths[row])
    queries = int(to_host(session.lengths)[row]) - prompt
    each = self.config.n_layers * self.config.n_heads
    densities = density(read, row), density(spent, row)
    size = {
      tier: sum(sum(c.nbytes(tier).values()) for c in session.caches)
      for tier in ('device', 'host')
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    return Generation(
      tokens=tokens,
      status=status,
      prompt_tokens=length,
      prefill_ms=prefill_ms,
      decode_ms_per_token=token_ms,
      keys_attended=keys / (each * max(1, queries)),
      density=min(densities),
      prefill_density=densities[0],
      decode_density=densities[1],
      kv_bytes=size['device'] // self.batch,
      host_bytes=size['host'] // self.batch,
      peak_bytes=stats.get('peak_bytes_in_use'),
      compilations=meter.compilations,
      compile_s=meter.compile_s,
      counters=counters(spent, row),
      masses=prefill_masses(read, row, each * prompt),
    )


def _add(session: Session, sums: dict[str, Any]) -> None:
  for name, value in sums.items():
    session.sums[name] = session.sums.get(name, 0.0) + to_host(value)
