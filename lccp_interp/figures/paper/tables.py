"""The paper's tables from a run, its published numbers beside, to be written as LaTeX, CSV or Markdown.

Tables 3 to 7 of arXiv 2604.02650, and two that its critics ask for: the causal check and the agreement of metrics. A
`PaperTable` is rows of text with a caption; the numbers are those of `lccp_interp.dynamics`, nothing is computed here.
Cost: that of the tables; correlations take about a second.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lccp_interp.dynamics.correlation import paper_layout
from lccp_interp.dynamics.published import PUBLISHED_AVERAGES, PUBLISHED_STABILITY, published_correlations
from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import RunTables
from lccp_interp.figures.agreement_panels import agreement_map
from lccp_interp.figures.captions import ABLATION_NAMES, caption
from lccp_interp.figures.causal_panels import check_study
from lccp_interp.figures.style import format_length, format_number
from lccp_interp.schema import LccpError
from lccp_interp.store import Run, replacing

TABLE_FORMATS = ("tex", "csv", "md")
PUBLISHED = "published: Hunyuan-A13B, arXiv 2604.02650"

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "−": "$-$", "–": "--", "…": r"\ldots{}", "×": r"$\times$",
    "→": r"$\to$",
}  # fmt: skip
"""Characters that LaTeX would read as commands, and those that its plain fonts lack."""


@dataclass(frozen=True)
class PaperTable:
    """A table ready for print: a row is one text per column; `groups` are (row before which, heading).

    Columns from `n_text` on hold numbers and are aligned right.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: tuple[tuple[int, str], ...] = ()
    n_text: int = 1

    @property
    def frame(self) -> pl.DataFrame:
        """The rows as a data frame of text, with a column `group` where there are groups."""
        named = {column: [row[i] for row in self.rows] for i, column in enumerate(self.columns)}
        return pl.DataFrame({"group": self._group_of_rows()} | named if self.groups else named)

    def _group_of_rows(self) -> list[str]:
        titles = dict(self.groups)
        found, current = [], ""
        for i in range(len(self.rows)):
            current = titles.get(i, current)
            found.append(current)
        return found

    def latex(self) -> str:
        """A `table` for the package booktabs.

        Example:
            >>> print(PaperTable("t", "A_b.", ("head", "r"), (("2-2", "0.5"),)).latex())
            % needs \\usepackage{booktabs}
            \\begin{table}
              \\centering
              \\caption{A\\_b.}
              \\label{tab:t}
              \\begin{tabular}{lr}
                \\toprule
                head & r \\\\
                \\midrule
                2-2 & 0.5 \\\\
                \\bottomrule
              \\end{tabular}
            \\end{table}
            <BLANKLINE>
        """
        kinds = "l" * self.n_text + "r" * (len(self.columns) - self.n_text)
        titles = dict(self.groups)
        body = []
        for i, row in enumerate(self.rows):
            if i in titles:
                body += [r"\midrule"] * (i > 0)
                body.append(rf"\multicolumn{{{len(self.columns)}}}{{l}}{{{latex_text(titles[i])}}} \\")
            body.append(" & ".join(map(latex_text, row)) + r" \\")
        head = " & ".join(map(latex_text, self.columns)) + r" \\"
        lines = [r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        inside = "\n".join(f"    {line}" for line in lines)
        return (
            "% needs \\usepackage{booktabs}\n\\begin{table}\n  \\centering\n"
            f"  \\caption{{{latex_text(self.caption)}}}\n  \\label{{tab:{re.sub('[^a-z0-9]+', '-', self.name)}}}\n"
            f"  \\begin{{tabular}}{{{kinds}}}\n{inside}\n  \\end{{tabular}}\n\\end{{table}}\n"
        )

    def markdown(self) -> str:
        """The same for a README.

        Example:
            >>> print(PaperTable("t", "A.", ("head", "r"), (("2-2", "0.5"),)).markdown())
            | head | r |
            |:---|---:|
            | 2-2 | 0.5 |
            <BLANKLINE>
            A.
            <BLANKLINE>
        """
        rule = "|".join(":---" if i < self.n_text else "---:" for i in range(len(self.columns)))
        titles = dict(self.groups)
        lines = [_markdown_row(self.columns), f"|{rule}|"]
        for i, row in enumerate(self.rows):
            if i in titles:
                lines.append(_markdown_row([f"*{titles[i]}*", *[""] * (len(self.columns) - 1)]))
            lines.append(_markdown_row(row))
        return "\n".join(lines) + f"\n\n{_markdown_text(self.caption)}\n"

    def csv(self) -> str:
        """Rows under the names of the columns, those of groups with the group in front."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.frame.columns)
        writer.writerows(self.frame.iter_rows())
        return out.getvalue()

    def save(self, path: str | Path) -> Path:
        """Write the table; the ending (`tex`, `csv` or `md`) says the format.

        Raises:
            LccpError: another ending.
        """
        path = Path(path)
        kind = choose("format", path.suffix.lstrip("."), TABLE_FORMATS, "PaperTable.save")
        text = {"tex": self.latex, "csv": self.csv, "md": self.markdown}[kind]()
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path


def latex_text(text: str) -> str:
    """`text` with nothing in it that LaTeX would take for a command.

    Example:
        >>> latex_text("a_b 5% {x}")
        'a\\\\_b 5\\\\% \\\\{x\\\\}'
    """
    return "".join(LATEX.get(character, character) for character in text)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown_text, cells)) + " |"


def _markdown_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def stability_table(run: Run | RunTables) -> PaperTable:
    """Each checkpoint against the next: overlap of the top heads and Spearman of all (arXiv 2604.02650, Table 5).

    Example:
        >>> stability_table(Run.open("runs/demo")).save("table5.tex")   # doctest: +SKIP
    """
    tables = RunTables.of(run)
    rows = [
        (
            row["from_checkpoint"],
            row["to_checkpoint"],
            f"{format_number(row['overlap'])}/{row['top_k']}",
            format_number(row["overlap_by_chance"], 2),
            _decimals(row["spearman"]),
        )
        for row in tables.stability.iter_rows(named=True)
    ]
    published = [
        (start, end, f"{overlap}/30", format_number(30 * 30 / 1024, 2), _decimals(rho))
        for start, end, overlap, rho in PUBLISHED_STABILITY
    ]
    return PaperTable(
        "stability",
        "Stability of the ranking of heads from each checkpoint to the next: how many of the highest heads of one are "
        "among those of the other, how many would be by chance, and Spearman's rho of all "
        f"{max(tables.stability['n_heads'], default=0)} heads (published: 1024). {_heads(tables)} Ties count for their "
        "chance.",
        ("from", "to", "top heads in common", "by chance", "Spearman"),
        (*rows, *published),
        ((0, "this run"), (len(rows), PUBLISHED)),
        n_text=2,
    )


def niah_correlation_table(run: Run | RunTables) -> PaperTable:
    """Pearson r of NIAH score and answer perplexity with results after fine-tuning (arXiv 2604.02650, Table 3).

    Raises:
        LccpError: the run has no results of RULER, MRCR or LongBio at three or more checkpoints.
    """
    return _correlations(run, 3, "r")


def head_correlation_table(run: Run | RunTables) -> PaperTable:
    """The same of the number of retrieval heads and the mean score of the initial ones (Table 4 of the paper)."""
    return _correlations(run, 4, "r")


def niah_p_table(run: Run | RunTables) -> PaperTable:
    """The p-values of `niah_correlation_table`, of the two-sided t test (Table 6 of the paper)."""
    return _correlations(run, 6, "p")


def head_p_table(run: Run | RunTables) -> PaperTable:
    """The p-values of `head_correlation_table`, of the two-sided t test (Table 7 of the paper)."""
    return _correlations(run, 7, "p")


def _correlations(run: Run | RunTables, number: int, quantity: str) -> PaperTable:
    tables = RunTables.of(run)
    known = published_correlations().filter(pl.col("r_table" if quantity == "r" else "p_table") == number)
    wide = paper_layout(tables.correlations).filter(pl.col("cheap").is_in(known["cheap"].unique().implode()))
    if wide.is_empty():
        raise LccpError(
            f"none of {', '.join(known['paper_name'].unique(maintain_order=True))} is defined at the checkpoints that "
            "have results"
        )
    names = dict(known.select("cheap", "paper_name").iter_rows())
    probes = [name for name in wide.columns if name not in ("cheap", "quantity", "average")]
    columns = [*probes, *(["average"] if quantity == "r" else [])]
    short = _short(probes)
    rows, n = [], set()
    for cheap in wide["cheap"].unique(maintain_order=True):
        of = {row["quantity"]: row for row in wide.filter(pl.col("cheap") == cheap).iter_rows(named=True)}
        n |= {int(of["n"][name]) for name in probes if of["n"][name] is not None and of["n"][name] == of["n"][name]}
        rows.append((names[cheap], *(_decimals(of[quantity][name]) for name in columns)))
    benchmarks = known["benchmark"].unique(maintain_order=True).to_list()
    published = _published(known, quantity, probes, benchmarks)
    counts = " to ".join(str(value) for value in sorted({min(n, default=0), max(n, default=0)}))
    what = "Pearson's r" if quantity == "r" else "p of the two-sided t test of Pearson's r"
    return PaperTable(
        {3: "niah_correlations", 4: "head_correlations", 6: "niah_p_values", 7: "head_p_values"}[number],
        f"{what} between what is cheap to measure and results after light fine-tuning ({', '.join(probes)}), over the "
        f"levels of n = {counts} checkpoints (published: 6). {_heads(tables)} Curves that rise together correlate in "
        "their levels: differences and residuals of the trend are in the table of lccp correlate.",
        ("measure", *(short.get(name, name) for name in columns)),
        (*rows, *published),
        ((0, "this run"), (len(rows), PUBLISHED)),
    )


def _short(probes: Sequence[str]) -> dict[str, str]:
    """Probe series by their benchmark alone, those of one benchmark with their subset."""
    firsts = [name.split("/")[0] for name in probes]
    return {
        name: first if firsts.count(first) == 1 else " ".join(name.split("/")[:2])
        for name, first in zip(probes, firsts, strict=True)
    }


def _published(known: pl.DataFrame, quantity: str, probes: Sequence[str], benchmarks: Sequence[str]) -> list[Any]:
    """The published rows under the run's columns: a benchmark's number stands below each of its probes."""
    column = f"published_{quantity}"
    rows = []
    for (name,), part in known.group_by("paper_name", maintain_order=True):
        numbers = dict(part.select("benchmark", column).iter_rows())
        cells = []
        for probe in probes:
            near = [key for key in benchmarks if probe.lower().startswith(key.lower())]
            cells.append(_decimals(numbers[near[0]]) if near else "")
        if quantity == "r":
            cells.append(_decimals(PUBLISHED_AVERAGES[part["cheap"][0]]))
        rows.append((str(name), *cells))
    return rows


def causal_check_table(run: Run | RunTables, *, study: str | None = None) -> PaperTable:
    """What the removal of the best heads costs beside that of random ones, at every checkpoint of a study.

    Raises:
        LccpError: no ablations, or no such study.
    """
    tables = RunTables.of(run)
    chosen = check_study(tables) if study is None else study
    found = tables.causal(chosen)
    loss = found.filter(outcome="loss_nats")
    exact = {(row["checkpoint"], row["heads"]): row for row in found.filter(outcome="greedy_exact").to_dicts()}
    rows = []
    for row in loss.iter_rows(named=True):
        right = exact[row["checkpoint"], row["heads"]]
        rows.append(
            (
                row["checkpoint"],
                row["heads"] if row["k"] <= 3 else f"the best {row['k']}",
                *(_percent(right[name]) for name in ("intact", "removed", "random")),
                *(format_number(row[name]) for name in ("intact", "removed", "random", "beyond")),
                f"{format_number(row['beyond_low'])} to {format_number(row['beyond_high'])}",
            )
        )
    first = loss.row(0, named=True)
    return PaperTable(
        "causal_check",
        "Exact answers and answer loss (nats per token) with all heads, without the best, and without as many random "
        "heads of the same layers; beyond random: the loss added by the former over the latter, with its 95 % "
        f"bootstrap interval over {first['ci_over']} and random sets. "
        f"{ABLATION_NAMES.get(first['kind'], first['kind'])}; n = {first['n']} cases, up to {max(loss['n_draws'])} "
        f"random sets, teacher-forced. Ablation study {chosen}.",
        (
            "checkpoint", "heads", "exact, all", "exact, without", "exact, random", "loss, all", "loss, without",
            "loss, random", "beyond random", "95 % interval",
        ),
        tuple(rows),
        n_text=2,
    )  # fmt: skip


def agreement_table(run: Run | RunTables, *, checkpoint: str | None = None) -> PaperTable:
    """Rank correlation and shared top heads of every two head metrics.

    Raises:
        LccpError: one metric only, or an unknown checkpoint.
    """
    tables = RunTables.of(run)
    made = agreement_map(tables, checkpoint)
    rows = [
        (
            row["metric"],
            row["other"],
            _decimals(row["spearman"], 2),
            f"{_decimals(row['ci_low'], 2)} to {_decimals(row['ci_high'], 2)}",
            f"{format_number(row['overlap'])}/{row['top_k']}",
            format_number(row["overlap_by_chance"], 2),
        )
        for row in made.rows.iter_rows(named=True)
    ]
    return PaperTable(
        "agreement",
        caption("metric_agreement", tables).replace(": below the diagonal Spearman's", ": Spearman's").replace(
            ", above it how many", ", and how many"
        ),
        ("metric", "and", "Spearman", "95 % interval", "top heads in common", "by chance"),
        tuple(rows),
        n_text=2,
    )  # fmt: skip


def _heads(tables: RunTables) -> str:
    return (
        f"Heads by the metric {tables.metric} at {format_length(tables.head_length)} tokens, mean over "
        f"{max(tables.scores['n'], default=0)} cases, {tables.read_mode.replace('_', '-')}."
    )


def _decimals(value: float | None, digits: int = 4) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.0f} %"
