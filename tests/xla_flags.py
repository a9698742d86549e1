"""Flags of XLA's CPU compiler by which tests, and processes they start, run."""

# A program's code in one piece: by default it is cut into up to 32, for as many
# threads, and each piece is optimised with its own copy of what it calls (jax
# 0.11.2).
ONE_PIECE = '--xla_cpu_parallel_codegen_split_count=1'

FAST_TO_COMPILE = (
  # The emitters of LLVM IR, not those of MLIR, whose pipeline of passes for
  # each fusion is half of what compiling costs here (jax 0.11.2). Smokes go
  # without: one of them takes twice as long by these.
  '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters',
  # Where most optimizations are not disabled (COMPILING in conftest.py): at the
  # default level these emitters cost tests/quality more than they save.
  '--xla_backend_optimization_level=1',
  ONE_PIECE,
)
