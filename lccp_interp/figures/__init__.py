"""Figures of a run: `paper` (matplotlib, vector) and `interactive` (plotly), under the same names.

`FIGURES` lists them, each with what it needs; `draw_figures` writes all that a run has the numbers for. Neither
library is imported before a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.captions import caption
from lccp_interp.figures.needs import CORPUS, GRID, INTERFERENCE, PROBES, why_not
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

__all__ = ["FIGURES", "FORMATS", "FigureEntry", "caption", "draw_figures", "left_out"]

FORMATS = ("pdf", "svg", "png")


@dataclass(frozen=True)
class FigureEntry:
    """A figure: its number in arXiv 2604.02650 (None: not in it), its title, and what a run must hold for it.

    `needs` is one of `lccp_interp.figures.needs`.
    """

    paper_figure: int | None
    title: str
    needs: str = GRID

    @property
    def stem(self) -> str:
        """How its file name begins: `fig2_` or nothing."""
        return "" if self.paper_figure is None else f"fig{self.paper_figure}_"


FIGURES: dict[str, FigureEntry] = {
    "probe_scores": FigureEntry(1, "Results after fine-tuning over training", PROBES),
    "ppl_heatmaps": FigureEntry(2, "Answer perplexity over length and depth"),
    "niah_trajectory": FigureEntry(3, "NIAH score and answer perplexity over training"),
    "head_heatmaps": FigureEntry(4, "Scores of all heads"),
    "retrieval_heads": FigureEntry(5, "Retrieval heads over training"),
    "corpus_ppl": FigureEntry(6, "Corpus perplexity over training", CORPUS),
    "depth_curves": FigureEntry(7, "Answer perplexity against needle depth"),
    "interference_heatmaps": FigureEntry(8, "Answer perplexity over distance and interference", INTERFERENCE),
    "interference_curves": FigureEntry(9, "Answer perplexity against interference", INTERFERENCE),
    "saturation_curves": FigureEntry(None, "When each metric saturates"),
    "head_lives": FigureEntry(None, "Births and deaths of retrieval heads"),
    "cohort_survival": FigureEntry(None, "Survival of the initial heads, and newcomers"),
    "reference_comparison": FigureEntry(None, "Heads of every checkpoint against the base checkpoint"),
}


def left_out(run: Run | RunTables) -> dict[str, list[str]]:
    """The figures that a run has no numbers for, by the reason, which names the command that adds them.

    Example:
        >>> left_out(Run.open("runs/demo"))   # doctest: +SKIP
        {'no results after fine-tuning; `lccp probe RUN --sft` adds them': ['probe_scores']}
    """
    tables = RunTables.of(run)
    reasons: dict[str, list[str]] = {}
    for need in dict.fromkeys(entry.needs for entry in FIGURES.values()):
        if reason := why_not(need, tables):
            names = [name for name, entry in FIGURES.items() if entry.needs == need]
            reasons.setdefault(reason, []).extend(names)
    return reasons


def draw_figures(
    run: Run | RunTables,
    out: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    length: int | None = None,
) -> list[Path]:
    """Write the figures of `FIGURES` into the folder `out`, with a `captions.txt`.

    Those that the run has no numbers for are not drawn; `captions.txt` names them with the reason, as does `left_out`.

    Args:
        run: an opened run.
        out: folder; made if missing, files of the same names are replaced.
        formats: out of `pdf`, `svg`, `png`.
        length: context length at which heads are read, in tokens; None means the longest of the run.

    Returns:
        The files, figure by figure in the order of `formats`, the captions last.

    Raises:
        LccpError: unknown format or length, or a run without numbers for any figure.

    Example:
        >>> draw_figures(Run.open("runs/demo"), "figures", formats=["pdf"])   # doctest: +SKIP
    """
    for kind in formats:
        choose("format", kind, FORMATS, "draw_figures")
    from lccp_interp.figures import paper

    tables = RunTables.of(run, length=length)
    folder = Path(out)
    missing = left_out(tables)
    absent = {name for names in missing.values() for name in names}
    if len(absent) == len(FIGURES):
        raise LccpError(f"{tables.run.path} has no numbers for any figure: {'; '.join(missing)}")
    written, paragraphs = [], []
    for name, entry in FIGURES.items():
        if name in absent:
            continue
        figure = getattr(paper, name)(tables)
        written += [paper.save(figure, folder / f"{entry.stem}{name}.{kind}") for kind in formats]
        paragraphs.append(f"{entry.stem}{name}: {caption(name, tables)}")
    paragraphs += [f"Left out: {', '.join(names)}: {reason}." for reason, names in missing.items()]
    captions = folder / "captions.txt"
    captions.parent.mkdir(parents=True, exist_ok=True)
    captions.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return [*written, captions]
