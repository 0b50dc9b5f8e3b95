"""The demo: the whole study on the bundled trajectory, as `lccp demo` runs it.

It is a study like any other: what is special are the constants below. Head scores of all checkpoints, then (unless in
a hurry) the interference grid, corpus perplexity, the probe after light fine-tuning and the causal check on fewer of
them, figures and report. It refuses to know what comes out. Cost of running it: about three minutes for the heads on
two cores, twice as much for the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.study import check_study

if TYPE_CHECKING:
    from lccp_interp.study.form import Study

LENGTHS, DEPTHS = (256, 512, 1024, 2048, 4096), (0, 25, 50, 75, 100)
DISTANCES, INTERFERENCES = (64, 256, 1024), (0, 128, 512, 1024, 2048)
CORPORA, CORPUS_LENGTH, CORPUS_DOCUMENTS = ("questions", "repeats", "stories"), 2048, 4
FORMATS = ("pdf", "svg", "png", "tex", "csv", "md")
PROBE_TASKS = ("longbio", "ruler-niah_single_2", "ruler-niah_multikey_1", "ruler-qa", "mrcr")
PROBE_LENGTHS = "512-1024"
REMOVED, N_CASES, N_DRAWS = (1, 2, 4), 20, 5
"""How many of the best heads are removed, in how many cases, and how many random sets are held against them."""
N_PROBED, N_INTERFERED, N_ABLATED = 8, 4, 4
"""Checkpoints from the base to the last that are probed, asked over interference and robbed of heads: evenly spread."""


def demo_study(
    out: str | Path, *, samples: int = 4, length: int = 1024, seed: int = 0, device: str = "auto", quick: bool = False
) -> Study:
    """The demo as a study.

    Args:
        out: the run folder.
        samples: needles, with a haystack each, per length and depth.
        length: tokens at which heads are compared and removed.
        seed: of needles, haystacks, items and fine-tuning.
        device: as in `load_model`.
        quick: head scores only.

    Without the packages of the extra `train` nothing is fine-tuned.

    Example:
        >>> [probe.probe for probe in demo_study("runs/demo").probes]
        ['corpus', 'ask']
    """
    niah = {"task": "niah", "lengths": list(LENGTHS), "depths": list(DEPTHS), "samples": samples}
    study: dict[str, Any] = {
        "out": str(out),
        "checkpoints": "bundled",
        "tasks": [niah],
        "seed": seed,
        "figures": {"length": length, "formats": list(FORMATS)},
        "execution": {"device": device},
    }
    with_sft = importlib.util.find_spec("trl") is not None
    if not quick:
        interference = {
            "task": "interference",
            "distances": list(DISTANCES),
            "interferences": list(INTERFERENCES),
            "samples": samples,
            "metrics": ["retrieval"],
            "checkpoints": N_INTERFERED,
        }
        corpora = {
            "probe": "corpus",
            "corpora": list(CORPORA),
            "length": CORPUS_LENGTH,
            "documents": CORPUS_DOCUMENTS,
        }
        asked = {
            "probe": "ask",
            "tasks": list(PROBE_TASKS),
            "lengths": [PROBE_LENGTHS],
            "checkpoints": N_PROBED,
            "heads": "ends",
        }
        removed = {
            "k": list(REMOVED),
            "length": length,
            "n_cases": N_CASES,
            "n_draws": N_DRAWS,
            "checkpoints": N_ABLATED,
        }
        study |= {
            "tasks": [niah, interference],
            "probes": [corpora, asked] if with_sft else [corpora],
            "ablations": [removed],
        }
    return check_study(study)
