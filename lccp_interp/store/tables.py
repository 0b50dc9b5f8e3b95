"""The tables of a run folder: their columns, and how cases and results become rows.

This module knows columns and types; it refuses to know files. Cost: one row object per case or outcome, none per score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from lccp_interp.schema import Case, CaseResult, Checkpoint, Span

CASES_SCHEMA: dict[str, Any] = {
    "case_id": pl.String,
    "task": pl.String,
    "length": pl.Int64,
    "depth_fraction": pl.Float64,
    "needle_id": pl.String,
    "haystack_id": pl.String,
    "sample": pl.Int64,
    "seed": pl.Int64,
    "prompt_ids": pl.List(pl.Int32),
    "answer_ids": pl.List(pl.Int32),
    "needle_start": pl.Int64,
    "needle_end": pl.Int64,
    "source_start": pl.Int64,
    "source_end": pl.Int64,
    "distance": pl.Int64,
    "interference": pl.Int64,
    "question_start": pl.Int64,
    "question_end": pl.Int64,
}
TASK_COLUMNS = ("distance", "interference")
"""Columns of cases that belong to one task: null in the others, and not there in runs made before that task was."""
QUESTION_COLUMNS = ("question_start", "question_end")
"""Where the question stands: null where it is not known, and not there in runs made before it was kept."""

SCORES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "case_id": pl.String,
    "mode": pl.String,
    "metric": pl.String,
    "layer": pl.Int32,
    "head": pl.Int32,
    "value": pl.Float32,
}
OUTCOMES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "case_id": pl.String,
    "mode": pl.String,
    "answer_loss_nats": pl.List(pl.Float32),
    "answer_ppl": pl.Float64,
    "greedy_exact": pl.Boolean,
    "token_accuracy": pl.Float64,
    "rouge1_recall": pl.Float64,
    "generated": pl.String,
}
TABLES: dict[str, dict[str, Any]] = {"scores": SCORES_SCHEMA, "outcomes": OUTCOMES_SCHEMA}
OPTIONAL_COLUMNS = ("token_accuracy", "rouge1_recall", "generated")
"""Columns that another writer's parts may lack: nothing over checkpoints is read from them."""

REDO_PART = "run the scoring command again after deleting it, it redoes this part"
PROBES_SCHEMA: dict[str, Any] = {
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "benchmark": pl.String,
    "subset": pl.String,
    "length": pl.Int64,
    "metric": pl.String,
    "score": pl.Float64,
    "n": pl.Int64,
    "stderr": pl.Float64,
}
"""Benchmark results per checkpoint. Null where there is none or it is not known: subset, length (tokens), n, stderr."""

PROBE_KEY = ("checkpoint", "benchmark", "subset", "length", "metric")
"""What a probe result is of; a run holds one score for each."""


def cases_frame(cases: Sequence[Case]) -> pl.DataFrame:
    """Table of cases, one row each, columns as in `CASES_SCHEMA`."""
    rows = [
        {
            "case_id": case.case_id,
            "task": case.task,
            "length": case.length,
            "depth_fraction": case.depth_fraction,
            "needle_id": case.needle_id,
            "haystack_id": case.haystack_id,
            "sample": case.sample,
            "seed": case.seed,
            "prompt_ids": list(case.prompt_ids),
            "answer_ids": list(case.answer_ids),
            "needle_start": case.needle.start,
            "needle_end": case.needle.end,
            "source_start": case.source.start,
            "source_end": case.source.end,
            **{name: getattr(case, name) for name in TASK_COLUMNS},
            **{name: getattr(case.question, name.removeprefix("question_"), None) for name in QUESTION_COLUMNS},
        }
        for case in cases
    ]
    return pl.DataFrame(rows, schema=CASES_SCHEMA)


def cases_from_frame(frame: pl.DataFrame) -> list[Case]:
    """The inverse of `cases_frame`."""
    return [
        Case(
            case_id=row["case_id"],
            task=row["task"],
            length=row["length"],
            depth_fraction=row["depth_fraction"],
            needle_id=row["needle_id"],
            haystack_id=row["haystack_id"],
            sample=row["sample"],
            seed=row["seed"],
            prompt_ids=tuple(row["prompt_ids"]),
            answer_ids=tuple(row["answer_ids"]),
            needle=Span(row["needle_start"], row["needle_end"]),
            source=Span(row["source_start"], row["source_end"]),
            **{name: row.get(name) for name in TASK_COLUMNS},
            question=None if row.get("question_start") is None else Span(row["question_start"], row["question_end"]),
        )
        for row in frame.iter_rows(named=True)
    ]


def result_frames(
    checkpoint: Checkpoint, mode: str, results: Sequence[CaseResult], answers: Mapping[str, Sequence[int]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Long tables (scores, outcomes) of one unit's results.

    Args:
        checkpoint: whose results these are.
        mode: `teacher_forced` or `generate`.
        results: one per case.
        answers: answer token ids by case id, to judge the greedy path: exact if it is the answer, or, where the model
            wrote on its own, begins with it.
    """
    score_parts = []
    outcome_rows = []
    for result in results:
        for metric, values in result.scores.items():
            n_heads = values.shape[1]
            score_parts.append(
                pl.DataFrame(
                    {
                        "case_id": pl.Series([result.case_id]).new_from_index(0, values.size),
                        "metric": pl.Series([metric]).new_from_index(0, values.size),
                        "layer": [layer for layer in result.layers for _ in range(n_heads)],
                        "head": list(range(n_heads)) * len(result.layers),
                        "value": values.reshape(-1),
                    }
                )
            )
        answer = tuple(answers[result.case_id])
        # What a model wrote may be shorter or longer than the answer; teacher-forced there is a token for each.
        teacher_forced = result.generated is None
        correct = sum(got == expected for got, expected in zip(result.greedy_ids, answer, strict=teacher_forced))
        outcome_rows.append(
            {
                "checkpoint": checkpoint.name,
                "tokens_seen": checkpoint.tokens_seen,
                "case_id": result.case_id,
                "mode": mode,
                "answer_loss_nats": result.answer_loss_nats.tolist(),
                "answer_ppl": result.answer_ppl,
                "greedy_exact": correct == len(answer),
                "token_accuracy": correct / len(answer),
                "rouge1_recall": result.rouge1_recall,
                "generated": result.generated,
            }
        )
    scores = pl.concat(score_parts).with_columns(
        checkpoint=pl.lit(checkpoint.name), tokens_seen=pl.lit(checkpoint.tokens_seen), mode=pl.lit(mode)
    )
    return (
        scores.select(pl.col(name).cast(dtype) for name, dtype in SCORES_SCHEMA.items()),
        pl.DataFrame(outcome_rows, schema=OUTCOMES_SCHEMA),
    )
