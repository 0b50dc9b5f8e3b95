"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lccp_interp.store import provenance

PACKAGES = ("torch", "transformers", "transformer-lens")


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def available_bytes() -> int:
    """Memory that a process could take now without swapping; Linux only."""
    return kib("/proc/meminfo", "MemAvailable") * 1024


def kib(file: str, field: str) -> int:
    """A field of /proc/meminfo or of a process's status, KiB."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no {field}; memory is measured on Linux only")


def entry(records: Any, device: str = "") -> dict[str, Any]:
    """Records with the day and the machine they were measured on."""
    found = provenance()
    machine: dict[str, Any] = {
        "device": device or processor(),
        "cores": cores(),
        "memory_gib": round(kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "threads": torch.get_num_threads(),
        "python": found["python"],
        "torch": torch.__version__,
    }
    machine |= {name: found["versions"][name] for name in PACKAGES[1:] if name in found["versions"]}
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "records": records}


def line(measured: dict[str, Any]) -> str:
    """One line of Markdown: date, machine, versions."""
    machine = measured["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES) if name in machine)
    return (
        f"*{measured['date']}, {machine['device']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, "
        f"{machine['threads']} threads; {versions}.*"
    )
