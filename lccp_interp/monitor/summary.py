"""One checkpoint of a run in a few numbers: heads, initial heads, answers, births and deaths, and whether it is over.

The numbers are those of the run's own tables (`census`, `lives`, `outcome_table`, `saturation_table`), per length. It
knows tables, imports no torch, and refuses to know where a checkpoint came from. Cost: one judged curve per length, and
a walk over the heads that ever were retrieval heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from lccp_interp.dynamics.curves import LOSS_NATS, metric_curves
from lccp_interp.dynamics.heads import census, events, is_retrieval_head, score_table
from lccp_interp.dynamics.outcomes import case_measures
from lccp_interp.dynamics.saturation import IMPROVING, SATURATED, UNKNOWN, judge
from lccp_interp.dynamics.selection import base_checkpoint, choose_mode, niah_cases
from lccp_interp.schema import RETRIEVAL_THRESHOLD, LccpError
from lccp_interp.store import Run

VERDICT_CODES = {SATURATED: 1.0, IMPROVING: 0.0, UNKNOWN: -1.0}
"""How a verdict is written where only numbers can be logged."""

Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class LengthSummary:
    """What one checkpoint shows at one length; NaN where it is undefined.

    `initial_score` is the mean score of the `n_initial` heads that are followed, `answer_ppl` and `loss_nats` means
    over cases, `niah_score` percent of cases answered right in every token, `births` and `deaths` those of all
    checkpoints up to this one that are not provisional, `verdict` that of the answer's loss.
    """

    length: int
    n_retrieval_heads: int
    n_initial: int
    initial_score: float
    answer_ppl: float
    loss_nats: float
    niah_score: float
    births: int
    deaths: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """What one checkpoint shows, shortest length first."""

    checkpoint: str
    tokens_seen: int
    lengths: tuple[LengthSummary, ...]

    @property
    def verdict(self) -> str:
        """That of the longest length."""
        return self.lengths[-1].verdict

    def logs(self) -> dict[str, float]:
        """Numbers for a logger, keys as in `RetrievalHeadMonitor`; what is undefined is left out."""
        logs: dict[str, float] = {}
        for at in self.lengths:
            logs |= {
                f"lccp/heads_{at.length}": float(at.n_retrieval_heads),
                f"lccp/initial_score_{at.length}": at.initial_score,
                f"lccp/ppl_{at.length}": at.answer_ppl,
                f"lccp/loss_nats_{at.length}": at.loss_nats,
                f"lccp/niah_score_{at.length}": at.niah_score,
                f"lccp/births_{at.length}": float(at.births),
                f"lccp/deaths_{at.length}": float(at.deaths),
                f"lccp/saturated_{at.length}": VERDICT_CODES[at.verdict],
            }
        return {key: value for key, value in logs.items() if not math.isnan(value)}

    def record(self) -> dict[str, Any]:
        """Plain data for JSON; None where undefined."""
        record = asdict(self) | {"verdict": self.verdict}
        for at in record["lengths"]:
            at |= {name: None for name, value in at.items() if isinstance(value, float) and math.isnan(value)}
        return record

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"{at.length}: {at.n_retrieval_heads} heads, initial {_score(at.initial_score)}, PPL {at.answer_ppl:.4g}, "
            f"{at.births} born, {at.deaths} died"
            for at in self.lengths
        ]
        return f"{self.checkpoint} ({self.tokens_seen:,} tokens)  {'; '.join(parts)}; {self.verdict}"


def _score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def length_tables(run: Run) -> dict[int, pl.DataFrame]:
    """The score table of every length of a run, shortest first."""
    lengths = sorted(niah_cases(run)["length"].unique().to_list())
    return {length: score_table(run, length=length) for length in lengths}


def summarise(
    run: Run, checkpoint: str, *, tables: Mapping[int, pl.DataFrame] | None = None, initial: Heads | None = None
) -> Summary:
    """The numbers of one checkpoint, with what all checkpoints before it have to say.

    Args:
        run: an opened run that holds the checkpoint, scored.
        checkpoint: its name.
        tables: the run's score tables by length, if they are at hand (`length_tables`).
        initial: heads to follow, (layer, head); None for the retrieval heads of the base checkpoint.

    Raises:
        LccpError: the checkpoint is not scored in the run.

    Example:
        >>> print(summarise(Run.open("runs/demo"), "18-lccp-2.62M").line())   # doctest: +SKIP
    """
    tables = length_tables(run) if tables is None else tables
    measures = case_measures(run, choose_mode(run, None)).filter(checkpoint=checkpoint)
    measured = measures.join(niah_cases(run).select("case_id", "length"), on="case_id")
    verdicts = _verdicts(run)
    found, tokens_seen = [], 0
    for length, table in sorted(tables.items()):
        own = table.filter(checkpoint=checkpoint)
        if own.is_empty():
            raise LccpError(f"checkpoint {checkpoint!r} is not scored at {length} tokens in {run.path}; score it first")
        tokens_seen = own["tokens_seen"][0]
        table = table.filter(pl.col("tokens_seen") <= tokens_seen)
        at = measured.filter(length=length)
        n_births, n_deaths = _births_and_deaths(table)
        n_initial, score = _followed(table, own, initial)
        verdict, reason = verdicts.get(length, (UNKNOWN, "it has no curve"))
        found.append(
            LengthSummary(
                length=length,
                n_retrieval_heads=int(is_retrieval_head(own).sum()),
                n_initial=n_initial,
                initial_score=score,
                answer_ppl=_mean(at["answer_ppl"]),
                loss_nats=_mean(at["loss_nats"]),
                niah_score=_mean(at["niah_score"]),
                births=n_births,
                deaths=n_deaths,
                verdict=verdict,
                reason=reason,
            )
        )
    return Summary(checkpoint, tokens_seen, tuple(found))


def heads_to_follow(run: Run, length: int | None = None) -> list[tuple[int, int]]:
    """The initial heads of a run: retrieval heads of its base checkpoint, at one length (None: the longest).

    Raises:
        LccpError: nothing is scored there.
    """
    table = score_table(run, length=length)
    base = table.filter(checkpoint=base_checkpoint(table))
    return base.filter(is_retrieval_head(base)).select("layer", "head").rows()


def _followed(table: pl.DataFrame, own: pl.DataFrame, initial: Heads | None) -> tuple[int, float]:
    """How many heads are followed, and their mean score at the checkpoint whose rows are `own`."""
    if initial is None:
        counted = census(table).filter(checkpoint=own["checkpoint"][0])
        return int(counted["n_initial"][0]), float(counted["mean_initial_score"][0])
    wanted = pl.DataFrame(list(initial), schema={"layer": pl.Int64, "head": pl.Int64}, orient="row")
    heads = own.with_columns(pl.col("layer", "head").cast(pl.Int64)).join(wanted, on=["layer", "head"], how="semi")
    return wanted.height, _mean(heads["score"])


def _births_and_deaths(table: pl.DataFrame) -> tuple[int, int]:
    """Of heads that were never above the threshold no life can begin, and walking them would cost the most."""
    ever = table.group_by("layer", "head").agg(top=pl.col("score").fill_nan(None).max())
    table = table.join(ever.filter(pl.col("top") > RETRIEVAL_THRESHOLD), on=["layer", "head"], how="semi")
    kinds = [kind for kind, is_open in events(table).select("kind", "provisional").rows() if not is_open]
    return kinds.count("birth"), kinds.count("death")


def _verdicts(run: Run) -> dict[int, tuple[str, str]]:
    """Verdict and reason by length, of the answer's loss: what moves first and has the least noise."""
    rows = [judge(curve) for curve in metric_curves(run, metrics=[LOSS_NATS])]
    return {row["length"]: (row["verdict"], row["reason"]) for row in rows if row["length"] is not None}


def _mean(values: pl.Series) -> float:
    numbers = values.cast(pl.Float64).to_numpy()
    defined = numbers[~np.isnan(numbers)]
    return float(defined.mean()) if defined.size else math.nan
