"""What can each checkpoint of a run do? Fine-tune it lightly, ask it, and hold its heads against the answers.

    python examples/probe_checkpoints.py RUN [LENGTHS]

RUN is a run folder (`lccp score` made it; its checkpoints are still where they were), LENGTHS a band of tokens such as
`8K-16K` (default: 512-1024). Interrupt it at any time: finished checkpoints stay, and the same call resumes.
"""

from __future__ import annotations

import sys

from lccp_interp import Run, probe
from lccp_interp.behaviour.mixture import Length
from lccp_interp.behaviour.probe import ProbeStudy
from lccp_interp.dynamics import correlate, run_series


def main(path: str, lengths: str = "512-1024") -> None:
    """Probe the run at `path` and print how its cheap metrics go with the results."""
    study = ProbeStudy(tasks=("longbio", "ruler-niah_multikey_1"), lengths=(Length.parse(lengths),))
    results = probe(
        path, study, progress=lambda done, total, name: print(f"\r{done / max(total, 1):4.0%}  {name}", end="")
    )
    print()
    print(results)
    cheap, probes = run_series(Run.open(path))
    print(correlate(cheap, probes).select("cheap", "probe", "transform", "n", "r", "ci_low", "ci_high", "p", "q"))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
