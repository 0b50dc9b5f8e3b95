"""The command line.

`lccp demo | score | watch | plan | check | checkpoints | probe | ablate | circuit | heads | compare | across | import |
figures | report | correlate | budget | saturation | verify | organism train`.

Each command parses its options, calls one function of the package and prints what came back. It refuses to compute
anything itself. Results go to standard output (tables for people, JSON or CSV for scripts), progress and messages to
standard error. Exit codes: 0 done, 2 a mistake of input or an interruption (one line says what, where and what to do;
`--debug` shows the traceback). Heavy imports live inside the commands, so that `lccp --help` answers at once.

`terminal` holds what commands share, `models` the commands that load models, `monitor` the one that watches a training,
`behaviour` those that ask them, `causal` those that change them, `runs` those that read a run, `store`
those that look after its files.
"""

from __future__ import annotations

from lccp_interp.cli import behaviour, causal, models, monitor, runs, sources, store, study
from lccp_interp.cli.terminal import main

__all__ = ["behaviour", "causal", "main", "models", "monitor", "runs", "sources", "store", "study"]
