"""Trains a model's retaining heads, in pieces that resume.

The workdir holds metrics.jsonl (one row a step), checkpoints/ and, after each
piece, heads.safetensors, which `apb` takes as its field `heads`. The same
command goes on where the last one ended.

python -m experiments.run --config=configs/train_retaining_head.py
"""

import dataclasses
import pathlib
from typing import Literal

from experiments import models
from experiments.frozen_training import make_writer, train_piece
from experiments.results import make_folder, write_file
from lcx.head_profile import fingerprint
from lcx.select.retaining_head import RetainingHeads
from lcx.train import retaining_head
from lcx.train.passkeys import Passkeys


@dataclasses.dataclass(frozen=True)
class Config:
  """Whose heads to train, and how.

  Attributes:
    model: a Hugging Face folder, a GGUF file or preset:NAME.
    title: of the run.
    recipe: numbers of the training.
    documents: what is read.
    text: a text file to hide passkeys in; '': Python's own documentation.
    dtype: of the frozen weights and activations.
    seed: of documents and heads (and of random weights).
    steps: of this piece at most; 0: to the end.
    minutes: of this piece at most; 0: no limit.
    save_minutes: between two checkpoints.
  """

  model: str
  title: str = 'retaining heads'
  recipe: retaining_head.Recipe = dataclasses.field(
    default_factory=retaining_head.Recipe
  )
  documents: Passkeys = dataclasses.field(default_factory=Passkeys)
  text: str = ''
  dtype: Literal['float32', 'bfloat16'] = 'bfloat16'
  seed: int = 0
  steps: int = 0
  minutes: float = 0.0
  save_minutes: float = 2.0


def run(config: Config, workdir: pathlib.Path) -> None:
  """Trains a piece, then writes the heads.

  Raises:
    ValueError: the config asks for what cannot be, or the workdir belongs to
      another one.
    OSError: a file cannot be read or written.
  """
  source = models.find(config.model, config.seed)
  make_folder(workdir)
  model = models.load(source, config.dtype)
  writer = make_writer(config.text, config.documents, config.seed, model)
  trainer = retaining_head.HeadTrainer(
    model.config, model.weights, source.sha256, writer, config.recipe
  )
  done = train_piece(
    config,
    trainer,
    workdir,
    lambda row: f'loss {row["loss"]:.3f} smooth L1 {row["fit"]:.3f}',
  )
  heads = RetainingHeads(
    trainer.arrays,
    {
      'architecture': fingerprint(model.config),
      'sha256': source.sha256,
      'model': source.name,
      'recipe': {
        **dataclasses.asdict(config.recipe),
        'documents': dataclasses.asdict(config.documents),
        'seed': config.seed,
        'dtype': config.dtype,
        **done,
      },
    },
  )
  write_file(workdir / 'heads.safetensors', heads.to_bytes())
  print(f'heads: {workdir / "heads.safetensors"}')
