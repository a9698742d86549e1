"""Natural text to train on: where it comes from, what is left out.

The default is the prose of docstrings in installed packages (BSD, Apache and
PSF licences), so that nothing is downloaded and nothing is shipped. A user's
own files may take its place. What evaluation hides things in
(`haystacks.default_text`) is never trained on, wherever it stands.
"""

import ast
import functools
import hashlib
import importlib.util
import pathlib
import re

from lcx.tasks import haystacks

PACKAGES = ('numpy', 'scipy', 'jax')
_SHORTEST = 160  # characters of a paragraph worth reading
_HELD_OUT = 16  # one paragraph in so many is never trained on


def held_out(text: str, share: int = _HELD_OUT) -> bool:
  """Whether a text, by its SHA-256, belongs to evaluation."""
  return hashlib.sha256(text.encode()).digest()[0] % share == 0


def paragraphs(text: str) -> list[str]:
  """Blocks between empty lines, joined to one line each; no code, tables."""
  found = []
  for block in re.split(r'\n\s*\n', text):
    line = ' '.join(block.split())
    letters = sum(c.isalpha() or c == ' ' for c in line)
    if len(line) >= _SHORTEST and letters > 0.85 * len(line):
      found.append(line)
  return found


def docstrings(package: str) -> list[str]:
  """Paragraphs of all docstrings of an installed package, in file order.

  Raises:
    ValueError: the package is not installed.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f'text source {package!r} is not an installed package')
  root = pathlib.Path(spec.submodule_search_locations[0])
  found = []
  for path in sorted(root.rglob('*.py')):
    if 'tests' in path.parts:
      continue
    try:
      tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError):
      continue
    for node in ast.walk(tree):
      if isinstance(
        node,
        ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
      ):
        found.extend(paragraphs(ast.get_docstring(node) or ''))
  return found


def read(path: str) -> list[str]:
  """Paragraphs of a text file.

  Raises:
    ValueError: the file is empty, not UTF-8 text, or holds no prose.
    OSError: it cannot be read.
  """
  found = paragraphs(haystacks.read(path))
  if not found:
    raise ValueError(
      f'text file {path} has no paragraph of {_SHORTEST} characters of prose'
    )
  return found


def is_path(source: str) -> bool:
  """Whether a source is a text file; else it is an installed package."""
  return '/' in source or '.' in source


def digest(line: str) -> str:
  """SHA-256 of a paragraph."""
  return hashlib.sha256(line.encode()).hexdigest()


@functools.cache
def of_evaluation() -> frozenset[str]:
  """Digests of the paragraphs of the haystack that evaluation uses."""
  return frozenset(map(digest, paragraphs(haystacks.default_text())))


def split(sources: tuple[str, ...] = PACKAGES) -> tuple[list[str], list[str]]:
  """Paragraphs to train on and to hold out; duplicates fall out.

  Args:
    sources: names of installed packages, or paths of text files (anything
      with a dot or a slash).

  Returns:
    (training, held out), decided paragraph by paragraph by SHA-256: a
    sixteenth, and what stands in evaluation's haystack, is held out.

  Raises:
    ValueError: a source is no text, or nothing is left to train on.
    OSError: a file cannot be read.
  """
  seen: dict[str, None] = {}
  for source in sources:
    for line in read(source) if is_path(source) else docstrings(source):
      seen.setdefault(line)
  evaluated = of_evaluation()
  left = {line for line in seen if held_out(line) or digest(line) in evaluated}
  train = [line for line in seen if line not in left]
  if not train:
    raise ValueError(
      f'nothing of the text {", ".join(sources)} is left to train on: '
      "evaluation's haystack and a sixteenth of all paragraphs are held out; "
      'give more text'
    )
  return train, [line for line in seen if line in left]
