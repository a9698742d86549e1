"""What config files share: their argument, and the fields of every kind."""

from typing import Any

from ml_collections import config_dict

RULER = (
  'niah_single_1',
  'niah_single_2',
  'niah_single_3',
  'niah_multikey_1',
  'niah_multikey_2',
  'niah_multikey_3',
  'niah_multivalue',
  'niah_multiquery',
  'vt',
  'cwe',
  'fwe',
)


def parse_arg(arg: str | None, **known: Any) -> config_dict.ConfigDict:
  """Reads `smoke,method=quest` into typed values.

  Args:
    arg: what stands after the colon of `--config=FILE:ARG`; '' or None: all
      defaults.
    **known: names with their defaults, whose types the values take. A bare
      name sets a bool to True. `smoke` (False) is always known.

  Raises:
    ValueError: a name that is not known, or a value of another type.
  """
  values = {'smoke': False, **known}
  for item in filter(None, (s.strip() for s in (arg or '').split(','))):
    name, equals, text = item.partition('=')
    if name not in values:
      raise ValueError(
        f'config argument {item!r}: {name!r} is not one of '
        f'{", ".join(sorted(values))}'
      )
    kind = type(values[name])
    if kind is bool:
      if text.lower() not in ('', 'true', 'false') or (equals and not text):
        raise ValueError(f'config argument {item!r}: true or false, or nothing')
      values[name] = text.lower() != 'false'
      continue
    if not equals or not text:
      raise ValueError(f'config argument {item!r}: write {name}=VALUE')
    try:
      values[name] = kind(text)
    except ValueError:
      raise ValueError(
        f'config argument {item!r}: {text!r} is no {kind.__name__}'
      ) from None
  return config_dict.ConfigDict(values)


def base(kind: str, title: str) -> config_dict.ConfigDict:
  """The fields of every kind.

  Args:
    kind: the module of experiments/ that runs the config.
    title: of the report.
  """
  config = config_dict.ConfigDict(sort_keys=False)
  config.kind = kind
  config.title = title
  if kind == 'evaluate':
    config.weights = ''
  # Compilations are kept here; '' keeps none. Relative to where one starts.
  config.compilation_cache = '.cache/jax'
  return config


def table(fields: dict[str, dict[str, Any]]) -> config_dict.ConfigDict:
  """Nested fields, in the order in which they are written."""
  found = config_dict.ConfigDict(sort_keys=False)
  for name, value in fields.items():
    found[name] = table(value) if isinstance(value, dict) else value
  return found


def methods(
  chosen: str, fields: dict[str, dict[str, Any]], alone: bool = False
) -> config_dict.ConfigDict:
  """The table of methods of an `evaluate` config.

  Args:
    chosen: '' for all of `fields`; names with `/` between them keep those
      methods beside dense, with their numbers from `fields` if they stand
      there. `prefill+cache+decode` composes parts of three methods.
    fields: numbers of each method, by name; a number that several parts have
      stands under the part's name (`prefill`, `cache`, `decode`).
    alone: without dense, whose rows another piece of the same table makes
      (`experiments.quality_tables` joins them).
  """
  asked = ['dense', *filter(None, chosen.split('/'))]
  names = dict.fromkeys(asked if chosen else fields)
  if alone:
    names.pop('dense', None)
  return table({name: fields.get(name, {}) for name in names})


def rows(chosen: str, fields: dict[str, Any]) -> dict[str, Any]:
  """Those of `fields` that are named, with `/` between them; '': all.

  Raises:
    ValueError: a name that is not there.
  """
  names = list(filter(None, chosen.split('/'))) or list(fields)
  if unknown := set(names) - set(fields):
    raise ValueError(
      f'config argument method: {", ".join(sorted(unknown))} is none of '
      f'{", ".join(fields)}'
    )
  return {name: fields[name] for name in names}


def tasks(
  chosen: str, default: dict[str, dict[str, Any]]
) -> config_dict.ConfigDict:
  """The table of tasks of an `evaluate` config.

  Args:
    chosen: '' for all of `default`; 'ruler' for RULER's; else names with `/`
      between them, with their fields from `default` if they stand there.
    default: fields of each task, by name.
  """
  names = RULER if chosen == 'ruler' else tuple(filter(None, chosen.split('/')))
  return table({name: default.get(name, {}) for name in names or default})
