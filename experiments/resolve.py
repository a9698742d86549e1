"""From a ConfigDict to frozen dataclasses; what does not fit dies here."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


def resolve[T](
  cls: type[T], config: Mapping[str, Any], at: str = 'config'
) -> T:
  """Builds the dataclass `cls`, nested ones included, from a mapping.

  Nothing is converted but int to float, list to tuple and a mapping to the
  dataclass or dict that the annotation names.

  Args:
    cls: a frozen dataclass whose fields are annotated.
    config: field values; missing ones take the dataclass' default.
    at: the path of `config`, for messages.

  Raises:
    ValueError: a field is unknown, missing or of another type.
  """
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  for name in config:
    if name not in fields:
      raise ValueError(unknown(f'{at}.{name}', name, fields))
  values = {}
  for name, field in fields.items():
    if name in config:
      values[name] = _value(hints[name], config[name], f'{at}.{name}')
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ValueError(f'{at}.{name} is missing: {_says(hints[name])}')
  return cls(**values)


def unknown(path: str, name: str, known: Iterable[str]) -> str:
  """The text for a name that does not exist: its neighbours, then all."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  hint = f'; did you mean {close[0]!r}?' if close else ''
  return f'{path} does not exist{hint} (there is: {", ".join(known) or "none"})'


def _says(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint)


def _value(hint: Any, value: Any, at: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  wrong = f'{at}={value!r} must be {_says(hint)}'
  if hint is Any:
    return _plain(value)
  if origin in (types.UnionType, typing.Union):
    for arg in args:
      try:
        return _value(arg, value, at)
      except ValueError:
        continue
    raise ValueError(wrong)
  if origin is Literal:
    if value not in args:
      raise ValueError(
        f'{at}={value!r} must be one of {", ".join(map(str, args))}'
      )
    return value
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise ValueError(wrong)
    inner = args[:1] * len(value) if args[1:] == (...,) else args
    if len(inner) != len(value):
      raise ValueError(wrong)
    return tuple(
      _value(a, v, f'{at}[{i}]')
      for i, (a, v) in enumerate(zip(inner, value, strict=True))
    )
  if origin is dict:
    if not isinstance(value, Mapping):
      raise ValueError(wrong)
    return {k: _value(args[1], value[k], f'{at}.{k}') for k in value}
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ValueError(wrong)
    return resolve(typing.cast(type, hint), value, at)
  if hint is float and type(value) is int:
    return float(value)
  if hint is types.NoneType and value is None:
    return None
  if type(value) is not hint:  # bool is no int here
    raise ValueError(wrong)
  return value


def _plain(value: Any) -> Any:
  """Mappings and sequences of `ml_collections` as dict and tuple."""
  if isinstance(value, Mapping):
    return {k: _plain(value[k]) for k in value}
  if isinstance(value, (list, tuple)):
    return tuple(_plain(v) for v in value)
  return value
