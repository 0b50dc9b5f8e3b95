"""What stands under a figure: what is drawn, of how many cases, at which lengths, in which mode and metric."""

from __future__ import annotations

import polars as pl

from lccp_interp.dynamics.curves import PROBE, corpus_name, metric_names
from lccp_interp.dynamics.ranking import RBO_P
from lccp_interp.dynamics.selection import choose
from lccp_interp.dynamics.tables import InterferenceTables, RunTables
from lccp_interp.figures.agreement_panels import agreement_map
from lccp_interp.figures.causal_panels import causal_check_panels, causal_date_lines
from lccp_interp.figures.cohorts import base_comparison, cohort
from lccp_interp.figures.corpus_panels import corpus_panels
from lccp_interp.figures.interference_panels import distance_rows, interference_of
from lccp_interp.figures.life_rows import life_rows
from lccp_interp.figures.probe_panels import MAX_PANELS, ProbePanel, probe_panels
from lccp_interp.figures.saturation_panels import SHARE
from lccp_interp.figures.style import format_length, format_number
from lccp_interp.store import Run

PPL_SCALE = "The perplexity scale is logarithmic in the loss (ln PPL), so that changes close to 1 can be seen."
ABLATION_NAMES = {
    "zero": "Removed heads put out zero",
    "mean": "Removed heads put out their mean over all positions of the cases",
    "resample": "Removed heads put out what they do in another case",
    "blind": "Removed heads do not see the needle",
}
MODE_NAMES = {"teacher_forced": "teacher-forced", "generate": "greedy generation"}


def caption(name: str, run: Run | RunTables, *, length: int | None = None) -> str:
    """The caption of figure `name`.

    Raises:
        LccpError: unknown figure.

    Example:
        >>> caption("head_heatmaps", Run.open("runs/demo"))[:23]   # doctest: +SKIP
        'Scores of all 32 heads '
    """
    tables = RunTables.of(run, length=length)
    choose("figure", name, tuple(_WRITERS), "the figures")
    return " ".join(_WRITERS[name](tables).split())


def _cases(tables: RunTables) -> str:
    """How many cases stand behind the outcomes."""
    cases = tables.cases
    lengths = ", ".join(format_length(length) for length in tables.lengths)
    n_needles = cases["cluster"].n_unique()
    return (
        f"{cases.height} cases per checkpoint: lengths {lengths} tokens, {cases['depth_fraction'].n_unique()} depths, "
        f"{n_needles} pair{'s' * (n_needles != 1)} of needle and haystack; {_mode(tables)}."
    )


def _mode(tables: RunTables) -> str:
    return MODE_NAMES.get(tables.read_mode, tables.read_mode)


def _heads(tables: RunTables) -> str:
    # Where cases that a model got wrong do not count, checkpoints differ in how many are left.
    n = " to ".join(str(n) for n in sorted({tables.scores["n"].min() or 0, tables.scores["n"].max() or 0}))
    return (
        f"Metric {tables.metric} at {format_length(tables.head_length)} tokens (one length, not pooled), "
        f"mean over {n} cases, {_mode(tables)}."
    )


def _interval(tables: RunTables) -> str:
    resamples = tables.sample.resamples
    what = "pairs of needle and haystack" if resamples.ci_over == "clusters" else "cases (fewer than 3 needle pairs)"
    return f"Bands: {100 * resamples.confidence:g} % bootstrap intervals over {resamples.n_units} {what}."


def _ppl_heatmaps(tables: RunTables) -> str:
    return (
        "Perplexity of the answer by context length and depth of the needle (0 % opens the document, 100 % stands "
        f"right before the question), one panel per checkpoint, one scale of colours. {PPL_SCALE} {_cases(tables)} "
        "A cell is the mean of its samples' perplexities."
    )


def _niah_trajectory(tables: RunTables) -> str:
    return (
        "Above, the percentage of needles copied without a fault (greedy); below, the perplexity of the answer; one "
        f"line per context length. {PPL_SCALE} {_cases(tables)} {_interval(tables)}"
    )


def _head_heatmaps(tables: RunTables) -> str:
    n_heads = tables.scores.select("layer", "head").n_unique()
    return (
        f"Scores of all {n_heads} heads, layers by heads, one panel per checkpoint; frames mark retrieval heads "
        f"({tables.rule}). {_heads(tables)}"
    )


def _retrieval_heads(tables: RunTables) -> str:
    n_initial = int(tables.census["n_initial"][0])
    return (
        f"Above, the number of retrieval heads ({tables.rule}), split into initial heads (those of the base checkpoint "
        f"{tables.base}) and others; below, the mean score of the {n_initial} initial heads. "
        f"{_heads(tables)} {_interval(tables)}"
    )


def _depth_curves(tables: RunTables) -> str:
    return (
        "Perplexity of the answer against the depth of the needle, one panel per context length, one line per "
        f"checkpoint. {PPL_SCALE} {_cases(tables)} {_interval(tables)}"
    )


def _head_lives(tables: RunTables) -> str:
    rows, n_hidden = life_rows(tables)
    hidden = f" {n_hidden} more heads with lower peaks are not drawn." if n_hidden else ""
    return (
        f"Lives of {len(rows)} heads, earliest birth first; the thickness of a "
        "ribbon is the score, colour marks life, grey its absence. A head is born when its score stays above 0.1 for "
        "two checkpoints and has visibly risen, and dies when it stays below 0.05 for two checkpoints and has visibly "
        "fallen (intervals apart); hollow marks are provisional (only one checkpoint is left to tell)."
        f"{hidden} {_heads(tables)}"
    )


def _saturation_curves(tables: RunTables) -> str:
    resamples = tables.sample.resamples
    at_length = tables.cases.filter(pl.col("length") == tables.head_length).height
    units = "pairs of needle and haystack" if resamples.ci_over == "clusters" else "cases"
    named = corpus_name(metric_names(tables.run))
    corpus = ""
    if named:
        corpus = f" Corpus perplexity: mean over documents of {named.removeprefix(PROBE).rsplit(':', 1)[0]}."
    return (
        "Each metric against the tokens since the base checkpoint, on a linear axis (left) and a logarithmic one "
        "(right, the base by itself at the left end). Solid the shape that AICc chooses out of log-linear, exponential "
        "and power law, named above it; dashed A log N + B where another one was chosen. "
        f"The line is where {100 * SHARE:g} % of the fitted gain is made, the shade its 95 % interval, lighter where "
        "it reaches beyond the last checkpoint. The verdict above each row is a rule's: the intervals, and a "
        "Mann-Kendall test of the later half of the checkpoints. "
        f"NIAH score, answer loss and heads at {format_length(tables.head_length)} tokens, "
        f"{at_length} cases per checkpoint, {_mode(tables)}. Bars: 95 % of resamples of the same cases "
        f"({resamples.n_units} {units}); the score's are at least those of a share smoothed by one right and one wrong "
        f"case.{corpus}"
    )


def _cohort_survival(tables: RunTables) -> str:
    made = cohort(tables)
    left = f"Left, empty: {made.why_no_curve}."
    if not made.why_no_curve:
        left = (
            f"Left, how many of the {made.n_initial} initial heads (retrieval heads of the base checkpoint "
            f"{made.base}: {tables.rule}) are retrieval heads at each later checkpoint; a head may fall below the "
            f"threshold and rise again. {_interval(tables)} Each resample chooses its own initial heads."
        )
    return (
        f"{left} Right, the retrieval heads of each checkpoint ({tables.rule}), initial ones and later ones; their "
        f"number stands above each bar. {_heads(tables)}"
    )


def _reference_comparison(tables: RunTables) -> str:
    rows = base_comparison(tables).rows
    if rows.is_empty():
        return f"Heads of every checkpoint against the base checkpoint. {_heads(tables)}"
    own = rows.filter(pl.col("checkpoint") == pl.col("reference"))
    ties = ""
    if own.height and own["overlap"][0] < 1:
        ties = f" Ties count for their chance, so the base has {100 * own['overlap'][0]:.0f} % with itself."
    top_k, n_heads = (max(rows[name].drop_nulls(), default=0) for name in ("top_k", "n_heads"))
    return (
        f"Heads of every checkpoint against those of the base checkpoint {rows['reference'][0]}: share of the top "
        f"{top_k} of {n_heads} heads that are in both lists, Jaccard index of the two sets of retrieval heads "
        f"({tables.rule}; undefined where neither has any), rank-biased overlap (p = {RBO_P:g}), Spearman's rho of "
        f"all heads. Dashed: expected of unrelated lists.{ties} {_heads(tables)}"
    )


def _probe_scores(tables: RunTables) -> str:
    found = probe_panels(tables)
    if not found:
        return "Results after fine-tuning: no score of a scored checkpoint is defined."
    panels = found[:MAX_PANELS]
    tuned = all(panel.tuned for panel in panels)
    how = "of checkpoints after light fine-tuning" if tuned else "of benchmarks"
    told = "; ".join(_panel(panel) for panel in panels)
    n_hidden = len(found) - len(panels)
    hidden = f" {n_hidden} more {'is' if n_hidden == 1 else 'are'} not drawn." if n_hidden else ""
    style_note = ""
    if any(panel.benchmark.endswith("-style") for panel in panels):
        style_note = " A benchmark called ...-style has items made after the published one's definition, not its data."
    mean = ""
    if any(panel.mean is not None for panel in panels):
        mean = " Black the mean over subsets; the band is that of the mean, subsets have none."
    return (
        f"Results {how} against training tokens: {told}.{hidden} pass@k: any of k sampled answers is right; best@k: "
        f"the best score of k samples, for graded answers; greedy: the mean score of the greedy answers.{mean} Bands: "
        "95 % intervals from the standard error over items, Wilson's for shares (of yes-or-no items, as many as would "
        f"have that error).{style_note}"
    )


def _panel(panel: ProbePanel) -> str:
    n = sorted({int(count) for line in panel.lines for count in line.n if count})
    items = "" if not n else f", n = {n[0]}" if n[0] == n[-1] else f", n = {n[0]} to {n[-1]}"
    if panel.mean is not None and n:
        items += f" in each of {len(panel.lines)} subsets"
    others = ", ".join(format_length(length) for length in panel.other_lengths)
    also = f" (the run has {others} too)" if others else ""
    return f"{panel.name}, {panel.about}{items}{also}"


def _corpus_ppl(tables: RunTables) -> str:
    panels = corpus_panels(tables)
    if not panels:
        return "Perplexity of held-out documents: none is defined from the base checkpoint on."
    corpora = {}
    for line in (line for panel in panels for line in panel.lines):
        of = f" of {format_length(line.length)} tokens" if line.length else ""
        corpora[line.corpus] = f"{line.corpus} ({line.n} documents{of})"
    apart = ""
    if len(corpora) > 1 and any(len(panel.lines) == 1 for panel in panels):
        apart = " Corpora whose perplexities are far apart have an axis each."
    long_ppl = ""
    if any(panel.label == "LongPPL" for panel in panels):
        long_ppl = (
            " Below, LongPPL (arXiv 2410.23771): the same over the tokens that need a long context, which one "
            "checkpoint names for all."
        )
    return (
        f"Perplexity of held-out documents, mean over documents of {', '.join(corpora.values())}, against the tokens "
        "N since the base checkpoint, on a linear axis (left) and a logarithmic one (right, the base by itself at the "
        "left end). Lines: PPL = A log N + B (natural logarithm) by least squares, without the base. Bars: 1.96 "
        "standard errors over documents; all checkpoints read the same ones, so changes are surer than the bars."
        f"{apart}{long_ppl}"
    )


def _interference_cells(own: InterferenceTables) -> str:
    n = sorted({int(count) for count in own.cells["n"]})
    span = str(n[-1]) if n[0] == n[-1] else f"{n[0]} to {n[-1]}"
    return f"{span} cases per cell, {MODE_NAMES.get(own.mode, own.mode)}"


def _interference_heatmaps(tables: RunTables) -> str:
    own = interference_of(tables)
    return (
        "Perplexity of the answer by absolute distance (tokens between the needle and the question) and interference "
        "length (tokens of context before the needle); there is no other needle. One panel per checkpoint, one scale "
        f"of colours. {PPL_SCALE} A cell is the mean of its samples' perplexities: {_interference_cells(own)}."
    )


def _interference_curves(tables: RunTables) -> str:
    own = interference_of(tables)
    _, distance = distance_rows(own, None)
    return (
        "Perplexity of the answer against the interference length (tokens of context before the needle) at an absolute "
        f"distance of {format_length(distance)} tokens between the needle and the question, one line per checkpoint. "
        f"{PPL_SCALE} {_interference_cells(own)}. Bands: 95 % bootstrap intervals over "
        f"{'pairs of needle and haystack' if own.cells['ci_over'][0] == 'clusters' else 'cases'}."
    )


def _ablated(kind: str, n: int, length: int | None, n_draws: int, ci_over: str) -> str:
    at = f" of {format_length(length)} tokens" if length else ""
    units = "pairs of needle and haystack" if ci_over == "clusters" else "cases"
    return (
        f"{ABLATION_NAMES.get(kind, kind)}; n = {n} cases{at}, teacher-forced, {n_draws} random sets each. Bands: 95 % "
        f"bootstrap intervals over {units} and random sets."
    )


def _causal_check(tables: RunTables) -> str:
    made = causal_check_panels(tables)
    which = "each head by itself" if made.is_single else "the k best heads"
    layers = "the same layers" if made.layer_matched else "the same layers (where these have enough, else of all)"
    rule = "" if made.is_single else " The axis of k is that of log(1 + k); at 0 all heads are there."
    return (
        f"Answer loss, share of exact answers (greedy) and answer perplexity (exp of the mean loss) of "
        f"{made.checkpoint} without {which}, and without as many random other heads of {layers}.{rule} "
        f"{_ablated(made.kind, made.n, made.length, made.n_draws, made.ci_over)} Ablation study {made.study}."
    )


def _causal_dates(tables: RunTables) -> str:
    made = causal_date_lines(tables)
    which = "each of these heads" if made.is_single else "each checkpoint's own k best heads"
    hidden = f" {made.n_hidden} more are not drawn." if made.n_hidden else ""
    return (
        f"What is lost without {which} beyond what is lost without as many random heads of the same layers: above, "
        "nats of answer loss; below, percentage points of exact answers. A diamond marks the first checkpoint at "
        "which, and at the one after it, the whole interval lies above the dotted line (0.05 nats, 5 points); white "
        f"where only one is left to tell.{hidden} "
        f"{_ablated(made.kind, made.n, made.length, made.n_draws, made.ci_over)} Ablation study {made.study}."
    )


def _metric_agreement(tables: RunTables) -> str:
    made = agreement_map(tables)
    return (
        f"Head metrics of {made.checkpoint} against each other: below the diagonal Spearman's rho over all "
        f"{made.n_heads} heads, above it how many of the {made.top_k} highest heads both name "
        f"({format_number(made.by_chance, 2)} by chance; ties count for their chance). Heads are ranked by their mean "
        f"over {made.n} cases of {format_length(made.length)} tokens, {_mode(tables)}."
    )


_WRITERS = {
    "causal_check": _causal_check,
    "causal_dates": _causal_dates,
    "metric_agreement": _metric_agreement,
    "probe_scores": _probe_scores,
    "corpus_ppl": _corpus_ppl,
    "interference_heatmaps": _interference_heatmaps,
    "interference_curves": _interference_curves,
    "ppl_heatmaps": _ppl_heatmaps,
    "niah_trajectory": _niah_trajectory,
    "head_heatmaps": _head_heatmaps,
    "retrieval_heads": _retrieval_heads,
    "depth_curves": _depth_curves,
    "head_lives": _head_lives,
    "saturation_curves": _saturation_curves,
    "cohort_survival": _cohort_survival,
    "reference_comparison": _reference_comparison,
}
