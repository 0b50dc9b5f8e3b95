"""Peak memory of one pass on a CPU: `python -m benchmarks.memory LENGTH KIND` measures it in a process of its own.

The figure is the peak of the resident size during the pass, less what the process held before it, the loaded model
included. The C library is told to hand every larger block back at once and to keep one arena, so that the resident size
follows what is in use and not what an allocator hoards. A pass over a few tokens comes first, for the code and the
buffers that any pass would load; it is far too short to leave memory behind that the measured one could hide in.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import kib

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}
WARM_UP_TOKENS = 128


def peaks_mib(length: int, kind: str, n_processes: int) -> dict[str, Any]:
    """Peak above the loaded model, MiB: median, smallest and largest of some processes, and the model's own size."""
    command = [sys.executable, "-m", "benchmarks.memory", str(length), kind]
    seen = []
    for _ in range(n_processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ALLOCATOR})
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = [one["peak_mib"] for one in seen]
    return {
        "median": statistics.median(peaks),
        "min": min(peaks),
        "max": max(peaks),
        "model_mib": seen[0]["model_mib"],
    }


def child(length: int, kind: str) -> None:
    """Print the peak of one pass above the loaded model's memory, as JSON."""
    from benchmarks.passes import build_model, open_pass, random_ids

    model = build_model()
    model_mib = sum(weight.nbytes for weight in model.parameters()) / 2**20
    run = open_pass(kind, model)
    run(random_ids(WARM_UP_TOKENS))
    ids = random_ids(length)
    status = "/proc/self/status"
    before = kib(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading the model had set
    run(ids)
    print(json.dumps({"peak_mib": (kib(status, "VmHWM") - before) / 1024, "model_mib": model_mib}))


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2])
