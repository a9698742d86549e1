"""Training: the bundled model, and what methods must learn."""
