"""Attention kernels over selected keys: arrays in, `Partial` out."""
