"""What reading 32 attention rows adds to a forward pass, in time and memory, against length, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import timing
from benchmarks.memory import peaks_mib
from benchmarks.passes import N_ROWS, build_model, open_pass, random_ids

TITLE = "Capture against a plain pass, on a CPU"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PAIRS = (7, 25)
"""At least and at most so many pairs per length, by what `BUDGET_S` seconds pay."""
BUDGET_S = 30.0
LONG = 32768
"""From here on a pass takes minutes: fewer pairs, and one process per peak."""
LONG_PAIRS = 5
PROCESSES = 2


def measure(say: Callable[[str], Any], *, quick: bool = False) -> list[dict[str, Any]]:
    """One record per length: median seconds, ratios pair by pair, peaks of processes of their own."""
    model = build_model()
    passes = {kind: open_pass(kind, model) for kind in ("plain", "capture")}
    records = []
    for length in (256, 1024) if quick else LENGTHS:
        ids = random_ids(length)
        clocked = {kind: lambda run=run, ids=ids: timing.seconds(lambda: run(ids)) for kind, run in passes.items()}
        warm = sum(one() for one in clocked.values())
        at_least = LONG_PAIRS if length >= LONG else PAIRS[0]
        n_pairs = 2 if quick else timing.n_rounds_for(warm, at_least=at_least, at_most=PAIRS[1], budget_s=BUDGET_S)
        rounds = timing.interleave(clocked, n_pairs)
        n_processes = 1 if quick or length >= LONG else PROCESSES
        peaks = {kind: peaks_mib(length, kind, n_processes) for kind in passes}
        records.append(
            {
                "length": length,
                "rows": N_ROWS,
                "pairs": n_pairs,
                "plain_s": timing.median(rounds, "plain"),
                "capture_s": timing.median(rounds, "capture"),
                "time_ratio": timing.ratio(rounds, "capture", "plain"),
                "model_mib": peaks["plain"].pop("model_mib"),
                "plain_peak_mib": peaks["plain"],
                "capture_peak_mib": {key: peaks["capture"][key] for key in ("median", "min", "max")},
                "memory_ratio": peaks["capture"]["median"] / peaks["plain"]["median"],
            }
        )
        say(f"  {records[-1]}")
    return records


def table(records: list[dict[str, Any]]) -> list[str]:
    """The records as Markdown."""
    lines = [
        f"A Llama of {records[0]['model_mib'] / 4 * 2**20 / 1e6:.0f} M parameters with random weights (hidden 512, 8 "
        f"layers, 8 heads, 4 key/value heads), float32: one pass that reads and reduces {records[0]['rows']} attention "
        "rows of every layer and head, against the same model's plain sdpa pass with the same `logits_to_keep`.",
        "",
        "*Time ratio*: capture / plain within a pair, the two run in turn in one process (A B, B A, ...); median and "
        "range of the pairs. *Peak*: resident memory above what the loaded model holds, each in a process of its own; "
        f"mean of {PROCESSES} (from {LONG:,} tokens on, of one). Both targets are 1.05 at 4K and 16K tokens.",
        "",
        "| tokens | pairs | plain s | capture s | time ratio | plain peak MiB | capture peak MiB | memory ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        plain, capture = (f"{r[f'{kind}_peak_mib']['median']:.1f}" for kind in ("plain", "capture"))
        lines.append(
            f"| {r['length']} | {r['pairs']} | {r['plain_s']:.2f} | {r['capture_s']:.2f} | "
            f"{timing.spread(r['time_ratio'])} | {plain} | {capture} | **{r['memory_ratio']:.3f}** |"
        )
    return lines
