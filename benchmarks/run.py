"""`python -m benchmarks.run [--only demo,capture,...]`: measure, keep the records, render them into the READMEs.

Parts that are not run keep their last records, with the day and machine of those.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import analysis, capture, demo, gpu, grid, machine, peers, scaling

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
FRONT = HERE.parent / "README.md"
PARTS: dict[str, Any] = {
    "capture": capture,
    "peers": peers,
    "grid": grid,
    "demo": demo,
    "analysis": analysis,
    "scaling": scaling,
}

HEAD = """# Benchmarks

Written by `make bench` (on a CPU) and `make bench-gpu` (on a CUDA device) from the numbers in `results.json` and
`results_gpu.json`; a test holds this page to them. Nothing here is a test of its own: no timing can fail a build.

Ratios are taken side by side: the passes that are compared run in turn in one process, every second round in reversed
order, and a ratio is formed within each round. The bold number is the median of the rounds, the range behind it their
smallest and largest. On a machine that others use too, seconds can double from one minute to the next and a range can
be wide; the medians hold out longer, and a median of a few rounds that is off its target by less than the range shows
nothing. Peaks of memory hardly vary. Models have random weights unless a part says otherwise: time and memory of a pass
do not depend on their values."""

NO_GPU = (
    "No GPU could be had when these pages were written: nothing was measured, and the tables above stand alone. "
    "`make bench-gpu` measures on the first CUDA device, in under 8 minutes."
)


def render(results: dict[str, Any], results_gpu: dict[str, Any]) -> str:
    """The records as Markdown."""
    lines = [HEAD]
    for name, part in PARTS.items():
        if name in results:
            body = part.table(results[name]["records"])
            lines += ["", f"## {part.TITLE}", "", machine.line(results[name]), "", *body]
    lines += ["", f"## {gpu.TITLE}", "", *(gpu.table(results_gpu) if results_gpu else [NO_GPU]), ""]
    return "\n".join(lines)


def performance(results: dict[str, Any], results_gpu: dict[str, Any]) -> str:
    """The lines of the project's README about cost, as Markdown."""
    lines = ["| what | time | peak memory | tokens run |", "|---|---|---|---|"]
    lines += [
        f"| reading {r['rows']} rows of every head, against the plain pass, {r['length']:,} tokens | "
        f"{r['time_ratio']['median']:.2f} x | {r['memory_ratio']:.2f} x | the same |"
        for r in results.get("capture", {}).get("records", [])
        if r["length"] in (4096, 16384)
    ]
    lines += [
        f"| {peers.PEERS[r['peer']]}, against capture, {r['length']:,} tokens | "
        f"{r['times_faster']['median']:.1f} x | {r['times_smaller']:.1f} x | the same |"
        for r in results.get("peers", {}).get("records", [])
    ]
    if grid_entry := results.get("grid"):
        r = grid_entry["records"]
        lines.append(
            f"| {r['cases']} cases ({r['lengths'][2]} lengths x {r['depths']} depths x {r['needles']} needles) along "
            f"their prefixes, against one by one | {r['time_ratio']['median']:.2f} x | | {r['token_ratio']:.2f} x |"
        )
    where = machine.line(results["capture"]).strip("*.") if "capture" in results else "not measured yet"
    below = f"Medians, measured side by side ({where}); spreads and seconds in [benchmarks](benchmarks/README.md)."
    if not results_gpu:
        below += " No GPU could be had for the tables yet: `make bench-gpu` measures on yours."
    return "\n".join([*lines, "", below])


def with_performance(page: str, lines: str) -> str:
    """`page` with `lines` between its two markers.

    Example:
        >>> with_performance("a\\n<!-- performance -->\\nold\\n<!-- /performance -->\\nb", "new").split("\\n")
        ['a', '<!-- performance -->', 'new', '<!-- /performance -->', 'b']
    """
    start, end = "<!-- performance -->", "<!-- /performance -->"
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{lines}\n{end}{rest.partition(end)[2]}"


def read(path: Path) -> dict[str, Any]:
    """The records of a file; none, if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_readme() -> None:
    """Render the kept records, here and in the project's README."""
    results, results_gpu = read(RESULTS), read(gpu.RESULTS)
    README.write_text(render(results, results_gpu))
    FRONT.write_text(with_performance(FRONT.read_text(), performance(results, results_gpu)))


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts asked for and write both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="short lengths and two rounds; shows, and writes nothing")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {', '.join(map(repr, unknown))}; known: {', '.join(PARTS)}")
    results = read(RESULTS)
    for name in names:
        print(f"{name} ...", flush=True)
        results[name] = machine.entry(PARTS[name].measure(lambda text: print(text, flush=True), quick=given.quick))
        print("\n".join(PARTS[name].table(results[name]["records"])), flush=True)
        if not given.quick:
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            write_readme()


if __name__ == "__main__":
    main()
