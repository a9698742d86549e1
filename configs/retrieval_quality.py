"""Retrieval on RULER's needles and key-value retrieval: graph, exact, dense.

python -m experiments.run --config=configs/retrieval_quality.py

What the graph loses against the exact search of the same tokens, at 100 and at
2000 tokens a query head, and both against dense. `exact` and `graph` take what
they are told; `graph 100 wide` takes more keys where it has too little of the
softmax, as the method does by itself. Arguments: `length=N`, `samples=N`,
`top=N` (that number of tokens alone), `index=fastscan` (in the graph's place;
`bits=2`: of its codes), `exact=flat` (faiss's, of 16-bit keys, in numpy's
place), `protocol=whole` (that one alone), `method=NAME` (beside dense; several
with `/` between them; `alone` leaves dense out, for pieces that
`experiments.quality_tables` joins), `cluster` (adds the twin on the device),
`smoke`. `needle` takes the bundled model at 4K, with an eighth of the tokens
and tasks it can do: minutes on a CPU. Another model:
--config.model=qwen2.5-coder-0.5b-instruct.gguf, with `length=32768`.

Without faiss the cluster index serves in the graph's place, under its name.
Density stands beside every score; above 0.5 a row is no sparse one.
"""

from configs import common

TASKS = {
  'niah_single_2': {},
  'niah_multikey_1': {},
  'niah_multivalue': {},
  'kv_retrieval': {},
}


def get_config(arg=''):
  arg = common.parse_arg(
    arg, length=0, samples=100, top=0, cluster=False, needle=False,
    index='graph', bits=4, exact='exact', protocol='', method='', alone=False,
  )  # fmt: skip
  config = common.base('evaluate', 'Retrieval: graph, exact search, dense')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  tops = (arg.top,) if arg.top else (100, 2000)
  small = 8 if arg.needle else 1
  methods = {'dense': {}} | rows(tops, small, arg)
  config.methods = common.methods(arg.method, methods, arg.alone)
  config.tasks = common.table(TASKS)
  config.lengths = (arg.length or 8192,)
  config.samples = arg.samples
  config.dtype = 'auto'
  both = ('whole', 'context_first')
  config.protocols = (arg.protocol,) if arg.protocol else both
  config.max_new_tokens = 0
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.transfer_guard = 'allow'
  if arg.needle:
    config.model = 'lcx/models/needle'
    config.dtype = 'float32'
    config.lengths = (arg.length or 4096,)
    config.protocols = ('whole',)
    config.max_new_tokens = 24
    config.tasks = common.table(
      {'niah_single_2': {'questions': 1}, 'niah_multikey_1': {'questions': 1}}
    )
  if arg.smoke:
    config.model = 'preset:tiny'
    config.methods = common.table({'dense': {}, 'graph': method(16, 'graph')})
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.protocols = ('whole',)
    config.max_new_tokens = 2
  return config


def method(small, index, top=256, **decode):
  """Numbers of a retrieval, their tokens divided by `small`.

  `mass` is 0: no query gets more keys than it is told.
  """
  window = {'sink': 128 // small, 'recent': 512 // small}
  numbers = {'index': index, 'top': top // small, 'mass': 0.0}
  return {
    'method': 'retrieval',
    'decode': window | numbers | decode,
    'cache': window,
  }


def rows(tops, small, arg):
  """Labels hold no dots: they are names of fields."""
  found, bits = {}, {'bits': arg.bits} if arg.bits != 4 else {}
  for top in tops:
    found |= {
      f'{index} {top // small}': method(small, index, top, **bits)
      for index in (arg.index, arg.exact)
    }
    if top <= 100:
      found[f'{arg.index} {top // small} wide'] = method(
        small, arg.index, top, mass=0.8, most=2000 // small, **bits
      )
    if arg.cluster:
      found[f'cluster {top // small}'] = {
        'method': 'retrieval_cluster',
        'decode': {
          'top': top // small,
          'probe': 4096 // small,
          'sink': 128 // small,
          'recent': 512 // small,
          'segment': 1024 // small,
        },
      }
  return found
