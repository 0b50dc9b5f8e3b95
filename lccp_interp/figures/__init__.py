"""Figures of a run: `paper` (matplotlib, vector) and `interactive` (plotly), under the same names.

`FIGURES` lists them, each with what it needs, `TABLES` the tables; `draw_figures` writes all that a run has the numbers
for. Neither library is imported before a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.captions import caption
from lccp_interp.figures.needs import (
    ABLATED_TRAJECTORY,
    ABLATIONS,
    CORPUS,
    GRID,
    INTERFERENCE,
    METRICS,
    PAPER_PROBES,
    PROBES,
    STEPS,
    why_not,
)
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

__all__ = ["FIGURES", "FORMATS", "TABLES", "FigureEntry", "caption", "draw_figures", "left_out"]

PAPER_FORMATS = ("pdf", "svg", "png")
TABLE_FORMATS = ("tex", "csv", "md")
FORMATS = (*PAPER_FORMATS, "html", *TABLE_FORMATS)


@dataclass(frozen=True)
class FigureEntry:
    """A figure or table: its number in arXiv 2604.02650 (None: not in it), its title, and what a run must hold.

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
    "causal_check": FigureEntry(None, "Answers without the best heads, and without random ones", ABLATIONS),
    "causal_dates": FigureEntry(None, "From when on the best heads matter", ABLATED_TRAJECTORY),
    "metric_agreement": FigureEntry(None, "Whether head metrics mean the same heads", METRICS),
}


TABLES: dict[str, FigureEntry] = {
    "niah_correlation_table": FigureEntry(3, "NIAH score and perplexity with results after fine-tuning", PAPER_PROBES),
    "head_correlation_table": FigureEntry(4, "Retrieval heads with results after fine-tuning", PAPER_PROBES),
    "stability_table": FigureEntry(5, "Stability of the ranking of heads", STEPS),
    "niah_p_table": FigureEntry(6, "p-values of Table 3", PAPER_PROBES),
    "head_p_table": FigureEntry(7, "p-values of Table 4", PAPER_PROBES),
    "causal_check_table": FigureEntry(None, "Answers without the best heads, and without random ones", ABLATIONS),
    "agreement_table": FigureEntry(None, "Whether head metrics mean the same heads", METRICS),
}


def left_out(run: Run | RunTables) -> dict[str, list[str]]:
    """The figures and tables that a run has no numbers for, by the reason, which names the command that adds them.

    Example:
        >>> left_out(Run.open("runs/demo"))   # doctest: +SKIP
        {'no heads were removed yet; `lccp ablate RUN` removes some': ['causal_check', 'causal_check_table']}
    """
    tables = RunTables.of(run)
    reasons: dict[str, list[str]] = {}
    every = {**FIGURES, **TABLES}
    for need in dict.fromkeys(entry.needs for entry in every.values()):
        if reason := why_not(need, tables):
            names = [name for name, entry in every.items() if entry.needs == need]
            reasons.setdefault(reason, []).extend(names)
    return reasons


def draw_figures(
    run: Run | RunTables,
    out: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    columns: int | None = None,
    length: int | None = None,
) -> list[Path]:
    """Write the figures of `FIGURES` and the tables of `TABLES` into the folder `out`, with a `captions.txt`.

    Those that the run has no numbers for are not drawn; `captions.txt` names them with the reason, as does `left_out`.

    Args:
        run: an opened run.
        out: folder; made if missing, files of the same names are replaced.
        formats: figures as `pdf`, `svg`, `png`; as `html` to look into (one plotly.js beside them); tables as `tex`,
            `csv`, `md`.
        columns: of a page that paper figures span, 1 or 2; None means what suits each.
        length: context length at which heads are read, in tokens; None means the longest of the run.

    Returns:
        The files, figure by figure in the order of `formats`, then tables, the captions last.

    Raises:
        LccpError: unknown format, columns or length, or a run without numbers for any figure.

    Example:
        >>> draw_figures(Run.open("runs/demo"), "figures", formats=["pdf", "tex"], columns=1)   # doctest: +SKIP
    """
    for kind in formats:
        choose("format", kind, FORMATS, "draw_figures")
    from lccp_interp.figures import paper

    if columns is not None:
        paper.page_width(columns)
    tables = RunTables.of(run, length=length)
    folder = Path(out)
    missing = left_out(tables)
    absent = {name for names in missing.values() for name in names}
    if set(FIGURES) <= absent:
        raise LccpError(f"{tables.run.path} has no numbers for any figure: {'; '.join(missing)}")
    written, paragraphs = [], []
    for name, entry in FIGURES.items():
        if name not in absent:
            written += _write(name, folder / f"{entry.stem}{name}", tables, formats, columns)
            paragraphs.append(f"{entry.stem}{name}: {caption(name, tables)}")
    wanted = [kind for kind in formats if kind in TABLE_FORMATS]
    for name, entry in TABLES.items() if wanted else ():
        if name not in absent:
            made = getattr(paper, name)(tables)
            stem = name if entry.paper_figure is None else f"table{entry.paper_figure}_{made.name}"
            written += [made.save(folder / f"{stem}.{kind}") for kind in wanted]
            paragraphs.append(f"{stem}: {made.caption}")
    paragraphs += [f"Left out: {', '.join(names)}: {reason}." for reason, names in missing.items()]
    captions = folder / "captions.txt"
    captions.parent.mkdir(parents=True, exist_ok=True)
    captions.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return [*written, captions]


def _write(name: str, stem: Path, tables: RunTables, formats: Sequence[str], columns: int | None) -> list[Path]:
    """One figure in every format that is one of figures."""
    from lccp_interp.figures import interactive, paper

    written = []
    figure = None
    for kind in formats:
        path = stem.with_name(f"{stem.name}.{kind}")
        if kind == "html":
            written.append(interactive.save(getattr(interactive, name)(tables), path))
        elif kind in PAPER_FORMATS:
            if figure is None:
                figure = getattr(paper, name)(tables, **({} if columns is None else {"columns": columns}))
            written.append(paper.save(figure, path))
    return written
