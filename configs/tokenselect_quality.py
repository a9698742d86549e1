"""TokenSelect on RULER and key-value retrieval: what each choice is worth.

python -m experiments.run --config=configs/tokenselect_quality.py

Arguments: `vary=k|chunk|local|tail|threshold|vote|scoring` (one column of the
table), `method=NAME` (one row of it beside dense and tokenselect), `task=NAME`
(one, several with `/` between them, or `ruler` for all of it), `length=N`,
`samples=N`, `k=N` (of all rows: at 8K the paper's 2048 is no sparse prefill),
`tail=N` (all rows read the last N tokens of a prompt densely), `heads=14/2`
(query and kv heads of --config.model, for the release's head mapping), `smoke`.
`needle` takes the bundled model, with lists an eighth as long and tasks it can
do: minutes on a CPU. Another model:
--config.model=qwen2.5-coder-0.5b-instruct.gguf, with `heads=14/2,length=32768`.

A row's `count_hits` and `count_selections` say how often decode's list served
again; `count_lost_votes` / `count_selections` is the mean share of votes that a
list by page bounds or by int8 copies lacks. Density stands beside every score;
above 0.5 a row is no sparse one.
"""

from configs import common

TASKS = {
  'niah_multikey_1': {},
  'niah_multivalue': {},
  'vt': {},
  'kv_retrieval': {},
}
BOUNDS = {'page': 16, 'stats': True}


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    vary='',
    method='',
    task='',
    length=8192,
    samples=100,
    k=2048,
    tail=0,
    heads='9/3',
    needle=False,
  )
  config = common.base('evaluate', 'TokenSelect: what each choice is worth')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  found = rows(arg)
  if arg.method:
    if arg.method not in found:
      raise ValueError(
        f'config argument method={arg.method!r} is not one of '
        f'{", ".join(found)}'
      )
    found = {name: found[name] for name in ('tokenselect', arg.method)}
  config.methods = common.table({'dense': {}} | found)
  config.tasks = common.tasks(arg.task, TASKS)
  config.lengths = (arg.length,)
  config.samples = arg.samples
  config.dtype = 'auto'
  config.protocols = ('whole', 'context_first')
  config.max_new_tokens = 0
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  config.shared_gib = 0.0
  config.transfer_guard = 'allow'
  if arg.needle:
    config.model = 'lcx/models/needle'
    config.protocols = ('whole',)
    config.max_new_tokens = 24
    config.tasks = common.tasks(
      arg.task, {'niah_single_2': {}, 'niah_multikey_1': {}}
    )
  if arg.smoke:
    config.model = 'preset:tiny'
    config.methods = common.table({'dense': {}, 'tokenselect': method(16)})
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.protocols = ('whole',)
    config.max_new_tokens = 2
  return config


def method(small, *, prefill=None, decode=None, cache=None, **both):
  """Numbers of a tokenselect, the paper's divided by `small`."""
  numbers = {'k': 2048 // small, 'sink': 128 // small, 'local': 512 // small}
  numbers |= both
  chunk = {'chunk': 512 // small, 'merged': 2048 // small}
  fields = {
    'method': 'tokenselect',
    'prefill': {**numbers, **chunk, **(prefill or {})},
    'decode': {**numbers, **(decode or {})},
  }
  return fields | ({'cache': cache} if cache else {})


def modulo(heads):
  """Order of voters in which query head h meets kv head h % K.

  The release's mapping, which no checkpoint means (arXiv:2411.02886, algorithm
  2, line 4): an ablation, so it stands here.
  """
  n, kv = (int(x) for x in heads.split('/'))
  return tuple(sorted(range(n), key=lambda h: (h % kv, h)))


def rows(arg):
  """Labels hold no dots: they are names of fields."""
  small = 8 if arg.needle else 1
  heads = '8/2' if arg.needle else arg.heads
  length, whole = arg.length, arg.k

  def make(prefill=None, **fields):
    prefill = {'tail': arg.tail} | (prefill or {}) if arg.tail else prefill
    fields = {'k': whole // small} | fields
    return method(small, prefill=prefill, **fields)

  pruned = {'scoring': 'pruned', 'scored': 8192 // small}
  columns = {
    'k': {
      f'k={n // small}': make(k=n // small)
      for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
      if 2 * n // small <= length  # else nothing is left out
    },
    'chunk': {
      'chunk=256': make(prefill={'chunk': 256 // small}),
      'chunk=2048': make(
        prefill={'chunk': 2048 // small, 'local': 2048 // small}
      ),
      'l2': make(pooling='l2'),
      'merge=95': make(prefill={'merge': 0.95}),
      'merge=90 to 1024': make(prefill={'merge': 0.9, 'merged': 1024 // small}),
    },
    # The paper's window is the chunk itself: its first rows see nothing that
    # stands right before them, unless it wins votes.
    'local': {
      f'local={n}': make(local=n // small, k=(whole + 512 - n) // small)
      for n in (1024, 1536)
      if n < whole + 512
    },
    # What only the question asks for is outvoted in the query of its chunk.
    'tail': {f'tail={n}': make(prefill={'tail': n}) for n in (64, 256)},
    'threshold': {
      f'threshold={n}': make(decode={'threshold': n / 100})
      for n in (50, 60, 70, 80, 90, 100)
    }
    | {'no selection cache': make(decode={'reuse': 1})},
    'vote': {
      'top k': make(vote='top_k'),
      'head vote': make(vote='head_vote'),
      'scaled logits': make(logits='scaled'),
      'energy': make(heads='energy'),
      'pool=5': make(pool=5),
      'modulo heads': make(voters=modulo(heads)),
    },
    'scoring': {
      'pruned, top k': make(decode=pruned | {'vote': 'top_k'}, cache=BOUNDS),
      'pruned': make(decode=pruned, cache=BOUNDS),
      'budget=8192': make(
        decode={'scoring': 'budget', 'scored': 8192 // small}, cache=BOUNDS
      ),
      'budget=4096': make(
        decode={'scoring': 'budget', 'scored': 4096 // small}, cache=BOUNDS
      ),
      'int8 copies': make(decode={'score_bits': 8}),
    },
  }
  if arg.vary and arg.vary not in columns:
    raise ValueError(
      f'config argument vary={arg.vary!r} is not one of {", ".join(columns)}'
    )
  found = {'tokenselect': make()}
  for name, column in columns.items():
    if arg.vary in ('', name):
      found |= column
  return found
