"""lcx: long-context inference in JAX, one composition of parts a method."""
