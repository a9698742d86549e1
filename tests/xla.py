"""Flags of XLA that tests and the processes they start share."""

# The emitters of LLVM IR, not those of MLIR, whose pipeline of passes for each
# fusion is half of what compiling for a CPU costs (jax 0.11.2).
EMITTERS = '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters'
