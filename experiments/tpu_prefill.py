"""The whole APB prefill step of an 8B model at 1M tokens, compiled for TPUs.

  python -m experiments.tpu_prefill [SLICE ...]

No TPU is needed: libtpu compiles ahead of time on a CPU. For v5e and v5p slices
of 16 and 64 chips, embedding, all layers (a scan over stacked weights) and the
last token's logits are one program over the mesh (1, seq, model), feed-forward
and projections split over "model". On 16 chips of v5e it does not fit; variants
have an int8 cache, and activations spread over "model", too (residual). One
row a slice and variant in experiments/results/apb_tpu_aot.jsonl: memory of a
chip by kind and its limit, whether it fits, the collectives' bytes of a layer,
compile time. Where the compiler refuses, the row says why.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, Literal

RESULTS = pathlib.Path(__file__).parent / 'results' / 'apb_tpu_aot.jsonl'
TOKENS = 2**20
GIB = 2**30
# Topology, (seq, model), memory of a chip in GiB: of v5e's 16, libtpu says that
# a program may have 15.75; v5p: cloud.google.com/tpu/docs.
_V5E_16 = ('v5e:4x4', (4, 4), 15.75)
SLICES = {
  'v5e-16': _V5E_16,
  'v5e-64': ('v5e:8x8', (16, 4), 15.75),
  'v5p-16': ('v5p:2x2x4', (8, 2), 95),
  'v5p-64': ('v5p:4x4x4', (32, 2), 95),
  'v5e-16 int8 cache': _V5E_16,
  'v5e-16 int8 cache, spread': _V5E_16,
  'v5e-16 int8 cache, spread, 2 x 8': ('v5e:4x4', (8, 2), 15.75),
}
# What could make the program fit.
VARIANTS: dict[str, dict[str, Any]] = {
  name: {
    'cache': 'paged_int8',
    'residual': 'spread' if 'spread' in name else 'whole',
  }
  for name in SLICES
  if 'int8 cache' in name
}


def lower(
  name: str,
  tokens: int = TOKENS,
  preset: str = 'llama3_1_8b',
  cache: str = 'dense',
  residual: Literal['whole', 'spread'] = 'whole',
  **apb,
):
  """The program of one prefill step on a slice, traced for TPUs.

  Args:
    name: of SLICES.
    tokens: of the prompt, padding included.
    preset: the model.
    cache: its name.
    residual: as in the engine's `Plan`.
    **apb: fields of the method, beside the hosts.

  Returns:
    (jax.stages.Lowered, method, mesh).
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  from lcx import methods, sharding
  from lcx.cache import CacheShape, Shards
  from lcx.engine import steps
  from lcx.engine.plan import Plan
  from lcx.methods.apb import ApbPrefill
  from lcx.models import presets, transformer

  topology, (seq, model_size), _ = SLICES[name]
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  mesh = Mesh(
    np.asarray(devices).reshape(1, seq, model_size),
    sharding.MESH_AXES,
    axis_types=(AxisType.Auto,) * 3,
  )
  model = presets.preset(preset).replace(max_position=tokens)
  method = methods.get_method(
    f'apb+{cache}+dense', **{'hosts': seq, 'shared_anchor': True} | apb
  )
  part = method.prefill
  assert isinstance(part, ApbPrefill)
  part.check(model, tokens)
  plan = Plan(model, method, mesh, False, residual)
  _, _, rows, _ = part.sizes(tokens)
  total = tokens + part.hosts * rows
  capacity = seq * -(-tokens // seq // 128) * 128
  shape = CacheShape(
    batch=1,
    n_kv_heads=model.n_kv_heads,
    head_dim=model.head_dim,
    capacity=capacity,
    dtype=model.dtype,
    shards=Shards(1, seq, model_size),
  )

  def at(x, spec):
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  specs = transformer.weight_specs(model, mesh)
  shapes = transformer.abstract(model)
  one = shapes.layers[0]
  layers = {
    n: at(
      jax.ShapeDtypeStruct((model.n_layers, *x.shape), x.dtype),
      P(None, *specs.layers[0][n]),
    )
    for n, x in one.items()
  }
  weights = transformer.Weights(
    embed=jax.tree.map(at, shapes.embed, specs.embed),
    layers=(),
    head=jax.tree.map(at, shapes.head, specs.head),
  )
  cache_specs = plan.cache_specs()

  def step(weights, layers, tokens, positions, source, valid, last):
    x = steps.embed_tokens(weights.embed, tokens, plan=plan)
    lengths = jnp.max(source, axis=1) + 1

    def layer(x, inputs):
      i, layer = inputs
      cache = method.cache.init(shape)
      cache = jax.lax.with_sharding_constraint(
        cache, sharding.named(mesh, cache_specs)
      )
      x, cache, _, _ = steps.prefill_layer(
        layer,
        x,
        cache,
        method.decode.init_state(shape),
        positions,
        source,
        valid,
        lengths,
        i,
        jnp.int32(0),
        plan=plan,
        room=tokens_in_room,
      )
      return x, cache

    index = jnp.arange(model.n_layers, dtype=jnp.int32)
    x, caches = jax.lax.scan(layer, x, (index, layers))
    return steps.last_logits(weights, x, last, plan=plan), caches

  tokens_in_room = tokens
  prompt = P('data', 'seq')
  places = [
    at(jax.ShapeDtypeStruct((1, total), dtype), prompt)
    for dtype in ('int32', 'int32', 'int32', bool)
  ]
  last = at(jax.ShapeDtypeStruct((1,), 'int32'), P('data'))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(step).trace(weights, layers, *places, last)
    lowered = traced.lower(lowering_platforms=('tpu',))
  return lowered, method, model


def row(name: str, **changes) -> dict:
  """Compiles for one slice and reads memory and collectives."""
  from experiments.collectives import collective_bytes

  topology, (seq, model_size), limit = SLICES[name]
  begin = time.perf_counter()
  found: dict = {
    'slice': name,
    'topology': topology,
    'seq': seq,
    'model_axis': model_size,
    'tokens': changes.get('tokens', TOKENS),
    'memory_limit_gib': limit,
    'error': None,
  }
  try:
    lowered, method, model = lower(name, **changes)
    found |= {'model': model.n_layers, 'method': repr(method.prefill)}
    found |= {
      'cache': repr(method.cache),
      'residual': changes.get('residual', 'whole'),
    }
    found['lower_s'] = time.perf_counter() - begin
    program = lowered.compile()
    memory = program.memory_analysis()
    kinds = {
      kind: getattr(memory, f'{kind}_size_in_bytes') / GIB
      for kind in ('argument', 'output', 'temp', 'generated_code')
    }
    total = sum(kinds.values())
    moved = collective_bytes(program.as_text() or '', seq * model_size)
    found |= {
      'memory_gib': kinds | {'total': total},
      'fits': total <= limit,
      # The layers are one loop: its collectives stand once in the program.
      'collective_bytes_layer': moved,
    }
  except Exception as error:  # the compiler's refusals are results, too
    text = ' '.join(str(error).split())
    used = re.search(r'[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm', text)
    found |= {'fits': False, 'error': text[:600]}
    if used:
      found['error'] = f'needs {used[1]} of {used[2]} a chip: {text[:300]}'
  return found | {
    'compile_s': time.perf_counter() - begin,
    'versions': {n: importlib.metadata.version(n) for n in ('jax', 'libtpu')},
    'command': 'python -m experiments.tpu_prefill',
    'date': datetime.date.today().isoformat(),
  }


def main(argv: list[str]) -> int:
  """Writes the rows of the slices named, or of all; keeps the others'."""
  names = argv[1:] or list(SLICES)
  unknown = [n for n in names if n not in SLICES]
  if unknown:
    print(f'error: {unknown[0]!r} is not one of {", ".join(SLICES)}')
    return 2
  for key, value in {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }.items():
    os.environ.setdefault(key, value)
  RESULTS.parent.mkdir(exist_ok=True)
  old = RESULTS.read_text().splitlines() if RESULTS.exists() else []
  rows = {r['slice']: r for r in map(json.loads, old)}
  for name in names:
    rows[name] = row(name, **VARIANTS.get(name, {}))
    print(json.dumps(rows[name]), flush=True)
    RESULTS.write_text(''.join(json.dumps(r) + '\n' for r in rows.values()))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
