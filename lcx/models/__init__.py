"""One decoder-only transformer, its presets, and import of real models."""
