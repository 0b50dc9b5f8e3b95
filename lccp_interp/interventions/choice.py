"""What a causal check is made on: which cases of a run, which heads are its best, which others stand beside them.

It knows the tables of a run; it refuses to know models, and imports no torch. Cost: one scan of the score parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from lccp_interp.interventions.heads import Head
from lccp_interp.schema import Case, LccpError
from lccp_interp.store import Run, cases_from_frame

DEFAULT_K = (1, 2, 3, 5, 10)
TASKS = ("niah", "longbio")
"""Tasks whose cases hide one needle at one length: what heads are scored and checked on."""


@dataclass(frozen=True)
class HeadSet:
    """Heads to silence together, and what for.

    Attributes:
        role: `none`, `top`, `single` or `random`.
        heads: which; none for the intact model.
        draw: number of the random draw.
        matched_to: the heads that a random set is held against.
        layer_matched: whether all of a random set's heads lie in the layers of those.
    """

    role: str
    heads: tuple[Head, ...] = ()
    draw: int | None = None
    matched_to: tuple[Head, ...] | None = None
    layer_matched: bool | None = None


def chosen_cases(run: Run, length: int | None, n_cases: int) -> list[Case]:
    """At most `n_cases` of a run's cases of one length (None: its longest), spread evenly over depths.

    Raises:
        LccpError: no cases of one needle each, or none of that length.
    """
    frame = run.cases.filter(pl.col("task").is_in(TASKS))
    if frame.is_empty():
        others = ", ".join(sorted(run.cases["task"].unique())) or "none"
        raise LccpError(
            f"run {run.path} has no needle-in-a-haystack cases (it has: {others}); heads are checked on them: score "
            "with --task niah"
        )
    known = sorted(frame["length"].unique())
    length = known[-1] if length is None else length
    if length not in known:
        raise LccpError(
            f"run {run.path} has no cases of {length} tokens; it has {', '.join(map(str, known))}; choose one of them"
        )
    ordered = frame.filter(length=length).sort("sample", "needle_id", "depth_fraction", "case_id")
    # Depth by depth in turn: of each the first, then of each the second.
    turn = pl.int_range(pl.len()).over("depth_fraction")
    ordered = ordered.with_columns(turn=turn).sort("turn", "depth_fraction", maintain_order=True).drop("turn")
    return cases_from_frame(ordered.head(n_cases))


def ranked_heads(
    run: Run, metric: str, length: int, names: Sequence[str], *, at_least: int = 1
) -> dict[str, list[Head]]:
    """The heads of checkpoints, best first by their mean over the run's cases of a length; undefined ones left out.

    Raises:
        LccpError: the run does not have the metric, or one of these checkpoints not at this length and for as many
            heads as `at_least`.
    """
    known = run.collect(run.scores.select("metric", "mode").unique()).sort("metric", "mode")
    if metric not in known["metric"]:
        shown = ", ".join(name for name in known["metric"].unique(maintain_order=True) if "@" not in name)
        raise LccpError(
            f"run {run.path} has no scores of metric {metric!r}; it has {shown}; `lccp score CHECKPOINT... --metrics "
            f"{metric} --out NEW_RUN` makes them, or name heads with --heads"
        )
    modes = known.filter(metric=metric)["mode"].to_list()
    mode = "teacher_forced" if "teacher_forced" in modes else modes[0]
    cases = run.cases.filter(pl.col("task").is_in(TASKS), length=length)["case_id"]
    means = run.collect(
        run.scores.filter(
            pl.col("value").is_finite(), pl.col("case_id").is_in(cases.implode()), metric=metric, mode=mode
        )
        .group_by("checkpoint", "layer", "head")
        .agg(pl.col("value").cast(pl.Float64).mean())
    ).sort("checkpoint", "value", "layer", "head", descending=[False, True, False, False])
    ranked = {}
    for name in names:
        own = means.filter(checkpoint=name)
        if own.height < at_least:
            raise LccpError(
                f"checkpoint {name!r} has {metric} scores of {own.height} heads at {length} tokens in {run.path}, "
                f"{at_least} are to be silenced; finish it with `lccp score ... --out {run.path}`, or name heads with "
                "--heads"
            )
        ranked[name] = list(own.select("layer", "head").iter_rows())
    return ranked


def set_sizes(
    k: Sequence[int] | None, heads: Sequence[Head] | None, known: Sequence[Head], *, each: bool = False
) -> list[int]:
    """How many of the best heads are silenced together, ascending; each leaves as many others for a random set.

    Args:
        k: as asked; None means `DEFAULT_K`, as far as it goes, and all of `heads`.
        heads: a list to take them from; None means the model's own ranking.
        known: all heads of the model.
        each: whether they are silenced one at a time; then the greatest size only says how many.

    Raises:
        LccpError: a size below 1, or with fewer heads than that to take or to draw from.

    Example:
        >>> set_sizes(None, None, [(layer, head) for layer in range(2) for head in range(4)])
        [1, 2, 3]
    """
    n_listed = len(known) if heads is None else len(heads)
    most = n_listed if each else len(known) // 2
    if k is None:
        usual = [size for size in DEFAULT_K if size <= min(most, n_listed)]
        k = usual if heads is None or n_listed in usual else [*usual, n_listed]
    for size in k:
        if size < 1:
            raise LccpError(f"k is a number of heads above 0, got {size}; the usual ones are 1,2,3,5,10")
        if size > n_listed:
            what = "that the model has" if heads is None else "that are named"
            raise LccpError(f"k {size} is more than the {n_listed} heads {what}; ask for fewer")
        if size > most:
            raise LccpError(
                f"k {size} of {len(known)} heads leaves {len(known) - size} others, too few for a random set of "
                f"{size}; ask for at most {most}"
            )
    return sorted(set(k))


def head_sets(
    ranked: Sequence[Head], known: Sequence[Head], sizes: Sequence[int], *, each: bool, n_draws: int, seed: int
) -> list[HeadSet]:
    """The intact model, the best heads (together by `sizes`, or each alone), and random sets beside each of these.

    Example:
        >>> known = [(layer, head) for layer in range(2) for head in range(4)]
        >>> sets = head_sets([(1, 0), (0, 2)], known, [2], each=False, n_draws=3, seed=0)
        >>> [(own.role, len(own.heads)) for own in sets]
        [('none', 0), ('top', 2), ('random', 2), ('random', 2), ('random', 2)]
    """
    if each:
        best = [HeadSet("single", (head,)) for head in ranked[: max(sizes)]]
    else:
        best = [HeadSet("top", tuple(ranked[:size])) for size in sizes]
    sets = [HeadSet("none")]
    for own in best:
        sets.append(own)
        drawn = _random_sets(own.heads, known, n_draws, np.random.default_rng([seed, len(own.heads)]))
        for draw, (heads, matched) in enumerate(drawn):
            sets.append(HeadSet("random", heads, draw, own.heads, matched))
    return sets


def _random_sets(
    chosen: Sequence[Head], known: Sequence[Head], n_draws: int, rng: np.random.Generator
) -> list[tuple[tuple[Head, ...], bool]]:
    """Different sets of as many other heads in the same layers; where a layer has too few, the rest from all layers."""
    others = [head for head in known if head not in set(chosen)]
    drawn: dict[tuple[Head, ...], bool] = {}
    for _ in range(50 * n_draws):
        picked: list[Head] = []
        for layer, count in sorted(Counter(layer for layer, _ in chosen).items()):
            picked += _pick([head for head in others if head[0] == layer], count, rng)
        missing = len(chosen) - len(picked)
        picked += _pick([head for head in others if head not in picked], missing, rng)
        drawn.setdefault(tuple(sorted(picked)), missing == 0)
        if len(drawn) == n_draws:
            break
    return list(drawn.items())


def _pick(heads: Sequence[Head], count: int, rng: np.random.Generator) -> list[Head]:
    places = rng.permutation(len(heads))[:count]
    return [heads[place] for place in places]
