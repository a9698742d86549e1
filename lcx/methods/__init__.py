"""Attention methods: one file each, listed by `names`, made by `compose`."""

from lcx.methods.compose import compose, get_method, names

__all__ = ['compose', 'get_method', 'names']
