"""Stands behind a process of several and says who died.

When a host is lost, JAX ends the other processes from C++: an abort with a
stack trace, in which Python has no say. So the standard error of each process
goes through this one, which passes it on, leaves the trace away, and ends with
one line. `experiments/processes.py` starts it; it lives until its input ends.
"""

import json
import re
import signal
import sys

NAMES = '#lcx processes '
_NOISE = re.compile(
  r'^(\*\*\* Check failure|    @ |=== Source Location|external/)'
)
_SILENT = 'stopped sending heartbeats'
_LEADER = 'Either the leader task'
_FATAL = 'JAX distributed service detected fatal errors'


def verdict(lines: list[str], names: list[str], seconds: int) -> str | None:
  """The last line: who died, from what JAX wrote; None: nobody did.

  Args:
    lines: of the process' standard error.
    names: hosts by process; [] where they are not known yet.
    seconds: of the heartbeat.
  """
  if not any(_FATAL in line for line in lines):
    return None
  dead: set[int] = set()
  for i, line in enumerate(lines):
    if _LEADER in line:
      dead.add(0)
    if _SILENT in line:
      for after in lines[i + 1 :]:
        ids = re.findall(r'task:(\d+)|^(\d+)$', after.strip())
        if not ids:
          break
        dead |= {int(a or b) for a, b in ids}
  if not dead:
    return 'error: another process died; see above'
  who = ', '.join(
    f'{i} ({names[i]})' if i < len(names) else str(i) for i in sorted(dead)
  )
  return (
    f'error: process {who} died: nothing heard for up to {seconds} s; the same '
    'command on every host goes on from here'
  )


def main(argv: list[str]) -> None:
  """Passes lines from standard input on to standard error."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  names: list[str] = []
  told: list[str] = []
  for raw in sys.stdin.buffer:
    line = raw.decode(errors='replace').rstrip('\n')
    if line.startswith(NAMES):
      names = json.loads(line.removeprefix(NAMES))
      continue
    told = [*told[-50:], line]
    if not _NOISE.match(line):
      sys.stderr.write(line + '\n')
      sys.stderr.flush()
  last = verdict(told, names, int(argv[1]))
  if last:
    sys.stderr.write(last + '\n')


if __name__ == '__main__':
  main(sys.argv)
