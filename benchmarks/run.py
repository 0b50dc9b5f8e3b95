"""`python -m benchmarks.run`: measure, keep the numbers as JSON, render them into benchmarks/README.md."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import capture, demo
from lccp_interp.store import provenance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def render(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, shown = results["machine"], results["demo"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; the numbers are in `results.json`. Ratios are taken side by side in one process,",
        f"pass by pass, and are medians of {capture.PAIRS}. On a machine shared with other work, trust the ratios more",
        "than the seconds.",
        "",
        f"{results['date']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}.",
        "",
        "## The demo",
        "",
        f"`lccp demo`: {shown['checkpoints']} checkpoints x {shown['cases']} cases "
        f"({shown['prompt_tokens'] / 1e6:.1f} M prompt tokens, up to 4096 a case, {shown['score_rows']:,} scores), "
        f"figures and report: **{shown['seconds']:.0f} s** ({shown['cpu_seconds']:.0f} s of processor time), peak "
        f"memory **{shown['peak_mib'] / 1024:.2f} GiB**, report {shown['report_mib']:.1f} MiB.",
        "",
        "## Capture against length",
        "",
        f"A Llama of 25 M parameters, float32; {capture.N_ROWS} attention rows of every layer and head read and "
        "reduced, against the same pass without, and against eager attention with full maps. Memory is the peak above "
        "the loaded model.",
        "",
        "| length | plain s | capture time ratio | plain MiB | capture MiB | capture memory ratio | eager time ratio "
        "| eager MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results["capture"]:
        eager = f"{r['eager_time_ratio']:.1f} | {r['eager_peak_mib']:.0f}" if "eager_s" in r else "not run | not run"
        lines.append(
            f"| {r['length']} | {r['plain_s']:.2f} | {r['capture_time_ratio']:.3f} | {r['plain_peak_mib']:.0f} | "
            f"{r['capture_peak_mib']:.0f} | {r['capture_memory_ratio']:.2f} | {eager} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything and write both files."""
    print("demo ...")
    shown = demo.measure()
    print("capture ...")
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": demo.cores(),
            "torch": torch.__version__,
            "transformers": provenance()["versions"]["transformers"],
            "python": platform.python_version(),
        },
        "demo": shown,
        "capture": capture.measure(),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "README.md").write_text(render(results))
    print(render(results))


if __name__ == "__main__":
    main()
