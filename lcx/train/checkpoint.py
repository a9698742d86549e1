"""Checkpoints by orbax: whole or not at all, and only of the same run."""

import hashlib
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


def fingerprint(numbers: Any) -> str:
  """SHA-256 of what decides a run, as canonical JSON."""
  text = json.dumps(numbers, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


class Checkpoints:
  """The checkpoints of one run.

  Orbax writes into a temporary folder and renames it: a kill during a save
  leaves the checkpoint before it as the latest.

  Args:
    folder: made where it does not exist.
    run: `fingerprint` of the run; another run's checkpoint is refused.
    keep: how many are kept.
  """

  def __init__(self, folder: pathlib.Path | str, run: str, keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    self.run = run
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  @property
  def latest(self) -> int | None:
    """Step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Saves; returns when the checkpoint is whole on disk."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        about=ocp.args.JsonSave({'run': self.run, 'step': step}),
      ),
      force=True,
    )
    self._manager.wait_until_finished()

  def restore(self, state: Any) -> Any:
    """The latest checkpoint's arrays, placed as those of `state`.

    Args:
      state: a pytree of arrays: shapes, dtypes and shardings to restore to.

    Raises:
      ValueError: it belongs to another config, has other shapes, or is cut.
    """
    step = self.latest
    where = self.folder / str(step)
    try:
      about = self._manager.restore(
        step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
      )['about']
    except Exception as error:
      raise ValueError(
        f'checkpoint {where} is damaged ({_line(error)}); delete it to go on '
        'from the one before'
      ) from error
    if about['run'] != self.run:
      raise ValueError(
        f'checkpoint {where} belongs to another config; give the config it '
        'was made with, or another --workdir'
      )
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
      return self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
      )['state']
    except Exception as error:
      raise ValueError(
        f'checkpoint {where} is cut or of another shape ({_line(error)}); '
        'delete it to go on from the one before'
      ) from error

  def close(self) -> None:
    self._manager.close()


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:200]
