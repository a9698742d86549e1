"""RULER on real models: every method, both protocols, in pieces that resume.

python -m experiments.run --config=configs/ruler_real.py:length=4096 \
    --workdir=runs/ruler_real

Give one workdir to all pieces: rows that are there are not made again, and each
piece reports its own. Arguments: `model=qwen` (Qwen2.5-Coder-0.5B-Instruct, 4K
to 32K) or `model=smollm` (SmolLM2-135M-Instruct, 2K to 8K, and 16K beyond what
it was trained for); `length=`, `method=` (beside dense; several with `/`
between them), `task=` (likewise), `protocol=` (whole or context_first) narrow a
piece; `alone` leaves dense out, for pieces that run side by side in workdirs of
their own and that `experiments.quality_tables` joins; `few` keeps the methods
that are named in _METHODS; `samples=100` for cells that carry a claim;
`file=PATH` takes the prompts of a JSONL file of RULER's own (its name or folder
names the task) instead of these tasks; `smoke`.
The weights are files of `.cache/models`, or `--config.model=PATH`; every row
carries their SHA-256.

On one device `ring` in all layouts and `ulysses` are dense itself (a test says
so): name the other methods, and their rows are dense's.
"""

from configs import common

_MODELS = {
  'qwen': (
    '.cache/models/qwen2.5-coder-0.5b-instruct.gguf',
    (4096, 8192, 16384, 32768),
  ),
  'smollm': (
    '.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf',
    (2048, 4096, 8192, 16384),
  ),
}
# What is kept of a context must be below the shortest length. Each method has
# about an eighth of 8K tokens; those not named run with their own numbers.
_WINDOW = {'sink': 64, 'recent': 960}
_METHODS = {
  'dense': {},
  'streaming': {'prefill': _WINDOW, 'cache': _WINDOW, 'decode': _WINDOW},
  # By the question is better, but needs it while the context is read.
  'apb': {'prefill': {'compressor': 'snapkv'}},
  'lserve': {
    'decode': {'budget': 1024, 'sink': 64, 'recent': 256, 'crossover': 0}
  },
  'quest': {'decode': {'budget': 1024}},
  'snapkv': {'decode': {'budget': 1024, 'crossover': 0}},
  'tokenselect': {'prefill': {'k': 512}, 'decode': {'k': 512}},
  '*': {},
}


def get_config(arg=''):
  arg = common.parse_arg(
    arg,
    model='qwen',
    length=0,
    method='',
    task='',
    file='',
    protocol='',
    samples=20,
    few=False,
    alone=False,
  )
  if arg.model not in _MODELS:
    raise ValueError(
      f'config argument model={arg.model!r} is none of {", ".join(_MODELS)}'
    )
  model, lengths = _MODELS[arg.model]
  config = common.base('evaluate', f'RULER on {arg.model}')
  config.model = model
  config.dtype = 'auto'
  config.methods = common.methods(arg.method, _METHODS, arg.alone)
  if arg.few and not arg.method:
    del config.methods['*']
  config.tasks = common.tasks(arg.task or 'ruler', {})
  if arg.file and arg.task:
    raise ValueError('config arguments task and file: name one of the two')
  if arg.file:
    config.tasks = common.table({'file': {'file': arg.file}})
  config.lengths = (arg.length,) if arg.length else lengths
  config.samples = arg.samples
  both = ('whole', 'context_first')
  config.protocols = (arg.protocol,) if arg.protocol else both
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
    small = _METHODS | {'quest': {'decode': {'budget': 384}}}
    config.methods = common.methods(arg.method or 'quest', small, arg.alone)
    config.tasks = common.table({'niah_single_2': {}})
    config.lengths = (512,)
    config.samples = 1
    config.max_new_tokens = 4
  return config
