"""Small model files that load; copy one before breaking it."""

import pytest

from tests.models import model_files as files


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """A folder that loads; copy it before breaking it."""
  return files.write_folder(
    tmp_path_factory.mktemp('hf') / 'model', files.raw_config()
  )


@pytest.fixture(scope='session')
def gguf_file(tmp_path_factory):
  """A GGUF file that loads; copy it before breaking it."""
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  return files.write_gguf(path, files.raw_config())
