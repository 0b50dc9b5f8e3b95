"""Capture against the other ways of getting at the same rows, on a CPU: how many times faster and smaller it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.machine import available_bytes
from benchmarks.memory import peaks_mib
from benchmarks.passes import N_ROWS, SHAPE, build_model, open_pass, random_ids

TITLE = "Capture against other ways to the same rows, on a CPU"
PEERS = {
    "eager": "transformers, eager `output_attentions`",
    "transformer_lens": "TransformerLens, `run_with_cache` on `hook_pattern`",
    "wu": "greedy decoding with eager attention, top-1 per head (as Wu et al.'s code does)",
}
LENGTH = 1024
ROUNDS = 5
PROCESSES = 1
"""Peaks of these differ by factors; one process each says enough."""


def longest_that_fits(free_bytes: float) -> int:
    """The longest length, a multiple of 1024, whose full maps a pass can hold.

    A pass keeps one map per layer and works on about three more.

    Example:
        >>> longest_that_fits(16e9)
        6144
    """
    per_token_squared = (SHAPE["num_hidden_layers"] + 3) * SHAPE["num_attention_heads"] * 4
    return max(1024, int((free_bytes / per_token_squared) ** 0.5) // 1024 * 1024)


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per length and peer: seconds, and its time and memory over capture's."""
    longest = longest_that_fits(0.7 * available_bytes())
    model = build_model()
    # The lens changes its model in place, so it gets one of its own, with the same weights.
    passes = {
        kind: open_pass(kind, build_model() if kind == "transformer_lens" else model) for kind in ("capture", *PEERS)
    }
    records = []
    for length in (256, 512) if quick else (LENGTH, longest):
        ids = random_ids(length)
        clocked = {kind: lambda run=run, ids=ids: timing.seconds(lambda: run(ids)) for kind, run in passes.items()}
        for run in passes.values():
            run(random_ids(256))
        rounds = timing.interleave(clocked, 2 if quick else ROUNDS)
        ours = peaks_mib(length, "capture", PROCESSES)["median"]
        for kind in PEERS:
            peak = peaks_mib(length, kind, PROCESSES)["median"]
            records.append(
                {
                    "peer": kind,
                    "length": length,
                    "rows": N_ROWS,
                    "rounds": len(rounds),
                    "capture_s": timing.median(rounds, "capture"),
                    "peer_s": timing.median(rounds, kind),
                    "times_faster": timing.ratio(rounds, kind, "capture"),
                    "capture_peak_mib": ours,
                    "peer_peak_mib": peak,
                    "times_smaller": peak / ours,
                }
            )
            say(f"  {records[-1]}")
    return records


def table(records: list[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    lines = [
        f"The same model, {records[0]['rows']} rows, {LENGTH} tokens and the longest length at which full attention "
        "maps fit into this machine's memory. All end with the same numbers per row; all make logits of the last rows "
        "only. *Times faster*: the other's time over capture's within a round, median and range of "
        f"{records[0]['rounds']} rounds. *Times smaller*: the same with the peaks above the loaded model, each in a "
        "process of its own. The decoding loop writes its answer itself; capture is given the answer.",
        "",
        "| tokens | against | its s | capture s | times faster | its peak MiB | capture peak MiB | times smaller |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['length']} | {PEERS[r['peer']]} | {r['peer_s']:.2f} | {r['capture_s']:.2f} | "
        f"{timing.spread(r['times_faster'], 1)} | {r['peer_peak_mib']:.0f} | {r['capture_peak_mib']:.0f} | "
        f"**{r['times_smaller']:.1f}** |"
        for r in records
    ]
    return lines
