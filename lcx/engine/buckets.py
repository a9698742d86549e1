"""Prompt lengths are rounded up, so that few programs are compiled."""


def bucket(length: int, multiple: int = 128) -> int:
  """The smallest bucket that holds `length` tokens.

  Buckets are eighths of a power of two, at least `multiple` apart: at most an
  eighth of the work is padding, and at most 8 programs serve each doubling.
  """
  if length < 1:
    raise ValueError(f'a prompt of {length} tokens cannot be read')
  step = max(multiple, 1 << max((length - 1).bit_length() - 4, 0))
  step = -(-step // multiple) * multiple
  return -(-length // step) * step
