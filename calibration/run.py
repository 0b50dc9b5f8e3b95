"""`python -m calibration [--only births,...] [--quick]`: simulate, keep the records, render them into the docs.

Parts that are not run keep their last records, with the day of those.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from lccp_interp.store import provenance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "calibration.md"
PARTS = ("births", "intervals", "saturation", "correlation", "random_models")
"""Names of modules in this package, in the order of the page."""

PACKAGES = ("numpy", "polars")

HEAD = """# Calibration

Written by `make calibrate` from the numbers in `calibration/results.json`; a test holds this page to them, and the slow
tests run the same simulations again against the same bounds. Every number comes from made-up data whose truth is known,
and every draw from a fixed seed. A simulation shows what the statistics do where its assumptions hold; they are stated
with each table."""


class Part(Protocol):
    """What a module of this package offers; see the package's docstring."""

    TITLE: str

    def measure(self, say: Callable[[str], Any], *, quick: bool = False) -> Any: ...
    def table(self, records: Any) -> list[str]: ...
    def failures(self, records: Any) -> list[str]: ...


def part(name: str) -> Part:
    """The part called `name`."""
    return cast(Part, import_module(f"calibration.{name}"))


def read(path: Path = RESULTS) -> dict[str, Any]:
    """Records by the name of their part; none where the file is missing."""
    return json.loads(path.read_text()) if path.is_file() else {}


def entry(records: Any, seconds: float) -> dict[str, Any]:
    """Records with the day, the versions and the time they took."""
    found = provenance()
    versions = {"python": found["python"]} | {name: found["versions"][name] for name in PACKAGES}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "versions": versions,
        "records": records,
    }


def render(results: dict[str, Any]) -> str:
    """The records as Markdown."""
    lines = [HEAD]
    for name in PARTS:
        if name in results:
            kept, module = results[name], part(name)
            versions = ", ".join(f"{package} {version}" for package, version in kept["versions"].items())
            lines += ["", f"## {module.TITLE}", "", f"*{kept['date']}, {kept['seconds']} s; {versions}.*", ""]
            lines += module.table(kept["records"])
            broken = module.failures(kept["records"])
            if broken:
                lines += ["", "Bounds that do not hold:", "", *(f"- {line}" for line in broken)]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m calibration", description=__doc__)
    parser.add_argument("--only", help=f"parts to run, comma-separated, out of {', '.join(PARTS)}")
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions, nothing is written: a look at the script"
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else PARTS
    for name in names:
        if name not in PARTS:
            parser.error(f"no part {name!r}; known: {', '.join(PARTS)}")
    n_broken = 0
    for name in names:
        print(name, flush=True)
        start = time.perf_counter()
        records = part(name).measure(lambda text: print(text, flush=True), quick=options.quick)
        if options.quick:
            print("\n".join(part(name).table(records)))
            continue
        results = read(RESULTS) | {name: entry(records, time.perf_counter() - start)}
        RESULTS.write_text(json.dumps(results) + "\n")
        PAGE.write_text(render(results))
        n_broken += len(part(name).failures(records))
    if not options.quick:
        print(f"{PAGE}: {n_broken} bounds broken")
