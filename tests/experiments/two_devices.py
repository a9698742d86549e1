"""An evaluation over two sequence shards, for test_processes.py."""

from configs import common


def get_config(arg=''):
  del arg
  config = common.base('evaluate', 'Two devices')
  config.model = 'preset:tiny'
  config.methods = common.table({'apb': {'hosts': 2}})
  config.tasks = common.table({'niah_single_2': {}})
  config.lengths = (400,)
  config.samples = 1
  config.protocols = ('whole',)
  config.max_new_tokens = 3
  config.mesh = (1, 2, 1)
  config.seed = 0
  return config
