"""Which heads of a model stream: trains a head profile, in pieces that resume.

The workdir holds metrics.jsonl (one row a step), checkpoints/ and, after each
piece, profile.json, which `lserve` takes as its field `profile`. The same
command goes on where the last one ended.

python -m experiments.run --config=configs/train_head_profile.py
"""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from experiments import models
from experiments.frozen_training import describe, make_writer, train_piece
from experiments.results import make_folder, write_file
from lcx import sharding
from lcx.head_profile import HeadProfile, fingerprint
from lcx.train import head_profile
from lcx.train.passkeys import Passkeys


@dataclasses.dataclass(frozen=True)
class Config:
  """What to find the gates of, and how.

  Attributes:
    model: a Hugging Face folder, a GGUF file or preset:NAME.
    source: 'train' (DuoAttention) or 'distant_mass' (no training, minutes).
    title: of the run.
    recipe: numbers of the training; sink and recent count for both sources.
    documents: what is read.
    text: a text file to hide passkeys in; '': Python's own documentation.
    looked_at: documents of 'distant_mass'.
    dtype: of the frozen weights and activations.
    seed: of documents (and of random weights).
    devices: that share the heads.
    steps: of this piece at most; 0: to the end.
    minutes: of this piece at most; 0: no limit.
    save_minutes: between two checkpoints.
  """

  model: str
  source: Literal['train', 'distant_mass'] = 'train'
  title: str = 'head profile'
  recipe: head_profile.Recipe = dataclasses.field(
    default_factory=head_profile.Recipe
  )
  documents: Passkeys = dataclasses.field(default_factory=Passkeys)
  text: str = ''
  looked_at: int = 8
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  seed: int = 0
  devices: int = 1
  steps: int = 0
  minutes: float = 0.0
  save_minutes: float = 2.0


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains a piece (or looks), then writes the profile.

  Raises:
    ValueError: the config asks for what cannot be, or the workdir belongs to
      another one.
    OSError: a file cannot be read or written.
  """
  source = models.find(config.model, config.seed)
  make_folder(workdir)
  model = models.load(source, config.dtype)
  writer = make_writer(config.text, config.documents, config.seed, model)
  if config.source == 'distant_mass':
    describe(config, workdir)
    gates = head_profile.distant_mass(
      model.config,
      model.weights,
      writer,
      config.recipe,
      documents=config.looked_at,
    )
    done: dict[str, Any] = {'documents_read': config.looked_at}
  else:
    mesh = sharding.make_mesh(model=config.devices)
    trainer = head_profile.GateTrainer(
      model.config, model.weights, source.sha256, writer, config.recipe, mesh
    )
    done = train_piece(config, trainer, workdir, _says)
    gates = trainer.gates
  profile = HeadProfile(
    gates=gates,
    architecture=fingerprint(model.config),
    sha256=source.sha256,
    model=source.name,
    recipe={
      'source': config.source,
      **dataclasses.asdict(config.recipe),
      'documents': dataclasses.asdict(config.documents),
      'seed': config.seed,
      'dtype': config.dtype,
      **done,
    },
  )
  write_file(workdir / 'profile.json', profile.to_json())
  per_layer = [sum(row) for row in profile.streaming(0.5)]
  print(f'mean gate {np.mean(gates):.3f}, median {np.median(gates):.3f}')
  print(f'streaming kv heads of each layer, half of all: {per_layer}')
  print(f'profile: {workdir / "profile.json"}')


def _says(row: dict[str, float]) -> str:
  return (
    f'distill {row["distill"]:.2e} gate {row["gate"]:.3f} '
    f'below 1/2 {row["below_half"]:.0%}'
  )
