"""The engine: prefill, decode, sampling over any method."""

from lcx.engine.engine import Engine, Session
from lcx.engine.generation import Generation
from lcx.engine.sampling import Sampling, make_sampling

__all__ = ['Engine', 'Generation', 'Sampling', 'Session', 'make_sampling']
