"""What ours are compared with computes the same thing."""

import dataclasses
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kernel_bench, measure, peers, torch_peers
from kernels_pallas import block_sparse
from lcx import methods
from lcx.engine import Engine
from lcx.methods.base import Prompt
from lcx.models import transformer
from lcx.models.presets import PRESETS
from tests.oracle import TOLERANCE


def test_dense_attention_that_is_not_fused_is_dense(monkeypatch):
  monkeypatch.setattr(peers, '_SCORE_BYTES', 4 * 4 * 256 * 64)  # 64 rows
  config = dataclasses.replace(PRESETS['tiny'], dtype='float32')
  weights = transformer.init(config, jax.random.key(0))
  tokens = np.arange(200, dtype=np.int32) * 7 % config.vocab_size
  prompt = Prompt(tokens[:0], tokens, ())

  def scores(method):
    engine = Engine(config, weights, method, capacity=320, room=64)
    return np.asarray(engine.prefill([prompt]).scores)

  want = scores(methods.get_method('dense'))
  got = scores(peers.METHODS['unfused'])
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_flashinfer_gets_as_many_blocks_as_ours():
  block, heads = kernel_bench.BLOCK, kernel_bench.HEADS
  group = heads // kernel_bench.KV_HEADS
  tokens, share = 2048, 4
  mask = kernel_bench.mask_of_blocks(tokens, share)
  ours = kernel_bench.share_of_blocks(tokens, share)
  np.testing.assert_array_equal(
    mask.sum(-1).repeat(group, axis=0), np.asarray(ours.count)[0]
  )
  tiles = np.arange(tokens // block)
  assert mask[:, tiles, tiles].all()  # the causal half is of the last one
  assert not mask[:, tiles[:, None] < tiles].any()
  half = block * (block - 1) // 2  # above the diagonal of a tile's own block
  pairs = mask.sum() * block**2 - mask[..., 0].size * half
  assert pairs * group == kernel_bench.listed_pairs(tokens, share)


def test_the_prompt_kernel_that_jax_ships_is_called_as_it_wants(monkeypatch):
  """Lowered for an H100; its check of CUDA's version needs a driver."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  cuda = types.SimpleNamespace(cuda_runtime_get_version=lambda: 13000)
  monkeypatch.setattr(attention_mgpu, 'cuda_versions', cuda)
  q, k, v = kernel_bench._prompt(1024)
  call = kernel_bench._dense_peers(q, k, v)['pallas shipped, float16']()
  h100 = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=h100)
  with jax.sharding.use_abstract_mesh(mesh):
    exported = jax.export.export(jax.jit(call.function), platforms=['cuda'])(
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.inputs[0])
    )
  (out,) = exported.out_avals
  assert (out.shape, out.dtype) == (q.shape, jnp.float16)
  assert 'mosaic_gpu' in exported.mlir_module()


def test_a_plan_stands_beside_the_time_of_a_call():
  def timed(repeats):
    return torch_peers.Times((2.0,) * repeats, plan_ms=7.0)

  case = kernel_bench.Case('op', 'case', 1e9, 'TFLOP/s', {}, {'peer': timed})
  time, plan_ms = measure._timed(case, 'peer', 3)
  row = measure.row_of(case, 'peer', time, {}, plan_ms)
  assert (row['ms'], row['plan_ms']) == (2.0, 7.0)
  assert row['rate'] == 0.5
  assert measure.line(row).endswith('plan 7.00 ms apart')
  assert 'plan_ms' not in measure.row_of(case, 'peer', time, {})


@pytest.mark.gpu
def test_flashinfer_attends_what_ours_attends():
  pytest.importorskip('flashinfer', reason='FlashInfer is not installed')
  import torch

  heads, kv_heads, dim = (
    kernel_bench.HEADS,
    kernel_bench.KV_HEADS,
    kernel_bench.HEAD_DIM,
  )
  tokens, block = 2048, kernel_bench.BLOCK
  mask = kernel_bench.mask_of_blocks(tokens, 4)
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.standard_normal((n, tokens, dim)), jnp.bfloat16)
    for n in (heads, kv_heads, kv_heads)
  )
  there = [
    torch.from_numpy(np.asarray(x, np.float32)).cuda().bfloat16()
    for x in (q, k, v)
  ]
  run, _ = torch_peers.listed(mask, block, *there)
  got = run().float().cpu().numpy()
  width = mask.sum(-1).max()
  order = np.argsort(~mask, axis=-1, kind='stable')[..., :width]
  group = heads // kv_heads
  blocks = block_sparse.listed(
    jnp.asarray(order.repeat(group, axis=0)[None], jnp.int32),
    jnp.asarray(mask.sum(-1).repeat(group, axis=0)[None], jnp.int32),
  )
  ours = block_sparse.block_sparse(
    q.swapaxes(0, 1)[None], k[None], v[None], blocks
  )
  want = np.asarray(ours.out[0].swapaxes(0, 1), np.float32)
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE['bfloat16'][0])
