"""Metrics of a run as curves over the tokens since its base checkpoint, each with its resamples.

What the model does (NIAH score), how sure it is (perplexity and loss of the answer, per length and depth), which heads
copy (their number, the mean score of the initial ones) and what benchmarks and long documents say (probes): all in one
form, so that one question can be put to all of them. Resamples draw pairs of needle and haystack and are shared by all
checkpoints of a curve, so that differences between checkpoints are paired.

Where every case is wrong, or every case right, resampling finds no spread, and a fit would take that value for exact.
So a share of right answers has at least the variance of a smoothed share (`share_variance`); what resampling lacks of
it is added as seeded normal scatter, anew at each checkpoint.

The module reads tables; it refuses to know fits and verdicts. Cost: one scan of the outcome parts, one of the head
scores if they are asked for, and one matrix product per curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.heads import count_heads, head_sample
from lccp_interp.dynamics.outcomes import case_measures, dense_measures
from lccp_interp.dynamics.resampling import Resamples, draw_resamples, mean_defined, resampled_means
from lccp_interp.dynamics.selection import (
    CORPUS_BENCHMARKS,
    NOT_SCORES,
    base_checkpoint,
    choose,
    choose_length,
    choose_mode,
    niah_cases,
    run_probes,
    scored_checkpoints,
    warn_of_twins,
)
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

NIAH_SCORE, ANSWER_PPL, LOSS_NATS = "niah_score", "answer_ppl", "loss_nats"
PPL_BY_DEPTH = "answer_ppl_by_depth"
HEAD_COUNT, INITIAL_SCORE = "n_retrieval_heads", "mean_initial_score"
PROBE = "probe:"

LOWER_IS_BETTER = ("ppl", "perplexity", "loss", "nll", "error", "wer")
"""A probe whose metric has one of these in its name counts as better when lower, any other when higher."""

SCATTER_STREAM = 1
"""Number of the stream of random numbers for what resampling lacks; the resamples themselves use none."""

SERIES_SCHEMA = {
    "checkpoint": pl.String,
    "tokens_since_base": pl.Int64,
    "metric": pl.String,
    "length": pl.Int64,
    "depth_fraction": pl.Float64,
    "value": pl.Float64,
    "stderr": pl.Float64,
    "n": pl.Int64,
}


@dataclass(frozen=True)
class MetricCurve:
    """One metric over the checkpoints from the base on.

    `length` is in tokens and `depth_fraction` in 0..1, None where the metric has none. `tokens` counts from the base.
    `values` is NaN where undefined, `n` the number of cases behind each value. `deviations` `[resample, checkpoint]`
    is what resampling adds to a value, spread as wide as independent cases would spread it, for shares of right answers
    at least as wide as `share_variance`; 0 where nothing is known.
    """

    metric: str
    length: int | None
    depth_fraction: float | None
    higher_is_better: bool
    checkpoints: tuple[str, ...]
    tokens: NDArray[np.float64]
    values: NDArray[np.float64]
    n: NDArray[np.int64]
    deviations: NDArray[np.float64] = field(repr=False)

    def table(self) -> pl.DataFrame:
        """One row per checkpoint, columns as in `metric_series`."""
        return pl.DataFrame(
            {
                "checkpoint": list(self.checkpoints),
                "tokens_since_base": self.tokens.astype(np.int64),
                "metric": self.metric,
                "length": self.length,
                "depth_fraction": self.depth_fraction,
                "value": self.values,
                "stderr": self.deviations.std(axis=0),
                "n": self.n,
            },
            schema=SERIES_SCHEMA,
        )


def metric_series(
    run: Run,
    *,
    metrics: Sequence[str] | None = None,
    length: int | None = None,
    mode: str | None = None,
    n_boot: int = 500,
    seed: int = 0,
) -> pl.DataFrame:
    """All metrics over the tokens since the base checkpoint, in one long table.

    Args:
        run: an opened run.
        metrics: which ones, from `metric_names`; None means all of them.
        length: total length in tokens at which metrics are read; None means the longest of the run, and
            `answer_ppl` and `loss_nats` at every length.
        mode: as in `outcome_table`.
        n_boot: number of resamples behind `stderr`.
        seed: of the resamples.

    Returns:
        Columns checkpoint, tokens_since_base, metric, length, depth_fraction (null where they do not apply), value
        (NaN where undefined), stderr (of resampled cases, of a smoothed share where they are all right or all wrong; 0
        where nothing is known of it), n (cases). Scores are in percent, depths and head scores fractions, losses nats
        per token. Retrieval heads are those of `census`: above the threshold and above their null.

    Raises:
        LccpError: unknown metric, length or mode, two checkpoints with the same tokens, or probes of checkpoints that
            the run does not have.

    Example:
        >>> metric_series(Run.open("runs/demo"), metrics=["niah_score"]).head(3)   # doctest: +SKIP
    """
    curves = metric_curves(run, metrics=metrics, length=length, mode=mode, n_boot=n_boot, seed=seed)
    return pl.concat([pl.DataFrame(schema=SERIES_SCHEMA), *(curve.table() for curve in curves)])


def metric_names(run: Run) -> list[str]:
    """Names of the metrics that `run` can give, probes as `probe:benchmark[/subset]:metric`."""
    names = [NIAH_SCORE, ANSWER_PPL, LOSS_NATS, PPL_BY_DEPTH, HEAD_COUNT, INITIAL_SCORE]
    probes = run.probes.select("benchmark", "subset", "metric").unique().collect()
    return names + sorted(_probe_name(*row) for row in probes.rows() if row[-1] not in NOT_SCORES)


def corpus_name(names: Sequence[str]) -> str | None:
    """The first of `metric_names` that is the perplexity of long documents (mean over them); None without one.

    Example:
        >>> corpus_name(["niah_score", "probe:corpus-ppl/books:pooled_ppl", "probe:corpus-ppl/books:ppl"])
        'probe:corpus-ppl/books:ppl'
    """
    wanted = (name for name in names if name.startswith(f"{PROBE}{CORPUS_BENCHMARKS[0]}") and name.endswith(":ppl"))
    return next(wanted, None)


def metric_curves(
    run: Run,
    *,
    metrics: Sequence[str] | None = None,
    length: int | None = None,
    mode: str | None = None,
    n_boot: int = 500,
    seed: int = 0,
) -> list[MetricCurve]:
    """The curves behind `metric_series`. Arguments and errors are those of `metric_series`."""
    known = metric_names(run)
    wanted = known if metrics is None else [choose("metric", name, known, str(run.path)) for name in metrics]
    return _Reader(run, length, choose_mode(run, mode), n_boot, seed).read(list(dict.fromkeys(wanted)))


def checkpoints_from_base(run: Run) -> pl.DataFrame:
    """Columns checkpoint, tokens_since_base, hash of the base checkpoint and all later ones, in order.

    Two checkpoints with the same weights are kept, with a warning: to a fit they look like a plateau.

    Raises:
        LccpError: two checkpoints have seen the same number of tokens (as `Run.checkpoints`).
    """
    listed = run.checkpoints.rename({"name": "checkpoint"})
    base = base_checkpoint(listed)
    start = int(listed.filter(pl.col("checkpoint") == base)["tokens_seen"][0])
    own = listed.filter(pl.col("tokens_seen") >= start)
    warn_of_twins(run, own["checkpoint"].to_list())
    return own.select("checkpoint", (pl.col("tokens_seen") - start).alias("tokens_since_base"), "hash")


class _Reader:
    """Builds curves of one run, reading each table once."""

    def __init__(self, run: Run, length: int | None, mode: str, n_boot: int, seed: int) -> None:
        self.run, self.mode, self.n_boot, self.seed = run, mode, n_boot, seed
        self.asked = length
        self.length = choose_length(run, length)
        scored = scored_checkpoints(run, mode)["checkpoint"].implode()
        self.checkpoints = checkpoints_from_base(run)
        self.outcomes = case_measures(run, mode)
        # Checkpoints that are not scored yet are no part of any curve of outcomes.
        self.scored = self.checkpoints.filter(pl.col("checkpoint").is_in(scored))
        self.cases = niah_cases(run)

    def read(self, wanted: Sequence[str]) -> list[MetricCurve]:
        curves = []
        for name in wanted:
            if name == PPL_BY_DEPTH:
                at_length = self.cases.filter(pl.col("length") == self.length)
                for depth in at_length["depth_fraction"].unique().sort():
                    members = at_length.filter(pl.col("depth_fraction") == depth)
                    curves.append(self._of_cases(ANSWER_PPL, ANSWER_PPL, members, self.length, depth))
            elif name in (ANSWER_PPL, LOSS_NATS) and self.asked is None:
                for length in self.cases["length"].unique().sort():
                    members = self.cases.filter(pl.col("length") == length)
                    curves.append(self._of_cases(name, name, members, length, None))
            elif name in (NIAH_SCORE, ANSWER_PPL, LOSS_NATS):
                members = self.cases.filter(pl.col("length") == self.length)
                curves.append(self._of_cases(name, name, members, self.length, None))
            elif name.startswith(PROBE):
                curves += self._probes(name)
        heads = [name for name in wanted if name in (HEAD_COUNT, INITIAL_SCORE)]
        return [self._over_all_checkpoints(curve) for curve in curves + (self._heads(heads) if heads else [])]

    def _over_all_checkpoints(self, curve: MetricCurve) -> MetricCurve:
        """The curve with NaN at checkpoints that are in the run and not scored: they are seen to be missing."""
        place = {name: i for i, name in enumerate(self.checkpoints["checkpoint"])}
        at = [place[name] for name in curve.checkpoints]
        values = np.full(len(place), np.nan)
        n = np.zeros(len(place), np.int64)
        deviations = np.zeros((len(curve.deviations), len(place)))
        values[at], n[at], deviations[:, at] = curve.values, curve.n, curve.deviations
        tokens = self.checkpoints["tokens_since_base"].to_numpy().astype(np.float64)
        return replace(curve, checkpoints=tuple(place), tokens=tokens, values=values, n=n, deviations=deviations)

    def _of_cases(
        self, metric: str, column: str, members: pl.DataFrame, length: int | None, depth: float | None
    ) -> MetricCurve:
        """Mean of an outcome over the cases `members`, which have a `cluster`."""
        values = dense_measures(self.outcomes, self.scored, members, (column,))[column].T
        clusters = np.unique(members["cluster"].to_numpy(), return_inverse=True)[1]
        resamples = draw_resamples(clusters, n_boot=self.n_boot, seed=self.seed)
        mean, n = mean_defined(values)
        draws = resampled_means(values, resamples)
        is_share = column == NIAH_SCORE
        curve = self._curve(metric, length, depth, is_share, self.scored, mean, n, draws - mean, resamples)
        return with_share_variance(curve, resamples.n_units, whole=100, seed=self.seed) if is_share else curve

    def _curve(
        self,
        metric: str,
        length: int | None,
        depth: float | None,
        higher_is_better: bool,
        checkpoints: pl.DataFrame,
        values: NDArray[np.float64],
        n: NDArray[np.int64],
        deviations: NDArray[np.float64],
        resamples: Resamples,
    ) -> MetricCurve:
        units = resamples.n_units
        # Resamples of few units spread too little; of a single one they say nothing.
        widen = math.sqrt(units / (units - 1)) if units > 1 else 0.0
        return MetricCurve(
            metric,
            length,
            depth,
            higher_is_better,
            tuple(checkpoints["checkpoint"]),
            checkpoints["tokens_since_base"].to_numpy().astype(np.float64),
            values,
            n,
            np.nan_to_num(deviations, nan=0.0) * widen,
        )

    def _heads(self, wanted: Sequence[str]) -> list[MetricCurve]:
        """Number of retrieval heads, and mean score of those of the base checkpoint, at the chosen length.

        Resamples decide anew who is above the threshold; who is above its null is decided once, by all cases.
        """
        sample = head_sample(self.run, length=self.length, mode=self.mode, n_boot=self.n_boot, seed=self.seed)
        names = sample.values.checkpoints["checkpoint"]
        kept = self.checkpoints.filter(pl.col("checkpoint").is_in(names.implode()))
        rows = [names.to_list().index(name) for name in kept["checkpoint"]]
        if not rows:
            return []  # nothing at or after the base is scored at this length
        per_case = [sample.values.values[row] for row in rows]
        # `[checkpoint, head]` and `[checkpoint, resample, head]`
        scores = np.stack([mean_defined(values)[0] for values in per_case])
        n = np.array([(~np.isnan(values)).any(axis=1).sum() for values in per_case], np.int64)
        eligible = sample.may_retrieve[rows]
        # Initial heads are those of the base; without its scores there are none to follow.
        initial = (scores[0] > RETRIEVAL_THRESHOLD) & eligible[0] & (kept["tokens_since_base"][0] == 0)
        made: dict[str, Callable[[NDArray[np.float64], NDArray[np.bool_]], NDArray[np.float64]]] = {
            HEAD_COUNT: count_heads,
            INITIAL_SCORE: lambda scores, _: mean_defined(scores[..., initial].T)[0],
        }
        draws: dict[str, list[NDArray[np.float64]]] = {name: [] for name in wanted}
        for values, at_checkpoint in zip(per_case, eligible, strict=True):
            resampled = resampled_means(values, sample.resamples)
            for name in wanted:
                draws[name].append(made[name](resampled, at_checkpoint))
        curves = []
        for name in wanted:
            columns = np.stack(draws[name], axis=1)
            # A resampled count is biased (heads near the threshold cross it both ways); its spread is what is used.
            centre = mean_defined(columns)[0]
            curves.append(
                self._curve(
                    name,
                    self.length,
                    None,
                    True,
                    kept,
                    made[name](scores, eligible),
                    n,
                    columns - centre,
                    sample.resamples,
                )
            )
        return curves

    def _probes(self, name: str) -> list[MetricCurve]:
        """One curve per length of a probe."""
        rows = run_probes(self.run)
        rows = rows.filter(
            pl.Series([_probe_name(*row) == name for row in rows.select("benchmark", "subset", "metric").rows()])
        )
        rng = np.random.default_rng(self.seed)
        higher = not any(word in name.rsplit(":", 1)[1].lower() for word in LOWER_IS_BETTER)
        curves = []
        for (length,), part in rows.group_by("length", maintain_order=True):
            if part["checkpoint"].is_duplicated().any():
                twice = part.filter(pl.col("checkpoint").is_duplicated())["checkpoint"].unique().sort().to_list()
                raise LccpError(
                    f"{name} has several scores of {', '.join(twice)} in {self.run.path / 'probes'}; keep one for each"
                )
            joined = self.checkpoints.join(part, on="checkpoint", maintain_order="left")
            error = joined["stderr"].cast(pl.Float64).fill_nan(None)
            curve = MetricCurve(
                name,
                None if length is None else int(str(length)),
                None,
                higher,
                tuple(joined["checkpoint"]),
                joined["tokens_since_base"].to_numpy().astype(np.float64),
                joined["score"].cast(pl.Float64).fill_null(math.nan).to_numpy(),
                joined["n"].fill_null(0).to_numpy().astype(np.int64),
                rng.normal(size=(self.n_boot, joined.height)) * error.fill_null(0).to_numpy(),
            )
            known = error.is_not_null().to_numpy()
            curves.append(_with_variance_of_shares(curve, known, self.seed) if higher and known.any() else curve)
        return curves


def _with_variance_of_shares(curve: MetricCurve, known: NDArray[np.bool_], seed: int) -> MetricCurve:
    """A probe whose scores may be shares: of 1, or of 100 where one is above 1. Others are left as they are.

    Checkpoints whose standard error is not `known` stay without any.
    """
    defined = curve.values[np.isfinite(curve.values)]
    if not defined.size or defined.min() < 0 or defined.max() > 100:
        return curve
    whole = 1.0 if defined.max() <= 1 else 100.0
    n_units = int(curve.n[known].min())
    made = with_share_variance(curve, n_units, whole=whole, seed=seed) if n_units else curve
    return replace(made, deviations=np.where(known, made.deviations, curve.deviations))


def share_variance(
    share: NDArray[np.float64], variance: NDArray[np.float64], n: NDArray[np.int64], n_units: int
) -> NDArray[np.float64]:
    """The least variance that a share of right answers is given, per checkpoint.

    A share p of m independent answers is smoothed as one more right and one more wrong answer would: with m p right
    ones, (m p + 1) / (m + 2) (Laplace; Agresti and Coull 1998 add two of each), and its variance is that of m + 2 such
    answers. m lies between the units that are drawn and the answers: it is what the spread over all checkpoints tells,
    sum of p (1 - p) / sum of variances, or the units where there is no spread at all.

    Args:
        share: p, 0..1, `[checkpoint]`; NaN where undefined.
        variance: of each, from resampling.
        n: answers behind each.
        n_units: units that were drawn (pairs of needle and haystack).

    Returns:
        Variances `[checkpoint]`, NaN where `share` is.

    Example:
        >>> share_variance(np.array([0.0, 1.0]), np.zeros(2), np.array([20, 20]), 20).round(4).tolist()
        [0.002, 0.002]
    """
    spread = float(np.nansum(variance))
    counts = np.maximum(n, 1).astype(np.float64)
    m = np.minimum(float(n_units), counts)
    if spread > 0:
        m = np.clip(float(np.nansum(share * (1 - share))) / spread, m, counts)
    smooth = (m * share + 1) / (m + 2)
    return np.asarray(smooth * (1 - smooth) / (m + 2))


def with_share_variance(curve: MetricCurve, n_units: int, *, whole: float, seed: int) -> MetricCurve:
    """`curve`, a share of right answers in units of `whole` (1 or 100), with at least `share_variance`.

    What resampling lacks is added as normal scatter drawn from `seed`.
    """
    variance = (curve.deviations / whole).var(axis=0)
    lacking = np.maximum(share_variance(curve.values / whole, variance, curve.n, n_units) - variance, 0)
    rng = np.random.default_rng([seed, SCATTER_STREAM])
    scatter = rng.normal(size=curve.deviations.shape) * np.sqrt(np.nan_to_num(lacking, nan=0.0)) * whole
    return replace(curve, deviations=curve.deviations + scatter)


def _probe_name(benchmark: str, subset: str | None, metric: str) -> str:
    return f"{PROBE}{benchmark}{f'/{subset}' if subset else ''}:{metric}"
