"""Which implementation runs, and with which block sizes.

A family's folder holds `reference.py`, `xla.py`, `gpu.py` and `tpu.py`. Each
has the family's functions under the public names, with every default filled
in, and may have

  refuse(function: str, *args, **kwargs) -> str | None

which says why this implementation cannot take these arguments (a head dim, a
dtype, a page size), or None. It looks at shapes and dtypes only.
"""

import functools
import importlib
import json
import logging
import pathlib
import types
from collections.abc import Callable

import jax

_LOG = logging.getLogger(__name__)
IMPLEMENTATIONS = ('reference', 'xla', 'gpu', 'tpu')
_TUNED = pathlib.Path(__file__).parent / 'tuned_block_sizes.json'


def _order() -> tuple[str, ...]:
  """The implementations to try on the default device, best first."""
  platform = jax.default_backend()
  if platform == 'tpu':
    return ('tpu', 'xla')
  if platform == 'gpu':
    # Mosaic GPU kernels use wgmma: Hopper (compute capability 9.0) only.
    capability = getattr(jax.devices()[0], 'compute_capability', '')
    if str(capability) == '9.0':
      return ('gpu', 'xla')
  return ('xla',)


def prefers(name: str) -> bool:
  """Whether the default device tries this implementation first."""
  return _order()[0] == name


def load(family: str, name: str) -> types.ModuleType:
  """The module kernels_pallas.<family>.<name>.

  Raises:
    ValueError: the name is not an implementation, or it is not built.
  """
  if name not in IMPLEMENTATIONS:
    raise ValueError(f'implementation={name!r} must be in {IMPLEMENTATIONS}')
  path = f'kernels_pallas.{family}.{name}'
  try:
    return importlib.import_module(path)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'implementation={name!r} of {family} cannot be loaded: {error}'
    ) from error


@functools.cache
def _log_once(family: str, function: str, name: str, reasons: str) -> None:
  _LOG.info('%s.%s uses %s%s', family, function, name, reasons)


def choose(
  implementation: str | None, family: str, function: str, *args, **kwargs
) -> Callable:
  """The function that carries out a call.

  Args:
    implementation: a name, which is used or refused with the reason; or None:
      the first of the platform's order that takes the arguments (GPU: 'gpu' on
      Hopper, then 'xla'; TPU: 'tpu', then 'xla'; else 'xla'), logged once.
    family: a folder beside this file: 'block_sparse', 'selected_token', ....
    function: the public function's name.
    *args: the call's arguments, for `refuse`.
    **kwargs: likewise.

  Raises:
    ValueError: the named implementation refuses, with its reason.
  """
  if implementation is not None:
    module = load(family, implementation)
    reason = _reason(module, function, args, kwargs)
    if reason:
      raise ValueError(f'{implementation=} cannot run {function}: {reason}')
    return getattr(module, function)
  reasons = []
  for name in _order():
    try:
      module = load(family, name)
    except ValueError as error:
      reasons.append(str(error))
      continue
    reason = _reason(module, function, args, kwargs)
    if reason is None:
      said = f' ({"; ".join(reasons)})' if reasons else ''
      _log_once(family, function, name, said)
      return getattr(module, function)
    reasons.append(f'{name}: {reason}')
  raise ValueError(f'no implementation of {function}: {"; ".join(reasons)}')


def _reason(module, function: str, args, kwargs) -> str | None:
  if not hasattr(module, function):
    return f'{module.__name__} has no {function}'
  refuse = getattr(module, 'refuse', None)
  return refuse(function, *args, **kwargs) if refuse else None


def forward_only(function: Callable, name: str) -> Callable:
  """`function(*arrays)` that names the differentiable path when differentiated.

  Args:
    function: takes pytrees of arrays only; everything static is closed over.
    name: for the message.

  Raises:
    NotImplementedError: when a derivative is asked for.
  """
  wrapped = jax.custom_jvp(function)

  @wrapped.defjvp
  def _(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
      f'{name} is forward only; differentiate through '
      'kernels_pallas.differentiable.attention instead'
    )

  return wrapped


@functools.cache
def _table() -> dict:
  return json.loads(_TUNED.read_text()) if _TUNED.exists() else {}


def tuned(function: str, device_kind: str, bucket: str) -> dict[str, int]:
  """The reviewed block sizes of a bucket, {} if there are none.

  tuned_block_sizes.json: {function: {device kind: {bucket: {"sizes": {...},
  "evidence": ...}}}}. Explicit sizes win over these, these over defaults.
  """
  entry = _table().get(function, {}).get(device_kind, {}).get(bucket, {})
  return dict(entry.get('sizes', {}))
