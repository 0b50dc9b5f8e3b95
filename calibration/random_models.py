"""Models with random weights have no retrieval heads: nothing was learnt, so nothing may be found.

Tiny models of several families, drawn narrow (as models are initialised: attention almost even) and wide (heads stare
at single tokens), are scored on needle-in-a-haystack cases through a run folder, as a user's checkpoints are. Several
seeds stand as checkpoints of one run, so that births and deaths have a chance to appear, too.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TITLE = "Models with random weights"
FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3_text")
WEIGHT_STD = (0.02, 0.3)
SEEDS = (1, 2, 3, 4, 5)
LENGTHS = (128, 512)
DEPTHS = (0, 25, 50, 75, 100)
SAMPLES = 8


def grow(root: Path, family: str, weight_std: float, seeds: Sequence[int]) -> Path:
    """A trajectory folder of random models, one per seed, with the organism's tokenizer."""
    from transformers import AutoTokenizer

    from lccp_interp.capture import architectures
    from lccp_interp.organism.tokenizer import save_tokenizer

    architecture = dataclasses.replace(architectures.named(family), weight_std=weight_std)
    entries = []
    for number, seed in enumerate(seeds):
        folder = root / f"seed-{seed}"
        folder.mkdir(parents=True)
        save_tokenizer(folder)
        n_tokens = len(AutoTokenizer.from_pretrained(folder))
        architectures.tiny_model(architecture, seed=seed, vocab_size=n_tokens).save_pretrained(folder)
        entries.append({"name": folder.name, "path": folder.name, "tokens_seen": 1000 * number, "stage": "train"})
    (root / "trajectory.json").write_text(json.dumps({"name": family, "checkpoints": entries}))
    return root


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per family, spread of the weights and length."""
    from lccp_interp.dynamics import census, events, score_table
    from lccp_interp.sweep import score

    records = []
    for family in FAMILIES[:1] if quick else FAMILIES:
        for weight_std in WEIGHT_STD:
            say(f"  {family}, weights of standard deviation {weight_std}")
            with tempfile.TemporaryDirectory() as folder:
                run = score(
                    grow(Path(folder) / "models", family, weight_std, SEEDS[:2] if quick else SEEDS),
                    Path(folder) / "run",
                    lengths=LENGTHS[:1] if quick else LENGTHS,
                    depths=DEPTHS,
                    samples=SAMPLES,
                    metrics=["retrieval"],
                    device="cpu",
                )
                for length in LENGTHS[:1] if quick else LENGTHS:
                    table = score_table(run, length=length)
                    records.append(
                        {
                            "family": family,
                            "weight_std": weight_std,
                            "length": length,
                            "models": table["checkpoint"].n_unique(),
                            "cases": int(table["n"].max()),
                            "heads": table.height,
                            "highest": float(table["score"].max()),
                            "above_threshold": int(census(table, rule="threshold")["n_retrieval_heads"].sum()),
                            "retrieval_heads": int(census(table)["n_retrieval_heads"].sum()),
                            "events": events(table).height,
                        }
                    )
    return records


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Retrieval heads, births or deaths where nothing was learnt."""
    return [
        f"{r['family']}, std {r['weight_std']}, {r['length']} tokens: {r['retrieval_heads']} retrieval heads, "
        f"{r['events']} events"
        for r in records
        if r["retrieval_heads"] or r["events"]
    ]


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    first = records[0]
    n_heads, highest = sum(r["heads"] for r in records), max(r["highest"] for r in records)
    return [
        f"Tiny models of random weights, seeds {', '.join(map(str, SEEDS))} as the checkpoints of one run, "
        f"{first['cases']} cases in the bundled language per length, through `score` and the run folder. Bound: no "
        "retrieval head, no birth, no death, provisional ones included.",
        "",
        "| family | std of weights | length | heads x models | highest score | score > 0.1 | retrieval heads "
        "| births and deaths |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {r['family']} | {r['weight_std']} | {r['length']} | {r['heads']} | {r['highest']:.3f} | "
            f"{r['above_threshold']} | {r['retrieval_heads']} | {r['events']} |"
            for r in records
        ),
        "",
        f"How to read it. Of {n_heads} scores of heads that learnt nothing the highest is {highest:.3f}. The other "
        "side, a transformer whose weights are set by hand so that exactly one head copies, is a test: "
        "`tests/planted.py` builds it, that head scores 1 and all others 0, and every greedy answer is right.",
    ]
