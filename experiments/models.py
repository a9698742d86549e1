"""Models that a config names: a folder, a GGUF file, or a preset's shape."""

import dataclasses
import hashlib
import pathlib
from typing import Any

from experiments.resolve import unknown

_PRESET = 'preset:'
_SIDE_FILES = ('*.json', '*.jinja')


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a model is, and what it is.

  Attributes:
    spec: as in the config.
    name: short, for tables.
    sha256: of the weight file; of several, that of their digests in order of
      their names; of random weights, of the preset's numbers and the seed.
    side: a hash of the files beside the weights (tokenizer, templates).
    seed: of random weights.
  """

  spec: str
  name: str
  sha256: str
  side: str
  seed: int


def find(spec: str, seed: int) -> Source:
  """Finds a model and hashes its files, without loading it.

  Raises:
    ValueError: there is no such model.
    OSError: a file cannot be read.
  """
  if spec.startswith(_PRESET):
    name = spec.removeprefix(_PRESET)
    text = f'{_preset(name)!r} seed {seed}'
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Source(spec, f'{name} (random)', digest, '', seed)
  path = pathlib.Path(spec).expanduser()
  if not path.exists():
    raise ValueError(
      f'config.model={spec!r} does not exist: name a Hugging Face folder, a '
      '.gguf file, or preset:NAME for random weights (make demo fetches the '
      "quickstart's model)"
    )
  if path.is_file():
    return Source(spec, path.stem, _joint([path]), '', seed)
  weights = sorted(path.glob('*.safetensors'))
  if not weights:
    raise ValueError(
      f'config.model={spec!r}: the folder has no .safetensors file; download '
      'the whole model, or convert its weights to safetensors'
    )
  beside = sorted(p for glob in _SIDE_FILES for p in path.glob(glob))
  name = path.resolve().name
  return Source(spec, name, _joint(weights), _joint(beside), seed)


def numbers(source: Source, dtype: str) -> Any:
  """The model's `ModelConfig`, from its header alone.

  Raises:
    ValueError: the files are damaged or of an unsupported kind.
  """
  if source.spec.startswith(_PRESET):
    return _preset(source.spec.removeprefix(_PRESET)).replace(dtype=dtype)
  from lcx.models import gguf, hf

  path = pathlib.Path(source.spec).expanduser()
  opened = hf.open_folder if path.is_dir() else gguf.open_file
  return opened(path, dtype).config


def load(source: Source, dtype: str) -> Any:
  """An `lcx.models.load.Model`; presets get random weights and byte tokens.

  Raises:
    ValueError: the files are damaged or of an unsupported kind.
  """
  from lcx.models import load as loader

  if not source.spec.startswith(_PRESET):
    return loader.load(pathlib.Path(source.spec).expanduser(), dtype)
  import jax

  from lcx.models import transformer

  config = numbers(source, dtype)
  weights = transformer.init(config, jax.random.key(source.seed))
  return loader.Model(config, weights, _bytes_tokenizer(), source.sha256)


def _preset(name: str) -> Any:
  from lcx.models import presets

  if name not in presets.PRESETS:
    raise ValueError(
      unknown(f'config.model={_PRESET}{name}', name, presets.PRESETS)
    )
  return presets.PRESETS[name]


def _bytes_tokenizer() -> Any:
  """A token a byte, for models that no text has shaped."""
  import tokenizers
  from tokenizers import decoders, pre_tokenizers

  from lcx.models.tokenizer import Tokenizer

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  return Tokenizer(backend, where='byte tokens')


def _joint(paths: list[pathlib.Path]) -> str:
  digests = []
  for path in paths:
    with open(path, 'rb') as file:
      digests.append(hashlib.file_digest(file, 'sha256'))
  if len(digests) == 1:
    return digests[0].hexdigest()
  joint = hashlib.sha256()
  for digest in digests:
    joint.update(digest.digest())
  return joint.hexdigest()
