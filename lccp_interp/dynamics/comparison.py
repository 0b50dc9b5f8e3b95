"""Head lists side by side: every checkpoint against a reference, how long a cohort survives, heads by key/value group.

The reference may be a checkpoint of the same run, another run, or a list that somebody published. The measures are
those of arXiv 2604.02650, Table 5 (overlap of the top heads, Spearman), and with them the Jaccard index of the two sets
of retrieval heads and rank-biased overlap (Webber, Moffat and Zobel 2010, "A similarity measure for indefinite
rankings").

This module knows tables of scores; it refuses to know models and pictures, and imports no torch. Cost: one
scan of the score parts per run, and `heads x 260` multiplications per checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.checkpoints import read_config
from lccp_interp.dynamics.heads import HeadSample, effective_top_k, is_retrieval_head, score_table, spearman
from lccp_interp.dynamics.ranking import RBO_P, membership, rank_biased_overlap, ranks_nothing, rbo_by_chance
from lccp_interp.dynamics.resampling import draw_resamples, percentile_interval, resampled_means
from lccp_interp.dynamics.selection import base_checkpoint, choose, head_values, warn_of_twins
from lccp_interp.imports import HEAD_KINDS, imported_heads, imported_names, list_shape, read_heads
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

COMPARISON_SCHEMA = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "stage": pl.String,
    "metric": pl.String,
    "length": pl.Int64,
    "reference": pl.String,
    "top_k": pl.Int64,
    "overlap": pl.Float64,
    "overlap_by_chance": pl.Float64,
    "jaccard": pl.Float64,
    "n_retrieval_heads": pl.Int64,
    "n_reference_heads": pl.Int64,
    "rbo": pl.Float64,
    "rbo_by_chance": pl.Float64,
    "spearman": pl.Float64,
    "n_heads": pl.Int64,
    "n": pl.Int64,
}
IMPORTED_PREFIX = "imported:"
N_BOOT = 1000


@dataclass(frozen=True)
class _Reference:
    """What checkpoints are compared with: a label and a list of heads for each of them (None: no counterpart).

    `whole` says that the lists name every head of their model, `kind` is that of an imported file.
    """

    of: Callable[[str, int], tuple[str, pl.DataFrame] | None]
    heads: pl.DataFrame
    label: str
    whole: bool
    kind: str | None = None


def compare(
    run: Run,
    reference: str | Path | Run | pl.DataFrame | None = None,
    *,
    metric: str = "retrieval",
    length: int | None = None,
    mode: str | None = None,
    top_k: int | None = None,
    threshold: float = RETRIEVAL_THRESHOLD,
    reference_threshold: float | None = None,
    rule: str = "above null",
    by_kv: bool = False,
    n_kv_heads: int | None = None,
    p: float = RBO_P,
) -> pl.DataFrame:
    """Compare the heads of every checkpoint with a reference.

    Args:
        run: an opened run.
        reference: the name of a checkpoint of the run (None: the base checkpoint); `imported:NAME`; the path of a head
            list (.json, .tsv, .csv, as in `imports.read_heads`) or a table with columns layer, head, score; or another
            run, opened or by its folder: each checkpoint is then compared with the other's of the same tokens_seen, or,
            as `FOLDER:CHECKPOINT`, with that one.
        metric, length, mode: as in `score_table`; another run is read at the same.
        top_k: size of the top lists; None means min(30, a quarter of the heads).
        threshold: above which a head of the run is a retrieval head.
        reference_threshold: the same for the reference; None means `threshold`. DuoAttention's gates are another scale.
        rule: `above null` (a retrieval head is also above its null, where decoys were measured) or `threshold`.
        by_kv: compare groups of heads that share a key/value head, by their best head.
        n_kv_heads: key/value heads per layer; None reads it from a checkpoint's config.json.
        p: of rank-biased overlap.

    Returns:
        One row per checkpoint, in order of tokens: checkpoint, tokens_seen, stage, metric, length, reference (null and
        all measures undefined where another run has no checkpoint of these tokens), top_k, overlap (heads in both top
        lists; where a tie straddles the last place, the number expected when it is broken at random, and so less than
        top_k even for a list and itself), overlap_by_chance (top_k^2 / number of heads), jaccard (retrieval heads of
        both / of either; NaN where neither has any), n_retrieval_heads, n_reference_heads, rbo, rbo_by_chance, spearman
        (over the heads that both define), n_heads (so many they are), n (cases behind the scores). Where all scores of
        a list are the same it ranks nothing, and overlap, rbo and spearman are NaN.

        Of a list that names only some heads, overlap and rbo use the places that it has, and Spearman its heads.

    Raises:
        LccpError: an unknown reference (the known ones are listed), a run of one checkpoint compared with itself,
            architectures that differ, or what `score_table` and `read_heads` raise.

    Example:
        >>> compare(Run.open("runs/demo"), "imported:llama-2-7b-80k")   # doctest: +SKIP
    """
    table = _marked(_scores(run, metric, length, mode), threshold, rule)
    length = int(table["length"][0])
    strict = threshold if reference_threshold is None else reference_threshold

    def read_other(other: Run) -> pl.DataFrame:
        return _marked(_scores(other, metric, length, mode), strict, rule)

    against = _resolve(run, table, reference, read_other, strict, rule)
    warn_of_twins(run, table["checkpoint"].unique(maintain_order=True).to_list())
    shown = table
    if by_kv:
        n_kv = n_kv_heads if n_kv_heads is not None else kv_heads_of(run)
        size = _group_size(table, n_kv)
        shown = _best_of_group(table, size)
        against = _grouped(against, table, shown, size, str(run.path))
    _check_architecture(shown, against, str(run.path))
    rows = []
    for (name, tokens), heads in shown.partition_by("checkpoint", "tokens_seen", as_dict=True).items():
        counterpart = against.of(str(name), int(tokens))
        label, theirs = counterpart or (None, against.heads.clear())
        rows.append(
            {
                "checkpoint": name,
                "tokens_seen": tokens,
                "stage": heads["stage"][0],
                "metric": metric,
                "length": length,
                "reference": label,
                **_measures(heads, theirs, whole=against.whole, top_k=top_k, p=p),
                "n": heads["n"].max(),
            }
        )
    return pl.DataFrame(rows, schema=COMPARISON_SCHEMA).sort("tokens_seen", "checkpoint")


def _scores(run: Run, metric: str, length: int | None, mode: str | None) -> pl.DataFrame:
    """`score_table`, resampled only where that decides something: whether a head is above its null."""
    values = head_values(run, metric=metric, length=length, mode=mode)
    n_boot = 1 if np.isnan(values.null).all() else N_BOOT
    return HeadSample(values, draw_resamples(values.clusters, n_boot=n_boot)).table()


def _marked(table: pl.DataFrame, threshold: float, rule: str) -> pl.DataFrame:
    return table.with_columns(retrieves=is_retrieval_head(table, threshold=threshold, rule=rule))


def _measures(
    heads: pl.DataFrame, theirs: pl.DataFrame, *, whole: bool, top_k: int | None, p: float
) -> dict[str, float | int | None]:
    """The measures of one row; `heads` and `theirs` have columns layer, head, score, retrieves."""
    pair = heads.join(
        theirs.select("layer", "head", other="score", other_retrieves="retrieves"), on=["layer", "head"], how="left"
    ).with_columns(pl.col("score", "other").cast(pl.Float64).fill_null(float("nan")))
    defined = pl.col("score").is_not_nan()
    # A head that a whole list leaves undefined cannot be ranked in either; one that a short list omits ranks behind.
    pair = pair.filter(defined & pl.col("other").is_not_nan() if whole else defined).sort("layer", "head")
    mine, other = pair["score"].to_numpy(), pair["other"].to_numpy()
    listed = ~np.isnan(other)
    if not listed.any():
        undefined = ("overlap", "overlap_by_chance", "jaccard", "rbo", "rbo_by_chance", "spearman")
        return {
            **dict.fromkeys(undefined, math.nan),
            "top_k": None,
            "n_retrieval_heads": int(heads["retrieves"].sum()),
            "n_reference_heads": int(theirs["retrieves"].sum()) if theirs.height else None,
            "n_heads": 0,
        }
    k = min(effective_top_k(top_k, len(mine)), int(listed.sum()))
    last = np.array([k])
    no_ranking = ranks_nothing(mine) or ranks_nothing(other)
    ours = pair["retrieves"].to_numpy()
    published = pair["other_retrieves"].fill_null(False).to_numpy()
    either = int((ours | published).sum())
    return {
        "top_k": k,
        "overlap": math.nan if no_ranking else float((membership(mine, last) * membership(other, last)).sum()),
        "overlap_by_chance": k * k / len(mine),
        "jaccard": int((ours & published).sum()) / either if either else math.nan,
        "n_retrieval_heads": int(ours.sum()),
        "n_reference_heads": int(published.sum()),
        "rbo": rank_biased_overlap(mine, other, p=p),
        "rbo_by_chance": rbo_by_chance(len(mine), int(listed.sum()), p=p),
        "spearman": spearman(mine[listed], other[listed]),
        "n_heads": int(listed.sum()),
    }


def _resolve(
    run: Run,
    table: pl.DataFrame,
    reference: str | Path | Run | pl.DataFrame | None,
    read_other: Callable[[Run], pl.DataFrame],
    threshold: float,
    rule: str,
) -> _Reference:
    names = table["checkpoint"].unique(maintain_order=True).to_list()
    if reference is None:
        reference = base_checkpoint(table)
    if isinstance(reference, pl.DataFrame):
        return _from_list(reference, "the given table", threshold)
    if isinstance(reference, Run):
        return _from_run(reference, read_other(reference))
    if isinstance(reference, str) and reference in names:
        if len(names) == 1:
            raise LccpError(
                f"run {run.path} has one scored checkpoint, {reference!r}; compare it with another run, "
                "imported:NAME or the file of a head list"
            )
        heads = _marked(table.filter(pl.col("checkpoint") == reference), threshold, rule)
        return _fixed(heads, reference, whole=True)
    if str(reference).startswith(IMPORTED_PREFIX):
        name = str(reference).removeprefix(IMPORTED_PREFIX)
        return _from_list(imported_heads(run, name), str(reference), threshold)
    path = Path(reference)
    folder, _, checkpoint = str(reference).rpartition(":")
    if (path / "run.json").is_file():
        other = Run.open(path)
        return _from_run(other, read_other(other))
    if folder and (Path(folder) / "run.json").is_file():
        other_table = read_other(Run.open(folder))
        known = other_table["checkpoint"].unique(maintain_order=True).to_list()
        chosen = choose("checkpoint", checkpoint, known, folder)
        return _fixed(other_table.filter(pl.col("checkpoint") == chosen), str(reference), whole=True)
    if path.is_file():
        return _from_list(read_heads(path), path.name, threshold)
    imported = "".join(f", {IMPORTED_PREFIX}{name}" for name in imported_names(run))
    raise LccpError(
        f"unknown reference {str(reference)!r}: {run.path} has {', '.join(names)}{imported}; or give another run's "
        f"folder, or the file of a head list ({', '.join(HEAD_KINDS)})"
    )


def _fixed(heads: pl.DataFrame, label: str, *, whole: bool, kind: str | None = None) -> _Reference:
    return _Reference(lambda name, tokens: (label, heads), heads, label, whole, kind)


def _from_list(heads: pl.DataFrame, label: str, threshold: float) -> _Reference:
    missing = [column for column in ("layer", "head", "score") if column not in heads.columns]
    if missing:
        raise LccpError(f"{label} has no column {missing[0]!r}; a head list needs layer, head, score")
    if heads.select("layer", "head").is_duplicated().any():
        layer, head = heads.filter(heads.select("layer", "head").is_duplicated()).select("layer", "head").row(0)
        raise LccpError(f"{label} has several scores for layer {layer} head {head}; keep one per head")
    score = pl.col("score").cast(pl.Float64).fill_null(float("nan"))
    heads = heads.with_columns(pl.col("layer", "head").cast(pl.Int64), score)
    kind = str(heads["kind"][0]) if "kind" in heads.columns and heads.height else None
    whole = list_shape(heads) is not None
    return _fixed(_marked(heads, threshold, "threshold"), label, whole=whole, kind=kind)


def _from_run(other: Run, table: pl.DataFrame) -> _Reference:
    """The checkpoint of `other` with the same tokens_seen."""
    listed = table.select("checkpoint", "tokens_seen").unique().sort("tokens_seen", "checkpoint")
    twice = listed.filter(pl.col("tokens_seen").is_duplicated())
    if twice.height:
        raise LccpError(
            f"run {other.path}: checkpoints {', '.join(twice['checkpoint'])} have the same tokens_seen; choose one as "
            f"{other.path}:NAME"
        )
    by_tokens = {
        tokens: (f"{other.path}:{name}", heads)
        for (name, tokens), heads in table.partition_by("checkpoint", "tokens_seen", as_dict=True).items()
    }
    return _Reference(lambda name, tokens: by_tokens.get(tokens), table, str(other.path), True)


def _check_architecture(table: pl.DataFrame, against: _Reference, where: str) -> None:
    """Refuse a reference whose heads are not those of the run."""
    ours, theirs = (_pairs(frame) for frame in (table, against.heads))
    strangers = sorted(theirs - ours)
    if not strangers and (ours == theirs or not against.whole):
        return
    shape, other = _shape(ours), _shape(theirs)
    if not against.whole:
        layer, head = strangers[0]
        raise LccpError(f"{against.label} names layer {layer} head {head}, but {where} has {shape}; give a list for it")
    hint = "compare models of one architecture"
    if against.kind == "duo" and {layer for layer, _ in theirs} == {layer for layer, _ in ours}:
        hint = "DuoAttention scores key/value heads: add --by-kv-head"
    elif shape == other:
        hint = f"the layers are not the same: layer {strangers[0][0]} is not scored in {where}"
    raise LccpError(f"architectures differ: {where} has {shape}, {against.label} has {other}; {hint}")


def _pairs(table: pl.DataFrame) -> set[tuple[int, int]]:
    return set(table.select("layer", "head").unique().rows())


def _shape(pairs: set[tuple[int, int]]) -> str:
    return f"{len({layer for layer, _ in pairs})} layers x {len({head for _, head in pairs})} heads"


def by_kv_head(
    source: Run | pl.DataFrame, n_kv_heads: int | None = None, *, metric: str = "retrieval", length: int | None = None
) -> pl.DataFrame:
    """Scores grouped by key/value head: in grouped-query attention, heads of one group read the same keys.

    Query head h belongs to key/value head h // (heads per layer / key/value heads per layer).

    Args:
        source: a run, or a table with columns layer, head, score (from `score_table`; several checkpoints, metrics and
            lengths may be in it).
        n_kv_heads: key/value heads per layer; None reads it from a checkpoint's config.json (of a run only).
        metric, length: as in `score_table`, for a run.

    Returns:
        The table's columns checkpoint, tokens_seen, stage, metric, length (those that it has), then layer, kv_head,
        max_score, mean_score (NaN where no head of the group is defined), best_head (null there; the first of ties),
        n_heads (of the group, with a defined score), n (the fewest cases behind one of them; null where not known).

    Raises:
        LccpError: the number of key/value heads is not known, or does not divide the heads of a layer.

    Example:
        >>> table = pl.DataFrame({"layer": [0] * 4, "head": [0, 1, 2, 3], "score": [0.2, 0.6, 0.0, 0.1]})
        >>> by_kv_head(table, 2).select("kv_head", "max_score", "best_head").rows()
        [(0, 0.6, 1), (1, 0.1, 3)]
    """
    if isinstance(source, Run):
        n_kv_heads = kv_heads_of(source) if n_kv_heads is None else n_kv_heads
        source = score_table(source, metric=metric, length=length)
    if n_kv_heads is None:
        raise LccpError("a table does not tell the number of key/value heads; give n_kv_heads")
    keys = [name for name in ("checkpoint", "tokens_seen", "stage", "metric", "length") if name in source.columns]
    score = pl.col("score").cast(pl.Float64).fill_nan(None)
    n = pl.col("n") if "n" in source.columns else pl.lit(None, dtype=pl.Int64)
    grouped = (
        source.sort("head")
        .group_by(*keys, "layer", kv_head=pl.col("head") // _group_size(source, n_kv_heads), maintain_order=True)
        .agg(
            max_score=score.max(),
            mean_score=score.mean(),
            best_head=pl.col("head").filter(score == score.max()).first(),
            n_heads=score.count().cast(pl.Int64),
            n=n.filter(score.is_not_null()).min(),
        )
    )
    order = [name for name in ("tokens_seen", "checkpoint", "metric", "length") if name in keys]
    return grouped.with_columns(pl.col("max_score", "mean_score").fill_null(float("nan"))).sort(
        *order, "layer", "kv_head"
    )


def kv_heads_of(run: Run) -> int:
    """Key/value heads per layer, from the config.json of the run's checkpoints.

    Raises:
        LccpError: no checkpoint is at its path any more, the configs disagree, or they do not tell.
    """
    told: dict[int, str] = {}
    folders = [Path(path) for path in run.checkpoints["path"].drop_nulls()]
    present = [folder for folder in folders if (folder / "config.json").is_file()]
    for folder in present:
        config = read_config(folder)
        text = config.get("text_config")
        n = config.get("num_key_value_heads", text.get("num_key_value_heads") if isinstance(text, dict) else None)
        if isinstance(n, bool) or not isinstance(n, int):
            raise LccpError(
                f"{folder / 'config.json'} does not tell num_key_value_heads (got {n!r}); give it with --n-kv-heads N"
            )
        told[n] = str(folder)
    if not told:
        raise LccpError(
            f"no checkpoint of {run.path} is at its path any more (looked at {len(folders)}, e.g. "
            f"{folders[0] if folders else 'none'}), so its key/value heads are not known; give --n-kv-heads N"
        )
    if len(told) > 1:
        different = ", ".join(f"{n} in {folder}" for n, folder in told.items())
        raise LccpError(f"the checkpoints of {run.path} differ in key/value heads: {different}; give --n-kv-heads N")
    return next(iter(told))


def _group_size(table: pl.DataFrame, n_kv_heads: int) -> int:
    n_heads = int(table["head"].max() or 0) + 1  # type: ignore[arg-type]
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise LccpError(f"{n_kv_heads} key/value heads do not divide the {n_heads} heads of a layer; mend --n-kv-heads")
    return n_heads // n_kv_heads


def _best_of_group(table: pl.DataFrame, size: int) -> pl.DataFrame:
    """`table` with key/value heads for heads, each with its best head's score; it retrieves if any head of it does."""
    keys = [name for name in ("checkpoint", "tokens_seen", "stage", "layer") if name in table.columns]
    n = pl.col("n").max() if "n" in table.columns else pl.lit(None, dtype=pl.Int64).alias("n")
    return table.group_by(*keys, head=pl.col("head") // size, maintain_order=True).agg(
        pl.col("score").fill_nan(None).max().fill_null(float("nan")), pl.col("retrieves").any(), n
    )


def _grouped(against: _Reference, table: pl.DataFrame, grouped: pl.DataFrame, size: int, where: str) -> _Reference:
    """The reference by key/value heads; a list that already is of those stays as it is."""
    theirs = _pairs(against.heads)
    if against.kind == "duo" or (theirs == _pairs(grouped) and theirs != _pairs(table)):
        return against
    _check_architecture(table, against, where)

    def of(name: str, tokens: int) -> tuple[str, pl.DataFrame] | None:
        found = against.of(name, tokens)
        return None if found is None else (found[0], _best_of_group(found[1], size))

    return replace(against, of=of, heads=_best_of_group(against.heads, size))


def survival(
    table: pl.DataFrame,
    *,
    cohort: str | None = None,
    threshold: float = RETRIEVAL_THRESHOLD,
    rule: str = "above null",
    sample: HeadSample | None = None,
) -> pl.DataFrame:
    """Share of a cohort of retrieval heads that are retrieval heads at each later checkpoint.

    The cohort are the retrieval heads of one checkpoint. It is a plain fraction at each checkpoint: a head that falls
    below the threshold and rises again is out and then in, so the curve may rise. (`lives` tells deaths from noise.)

    Args:
        table: from `score_table` (one metric, one length).
        cohort: the checkpoint whose heads they are; None means the base checkpoint.
        threshold, rule: which heads are retrieval heads, as in `is_retrieval_head`.
        sample: what `table` was made from (`head_sample`); without it the interval is NaN.

    Returns:
        One row per checkpoint from the cohort's own on: checkpoint, tokens_seen, stage, cohort, n_cohort, n_defined (of
        the cohort, with a defined score there), n_alive, survival (n_alive / n_defined; NaN for 0 / 0), ci_low, ci_high
        (percentiles over the resamples of `sample`, each of which chooses its own cohort; whether a head is above its
        null is not resampled).

    Raises:
        LccpError: a cohort that is no checkpoint of the table, an unknown rule, or an empty table.

    Example:
        >>> table = pl.DataFrame({
        ...     "checkpoint": ["a", "a", "b", "b"], "tokens_seen": [0, 0, 9, 9], "stage": ["train"] * 4,
        ...     "layer": [0] * 4, "head": [0, 1, 0, 1], "score": [0.3, 0.2, 0.5, 0.0]})
        >>> survival(table).select("checkpoint", "n_cohort", "n_alive", "survival").rows()
        [('a', 2, 2, 1.0), ('b', 2, 1, 0.5)]
    """
    listed = table.select("checkpoint", "tokens_seen", "stage").unique().sort("tokens_seen", "checkpoint")
    names = listed["checkpoint"].to_list()
    cohort = base_checkpoint(table) if cohort is None else choose("cohort", cohort, names, "the score table")
    later = listed.slice(names.index(cohort))
    alive = table.with_columns(
        alive=is_retrieval_head(table, threshold=threshold, rule=rule), defined=pl.col("score").is_not_nan()
    )
    members = alive.filter("alive", pl.col("checkpoint") == cohort).select("layer", "head")
    counts = (
        alive.join(members, on=["layer", "head"], how="semi")
        .group_by("checkpoint")
        .agg(n_defined=pl.col("defined").sum().cast(pl.Int64), n_alive=pl.col("alive").sum().cast(pl.Int64))
    )
    low, high = _survival_interval(table, later["checkpoint"].to_list(), threshold, rule, sample)
    return (
        later.join(counts, on="checkpoint", how="left", maintain_order="left")
        .with_columns(pl.col("n_defined", "n_alive").fill_null(0))
        .select(
            "checkpoint",
            "tokens_seen",
            "stage",
            cohort=pl.lit(cohort),
            n_cohort=pl.lit(members.height, dtype=pl.Int64),
            n_defined="n_defined",
            n_alive="n_alive",
            survival=pl.when(pl.col("n_defined") > 0)
            .then(pl.col("n_alive") / pl.col("n_defined"))
            .otherwise(float("nan")),
            ci_low=pl.Series(low),
            ci_high=pl.Series(high),
        )
    )


def _survival_interval(
    table: pl.DataFrame, names: list[str], threshold: float, rule: str, sample: HeadSample | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval of the survival at each of `names`; the first of them is the cohort's own checkpoint."""
    undefined = np.full(len(names), np.nan)
    if sample is None or sample.resamples.n_units < 2:
        return undefined, undefined
    values = sample.values
    order = pl.DataFrame(values.heads, schema={"layer": pl.Int64, "head": pl.Int64})
    eligible = table.with_columns(eligible=is_retrieval_head(table, threshold=-math.inf, rule=rule))
    shares = np.full((sample.resamples.weights.shape[0], len(names)), np.nan)
    cohort: NDArray[np.bool_] | None = None
    for column, name in enumerate(names):
        at = values.checkpoints["checkpoint"].to_list().index(name)
        flags = order.join(
            eligible.filter(pl.col("checkpoint") == name).select("layer", "head", "eligible"),
            on=["layer", "head"],
            how="left",
            maintain_order="left",
        )["eligible"]
        draws = resampled_means(values.values[at], sample.resamples)
        alive = (draws > threshold) & flags.fill_null(False).to_numpy()
        cohort = alive if cohort is None else cohort
        n_defined = (cohort & ~np.isnan(draws)).sum(axis=1)
        shares[:, column] = np.where(n_defined > 0, (cohort & alive).sum(axis=1) / np.maximum(n_defined, 1), np.nan)
    return percentile_interval(shares, sample.resamples.confidence)
