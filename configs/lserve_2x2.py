"""LServe's two kinds of sparsity, static and dynamic, each on and off.

python -m experiments.run --config=configs/lserve_2x2.py:profile=FILE

FILE comes from configs/train_head_profile.py (default: what it writes under
--workdir=runs/head_profile). Arguments: `budget=N`, `length=N`, `samples=N`,
`task=NAME` (one, several with `/` between them, or `ruler` for all of it),
`protocol=whole|context_first`, `method=NAME` (one row beside dense), `smoke`,
`piece=N` (pages are chosen for pieces of at most N tokens, 1 to 16),
`looseness=X` (share of the bounds' mean width that scores lose, 0 to 1),
`scorer=bounds|moments`, `logical=N` (tokens of a logical page).
Times of the same four stand in configs/lserve_speed.py.
"""

from configs import common

PROFILE = 'runs/head_profile/profile.json'


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    method='',
    profile=PROFILE,
    budget=2048,
    length=8192,
    samples=100,
    task='',
    protocol='',
    piece=16,
    looseness=0.0,
    scorer='bounds',
    logical=16,
  )
  config = common.base('evaluate', 'LServe: static and dynamic sparsity')
  config.model = '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.dtype = 'bfloat16'
  static = {'method': 'lserve', 'profile': arg.profile}
  decode = {
    'budget': arg.budget,
    'crossover': 0,
    'selected_piece': arg.piece,
    'looseness': arg.looseness,
    'scorer': arg.scorer,
  }
  cache = {'stats': arg.scorer, 'logical_page': arg.logical}
  dynamic = {'decode': decode, 'cache': cache}
  config.methods = common.methods(
    arg.method,
    {
      'dense': {},
      'static': static | {'decode': {'crossover': 2**30}},
      # Its prefill is the dense one, which is read once for both.
      'dynamic': {'method': 'dense+lserve+lserve'} | dynamic,
      'both': static | dynamic,
    },
  )
  tasks = ('niah_single_2', 'niah_multikey_1', 'niah_multivalue', 'vt')
  config.tasks = common.tasks(arg.task, {name: {} for name in tasks})
  config.lengths = (arg.length,)
  config.samples = arg.samples
  config.protocols = ('whole', 'context_first')
  if arg.protocol:
    config.protocols = (arg.protocol,)
  config.max_new_tokens = 0
  config.batch = 1
  config.capacity = 0
  config.seed = 0
  config.haystack = ''
  # Layer inputs of Qwen at 32K take 1.4 GB a question in bfloat16.
  config.shared_gib = 8.0
  config.transfer_guard = 'allow'
  if arg.smoke:
    config.model = 'preset:tiny'
    config.dtype = 'float32'
    both = config.methods.both
    both.decode.budget, both.profile = 384, 'alternate'
    config.methods = common.table({'dense': {}})
    config.methods.both = both
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.protocols = ('whole',)
    config.max_new_tokens = 2
  return config
