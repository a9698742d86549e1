"""Rows on disk: one JSON object a line, found again by a key.

A run directory's `results.jsonl` only ever grows. A line is written by one
`write` and synchronised before `append` returns; a line cut by a kill is cut
away when the file is opened again, and a line that the disk had no room for is
taken back at once. Rows of other configs may stand in the same file: a reader
asks for the keys it wants.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging

from experiments.errors import CannotWrite

Row = dict[str, Any]


def key_of(identity: Mapping[str, Any]) -> str:
  """The key of a row: 32 hex digits of BLAKE2 over canonical JSON.

  Args:
    identity: everything that decides the row's content; values are JSON's own
      types and tuples.
  """
  text = json.dumps(identity, sort_keys=True, separators=(',', ':'))
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Results:
  """The rows of one run directory, newest row of each key.

  Attributes:
    path: the file.
    rows: by key.
    repaired: bytes of a torn last line that were cut away.
    skipped: numbers of complete lines that are not rows (kept in the file).
  """

  def __init__(self, path: str | os.PathLike):
    """Reads what is there and opens the file for appending.

    Raises:
      OSError: the file or its folder cannot be made, read or written.
      ValueError: another process is writing to this file.
    """
    self.path = pathlib.Path(path)
    self.rows: dict[str, Row] = {}
    self.repaired = 0
    self.skipped: list[int] = []
    make_folder(self.path.parent)
    try:
      self._file = os.open(
        self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
      )
    except OSError as error:
      raise _cannot_write(self.path, error) from error
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(self._file)
      raise ValueError(
        f'{self.path}: another run writes here; wait for it or choose another '
        '--workdir'
      ) from None
    self._read()

  def _read(self) -> None:
    data = self.path.read_bytes()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      self.repaired = len(data) - whole
      os.ftruncate(self._file, whole)
      logging.warning(
        '%s: cut away a torn last line of %d bytes', self.path, self.repaired
      )
    for number, line in enumerate(data[:whole].split(b'\n')[:-1], 1):
      try:
        row = json.loads(line)
        self.rows[row['key']] = row
      except (ValueError, KeyError, TypeError):
        self.skipped.append(number)
    if self.skipped:
      logging.warning(
        '%s: lines %s are no rows and are ignored', self.path, self.skipped
      )

  def append(self, rows: Iterable[Row]) -> None:
    """Writes rows, all or none, and returns when they are on the disk.

    Raises:
      OSError: no room; what stood in the file before still stands there.
    """
    rows = list(rows)
    data = ''.join(
      json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n'
      for row in rows
    ).encode(errors='replace')
    size = os.fstat(self._file).st_size
    try:
      written = 0
      while written < len(data):
        written += os.write(self._file, data[written:])
      os.fsync(self._file)
    except OSError as error:
      os.ftruncate(self._file, size)
      raise _cannot_write(self.path, error) from error
    self.rows.update((row['key'], row) for row in rows)

  def close(self) -> None:
    """Gives the lock back."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1

  def __enter__(self) -> 'Results':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def make_folder(path: str | os.PathLike) -> None:
  """Makes a folder and those above it, where they are not there.

  Raises:
    CannotWrite: this cannot be.
  """
  try:
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _cannot_write(path, error) from error


def _cannot_write(path: str | os.PathLike, error: OSError) -> CannotWrite:
  return CannotWrite(error.errno, error.strerror, str(path))


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
  """Replaces a file at once: readers see the old one or the new one, whole.

  Raises:
    OSError: the old file, if any, is untouched.
  """
  path = pathlib.Path(path)
  draft = path.with_name(f'.{path.name}.new')
  raw = data.encode(errors='replace') if isinstance(data, str) else data
  try:
    with open(draft, 'wb') as f:
      f.write(raw)
      f.flush()
      os.fsync(f.fileno())
    os.replace(draft, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)
    raise _cannot_write(path, error) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes indented JSON in the order of the keys; see `write_file`."""
  write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_arrays(
  path: str | os.PathLike, arrays: Mapping[str, Any], *, compress: bool = False
) -> None:
  """Writes an .npz file; see `write_file`."""
  raw = io.BytesIO()
  (np.savez_compressed if compress else np.savez)(raw, **arrays)
  write_file(path, raw.getvalue())


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All arrays of an .npz file that this code can make again.

  Raises:
    ValueError: the file is cut or damaged.
    OSError: it cannot be read.
  """
  try:
    with np.load(path) as found:
      return {name: found[name] for name in found.files}
  except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(
      f'{path} is damaged ({error}); delete it: the same command makes it again'
    ) from error


def cut_log(path: pathlib.Path, step: int) -> None:
  """Drops rows of steps that will be done again, and lines torn by a kill.

  Args:
    path: of a log of JSON lines, each with its `step`; may not be there.
    step: from which a training goes on.
  """
  kept = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      if json.loads(line)['step'] < step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      continue
  write_file(path, ''.join(line + '\n' for line in kept))
