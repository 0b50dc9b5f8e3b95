"""Figures of a run: `paper` (matplotlib, vector) and `interactive` (plotly), under the same names.

`FIGURES` lists them; `draw_figures` writes them all. Neither library is imported before a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.captions import caption
from lccp_interp.store import Run

__all__ = ["FIGURES", "FORMATS", "FigureEntry", "caption", "draw_figures"]

FORMATS = ("pdf", "svg", "png")


@dataclass(frozen=True)
class FigureEntry:
    """A figure: its number in arXiv 2604.02650 (None: not in it) and its title."""

    paper_figure: int | None
    title: str

    @property
    def stem(self) -> str:
        """How its file name begins: `fig2_` or nothing."""
        return "" if self.paper_figure is None else f"fig{self.paper_figure}_"


FIGURES: dict[str, FigureEntry] = {
    "ppl_heatmaps": FigureEntry(2, "Answer perplexity over length and depth"),
    "niah_trajectory": FigureEntry(3, "NIAH score and answer perplexity over training"),
    "head_heatmaps": FigureEntry(4, "Scores of all heads"),
    "retrieval_heads": FigureEntry(5, "Retrieval heads over training"),
    "saturation_curves": FigureEntry(6, "When each metric saturates"),
    "depth_curves": FigureEntry(7, "Answer perplexity against needle depth"),
    "head_lives": FigureEntry(None, "Births and deaths of retrieval heads"),
    "cohort_survival": FigureEntry(None, "Survival of the initial heads, and newcomers"),
    "reference_comparison": FigureEntry(None, "Heads of every checkpoint against the base checkpoint"),
}


def draw_figures(
    run: Run | RunTables,
    out: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    length: int | None = None,
) -> list[Path]:
    """Write every figure of `FIGURES` into the folder `out`, with a `captions.txt`.

    Args:
        run: an opened run.
        out: folder; made if missing, files of the same names are replaced.
        formats: out of `pdf`, `svg`, `png`.
        length: context length at which heads are read, in tokens; None means the longest of the run.

    Returns:
        The files, figure by figure in the order of `formats`, the captions last.

    Raises:
        LccpError: unknown format or length.

    Example:
        >>> draw_figures(Run.open("runs/demo"), "figures", formats=["pdf"])   # doctest: +SKIP
    """
    for kind in formats:
        choose("format", kind, FORMATS, "draw_figures")
    from lccp_interp.figures import paper

    tables = RunTables.of(run, length=length)
    folder = Path(out)
    written = []
    for name, entry in FIGURES.items():
        figure = getattr(paper, name)(tables)
        written += [paper.save(figure, folder / f"{entry.stem}{name}.{kind}") for kind in formats]
    captions = folder / "captions.txt"
    captions.write_text(
        "\n\n".join(f"{entry.stem}{name}: {caption(name, tables)}" for name, entry in FIGURES.items()) + "\n",
        encoding="utf-8",
    )
    return [*written, captions]
