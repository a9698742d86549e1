"""Finds methods by name and composes parts of different ones.

Each module of this package other than `base` and `compose` exports `METHOD`,
or `METHODS` where one idea has several presets; a file that is put here is a
method at once. Parts are named by the preset they come from:
`compose(prefill='apb', cache='paged', decode='quest')`.
"""

import dataclasses
import functools
import importlib
import pkgutil
import types
from typing import Any

from lcx import cache as caches
from lcx.methods.base import Method

_NOT_METHODS = frozenset({'base', 'compose', 'shards'})
_PARTS = ('prefill', 'cache', 'decode')


@functools.cache
def _modules() -> dict[str, types.ModuleType]:
  """The module that exports each preset."""
  import lcx.methods as package

  found: dict[str, types.ModuleType] = {}
  for info in pkgutil.iter_modules(package.__path__):
    if info.name in _NOT_METHODS or info.name.startswith('_'):
      continue
    module = importlib.import_module(f'lcx.methods.{info.name}')
    for method in _exported(module):
      if method.name in found:
        raise ValueError(f'two methods are called {method.name!r}')
      found[method.name] = module
  return found


def _exported(module: types.ModuleType) -> tuple[Method, ...]:
  if hasattr(module, 'METHODS'):
    return tuple(module.METHODS)
  return (module.METHOD,) if hasattr(module, 'METHOD') else ()


@functools.cache
def _presets() -> dict[str, Method]:
  return {
    name: next(m for m in _exported(module) if m.name == name)
    for name, module in _modules().items()
  }


def names() -> tuple[str, ...]:
  """Names of all presets, sorted."""
  return tuple(sorted(_presets()))


def about(name: str) -> str:
  """First line of the docstring of the file that defines a preset."""
  _preset(name)
  return (_modules()[name].__doc__ or '').strip().split('\n')[0]


def _preset(name: str) -> Method:
  presets = _presets()
  if name not in presets:
    raise ValueError(
      f'unknown method {name!r}; there are {", ".join(sorted(presets))}'
    )
  return presets[name]


def _cache(name: str) -> Any:
  if name in caches.CONFIGS:
    return caches.CONFIGS[name]
  if name in _presets():
    return _presets()[name].cache
  raise ValueError(
    f'unknown cache {name!r}; there are {", ".join(sorted(caches.CONFIGS))} '
    f'and those of the methods {", ".join(names())}'
  )


def compose(
  prefill: str, cache: str, decode: str, name: str | None = None, **fields: Any
) -> Method:
  """Composes a method from the parts of presets.

  Args:
    prefill: preset whose prefill is taken.
    cache: a cache's name, or a preset whose cache is taken.
    decode: preset whose decode is taken.
    name: of the result; 'prefill+cache+decode' by default.
    **fields: numbers of the parts: `budget=1024` where one part alone has such
      a field, `decode.budget` (as a dict key) where several have.

  Returns:
    A legal composition.

  Raises:
    ValueError: an unknown name or field, or parts that do not fit, with the two
      sets and the nearest legal choice.
  """
  method = Method(
    name or f'{prefill}+{cache}+{decode}',
    _preset(prefill).prefill,
    _cache(cache),
    _preset(decode).decode,
  )
  method = with_fields(method, fields)
  refusal = why_not(method)
  if refusal:
    raise ValueError(refusal + _nearest(prefill, cache, decode))
  return method


def get_method(name: str, **fields: Any) -> Method:
  """A preset with some of its fields changed.

  'prefill+cache+decode' names a composition. Raises ValueError as `compose`.
  """
  if '+' in name:
    parts = name.split('+')
    if len(parts) != 3:
      raise ValueError(f'{name!r}: a composition is prefill+cache+decode')
    return compose(*parts, **fields)
  method = with_fields(_preset(name), fields)
  refusal = why_not(method)
  if refusal:
    raise ValueError(refusal)
  return method


def with_fields(method: Method, fields: dict[str, Any]) -> Method:
  """Replaces fields of the parts; each must exist and have the right type."""
  for key, value in fields.items():
    part_name, _, field = key.rpartition('.')
    owners = [
      p
      for p in ([part_name] if part_name else _PARTS)
      if p in _PARTS
      and field in {f.name for f in dataclasses.fields(getattr(method, p))}
    ]
    if len(owners) != 1:
      known = [
        f'{p}.{f.name}'
        for p in _PARTS
        for f in dataclasses.fields(getattr(method, p))
      ]
      what = 'no part has' if not owners else 'several parts have'
      raise ValueError(
        f'method {method.name!r}: {what} a field {key!r}; the fields are '
        f'{", ".join(known)}'
      )
    part = getattr(method, owners[0])
    old = getattr(part, field)
    value = _typed(f'{owners[0]}.{field}', old, value)
    method = dataclasses.replace(
      method, **{owners[0]: dataclasses.replace(part, **{field: value})}
    )
  return method


def _typed(name: str, old: Any, value: Any) -> Any:
  """`value` in the type of the field's old value, or ValueError."""
  if old is None or value is None or isinstance(value, type(old)):
    return value
  if isinstance(old, float) and isinstance(value, int):
    return float(value)
  if isinstance(value, str) and isinstance(old, int | float):
    try:
      if isinstance(old, bool):
        return {'true': True, 'false': False}[value.lower()]
      return type(old)(value)
    except (ValueError, KeyError):
      pass
  raise ValueError(
    f'{name} takes {type(old).__name__}, not {type(value).__name__} {value!r}'
  )


def why_not(method: Method) -> str | None:
  """Why the parts do not fit, or None where they do."""
  provided = (
    method.cache.provides | method.prefill.provides | method.decode.provides
  )
  for part in ('prefill', 'decode'):
    missing = getattr(method, part).needs - provided
    if missing:
      return (
        f'{method.name}: {part} needs {sorted(missing)}, but the composition '
        f'provides {sorted(provided)}'
      )
    clash = getattr(method, part).misfit(method.cache)
    if clash:
      return f'{method.name}: {clash}'
  return None


def legal() -> list[tuple[str, str, str]]:
  """All legal compositions of the presets' parts and the named caches."""
  names_of_caches = sorted(set(caches.CONFIGS))
  return [
    (p, c, d)
    for p in names()
    for c in names_of_caches
    for d in names()
    if why_not(
      Method('', _preset(p).prefill, caches.CONFIGS[c], _preset(d).decode)
    )
    is None
  ]


def _nearest(prefill: str, cache: str, decode: str) -> str:
  """The legal composition that shares most parts, as a hint.

  Of equals, one that keeps decode, then prefill: a cache serves them.
  """

  def shared(choice):
    p, c, d = choice[0] == prefill, choice[1] == cache, choice[2] == decode
    return p + c + d, d, p

  best = max(legal(), key=shared, default=None)
  return f'; the nearest legal choice is {"+".join(best)}' if best else ''
