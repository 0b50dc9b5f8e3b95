"""What reading 32 attention rows adds to a forward pass, in time and memory, against length.

Time: the plain pass and the capturing pass run in turn in one process, their ratio is taken pair by pair, the median is
reported. Memory: every pass runs in a process of its own, which reports its peak resident size; what the loaded model
holds before the pass is subtracted. The eager way (full maps, `output_attentions`) stands beside them while it fits.

Run as a script it is the child that measures one memory figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1 << 17,
}
"""A Llama of about 25 M parameters with random weights; attention costs the same as with trained ones."""

N_ROWS = 32
LENGTHS = (1024, 2048, 4096, 8192)
EAGER_UP_TO = 4096
PAIRS = 5
PASSES = ("plain", "capture", "eager")


def build_model() -> Any:
    """The benchmark's model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor, kind: str) -> None:
    """One pass with logits at the last rows: plain, capturing needle mass of those rows, or eager with full maps."""
    from lccp_interp.capture.rows import tap_rows

    options = {"use_cache": False, "logits_to_keep": N_ROWS}
    if kind == "plain":
        model(ids, **options)
    elif kind == "capture":
        reduced = {}

        def reduce(layer: int, weights: torch.Tensor) -> None:
            reduced[layer] = (weights.argmax(-1), weights[..., :N_ROWS].sum(-1))

        with tap_rows(model, torch.arange(ids.shape[1] - N_ROWS, ids.shape[1]), reduce):
            model(ids, **options)
    else:
        model.set_attn_implementation("eager")
        maps = model(ids, output_attentions=True, **options).attentions
        _ = [full[:, :, -N_ROWS:].argmax(-1) for full in maps]
        model.set_attn_implementation("sdpa")


def random_ids(length: int) -> torch.Tensor:
    """Int `[1, length]`."""
    return torch.randint(0, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(length))


def peak_mib(length: int, kind: str) -> float:
    """Peak memory of one pass above the loaded model's, MiB, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.capture", str(length), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["peak_mib"])


def seconds(model: Any, ids: torch.Tensor, kind: str) -> float:
    """Wall time of one pass."""
    start = time.perf_counter()
    forward(model, ids, kind)
    return time.perf_counter() - start


def measure(say: Any = print) -> list[dict[str, Any]]:
    """One record per length: median seconds, time ratios, peak memory and its ratio."""
    model = build_model()
    records = []
    for length in LENGTHS:
        ids = random_ids(length)
        kinds = [kind for kind in PASSES if kind != "eager" or length <= EAGER_UP_TO]
        for kind in kinds:
            seconds(model, ids, kind)
        rounds = [{kind: seconds(model, ids, kind) for kind in kinds} for _ in range(PAIRS)]
        record: dict[str, Any] = {"length": length, "rows": N_ROWS}
        for kind in kinds:
            record[f"{kind}_s"] = statistics.median(r[kind] for r in rounds)
            record[f"{kind}_peak_mib"] = peak_mib(length, kind)
        for kind in kinds[1:]:
            record[f"{kind}_time_ratio"] = statistics.median(r[kind] / r["plain"] for r in rounds)
            record[f"{kind}_memory_ratio"] = record[f"{kind}_peak_mib"] / record["plain_peak_mib"]
        say(f"  {record}")
        records.append(record)
    return records


def resident_mib(field: str) -> float:
    """A field of this process's memory status (`VmRSS` now, `VmHWM` peak since the last reset), MiB; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def child(length: int, kind: str) -> None:
    """Print the peak memory of one pass above the loaded model's, as JSON."""
    model = build_model()
    forward(model, random_ids(64), kind)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the model had set
    forward(model, random_ids(length), kind)
    print(json.dumps({"peak_mib": resident_mib("VmHWM") - before}))


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2])
