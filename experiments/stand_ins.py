"""What runs in place of a method whose package is not installed.

Where quality is compared, a run with one column under another name says more
than no run. What is timed or asked for by itself is refused instead.
"""

import dataclasses

from lcx.methods.base import Method
from lcx.methods.compose import get_method, why_not
from lcx.methods.retrieval import RetrievalDecode
from lcx.select import vector_index


def stand_in(method: Method) -> tuple[Method, str]:
  """The method, or the one that runs in its place, and why in one line.

  Retrieval by an index that faiss searches becomes `retrieval_cluster` with the
  same prefill, sink, recent and top: as many tokens for each query head.
  """
  decode = method.decode
  if not isinstance(decode, RetrievalDecode):
    return method, ''
  try:
    vector_index.require(decode.index)
    return method, ''
  except ValueError as error:
    why = str(error)
  twin = get_method('retrieval_cluster')
  numbers = {n: getattr(decode, n) for n in ('top', 'sink', 'recent')}
  numbers['probe'] = max(twin.decode.probe, decode.top)
  found = dataclasses.replace(
    twin,
    prefill=method.prefill,
    decode=dataclasses.replace(twin.decode, **numbers),
  )
  if why_not(found):
    return method, ''  # refused with its own reason
  return found, f'{why} and runs in place of this one, all keys on the device'
