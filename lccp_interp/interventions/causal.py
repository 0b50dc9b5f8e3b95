"""The causal check: are the heads that score high the ones that a checkpoint retrieves with?

The k best heads of a checkpoint are silenced and the run's own cases asked again; beside them, as often as asked, k
other heads of the same layers. If retrieval goes with the former and stays with the latter, the score has found what
does the work. Every answer is kept, one row per case and set of heads, as parts of the run folder (`ablations/`), so
that intervals can be taken over cases (`dynamics.causal` does).

The unit of work is a checkpoint: one whose part exists is skipped, so the check may be interrupted and repeated. Heads
are silenced over the whole prompt, while it is read and while the answer is. Prompts share their prefixes within one
set of heads, never across sets. This module knows runs and models; it refuses
to know statistics, and imports no torch before a checkpoint is loaded. Cost per checkpoint: one load, and one prefill
per case and different set of heads.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lccp_interp.interventions.choice import HeadSet, chosen_cases, head_sets, ranked_heads, set_sizes
from lccp_interp.interventions.heads import Head, check_heads, head_text, known_heads
from lccp_interp.schema import Case, Checkpoint, LccpError
from lccp_interp.store import Run, check_parts, config_hash, editing, file_stem, is_whole, provenance, write_part
from lccp_interp.sweep import Access, Progress, find_run_checkpoints, load_located

if TYPE_CHECKING:
    from lccp_interp.capture.model import HookedModel

KINDS = ("zero", "mean", "resample", "blind")

ABLATIONS_SCHEMA: dict[str, Any] = {
    "study": pl.String,
    "checkpoint": pl.String,
    "tokens_seen": pl.Int64,
    "case_id": pl.String,
    "kind": pl.String,
    "set": pl.String,
    "k": pl.Int64,
    "draw": pl.Int64,
    "heads": pl.String,
    "matched_to": pl.String,
    "layer_matched": pl.Boolean,
    "loss_nats": pl.Float64,
    "greedy_exact": pl.Boolean,
}
"""One answer per row. `set`: `none` (intact), `top`, `single` (one of several heads, each alone) or `random`; `draw`
and `matched_to` (the heads it is held against) are of random sets only, null elsewhere, as is `layer_matched`, which is
false where a layer had too few other heads. `loss_nats` is the mean over the answer's tokens."""


def ablate_heads(
    run: str | Path | Run,
    *,
    heads: Sequence[Head] | None = None,
    k: Sequence[int] | None = None,
    n_draws: int = 10,
    kind: str = "zero",
    each: bool = False,
    length: int | None = None,
    n_cases: int = 20,
    metric: str = "retrieval",
    checkpoints: str | Sequence[str] = "last",
    folders: Sequence[str | Path] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    access: Access | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Ask a run's checkpoints its own cases again, without their best heads and without random ones.

    Args:
        run: a run folder; its checkpoints are loaded from where run.json says they are.
        heads: (layer, head), best first; None takes each checkpoint's own, by their mean score at `length`.
        k: how many of the best heads are silenced together; None means `DEFAULT_K`, as far as there are twice as many
            heads, and the whole list where `heads` are given.
        n_draws: random sets per set of heads, different ones; fewer where there are no more.
        kind: what a silenced head puts out: `zero`; `mean`: its mean over all positions of the cases; `resample`: what
            it puts out at the same position of another case; `blind`: what it makes of the prompt without the needle,
            which it alone does not see.
        each: silence heads one at a time instead: the given ones, or the largest k's best of the last checkpoint asked.
        length: of the cases in tokens; None means the run's longest.
        n_cases: at most so many of the run's cases, spread evenly over depths.
        metric: whose scores say which heads are best.
        checkpoints: `all`, `last`, or names in the run.
        folders: where the checkpoints are now, if not where run.json says.
        seed: of the random sets.
        device, dtype: as in `load_model`.
        access: how checkpoints of a hub, with pickles or code of their own are come by; see `Access`.
        progress: told (tokens done, tokens in all, message).

    Returns:
        The study's rows for the checkpoints asked for, columns as in `ABLATIONS_SCHEMA`.

    Raises:
        LccpError: heads, a length, a metric or checkpoints that the run does not have, a k without as many other heads,
            or what loading raises. Finished checkpoints stay.

    Example:
        >>> ablate_heads("runs/demo", k=[3], length=1024)   # doctest: +SKIP
    """
    from lccp_interp.capture.model import read_architecture, resolve
    from lccp_interp.capture.prefill import release_memory
    from lccp_interp.capture.selfcheck import self_check

    opened = run if isinstance(run, Run) else Run.open(run)
    if kind not in KINDS:
        raise LccpError(f"unknown kind of ablation {kind!r}; known: {', '.join(KINDS)}")
    if n_draws < 1 or n_cases < 1:
        raise LccpError(f"draws and cases must be at least 1, got {n_draws} and {n_cases}")
    cases = chosen_cases(opened, length, n_cases)
    chosen = find_run_checkpoints(opened, _names(opened, checkpoints), folders, access)
    trusted = access is not None and access.trust_remote_code
    known = {
        checkpoint.name: known_heads(read_architecture(checkpoint.path, trust_remote_code=trusted))
        for checkpoint in chosen
    }
    sizes = set_sizes(k, heads, known[chosen[-1].name], each=each)
    if heads is None:
        ranked = ranked_heads(opened, metric, cases[0].length, list(known), at_least=max(sizes))
    else:
        ranked = {checkpoint.name: list(heads) for checkpoint in chosen}
    if each:
        # The same heads everywhere, so that each can be followed over checkpoints.
        ranked = dict.fromkeys(ranked, ranked[chosen[-1].name][: max(sizes)])
    device, dtype = resolve(device, dtype, chosen[0].path)
    config = {
        "kind": kind,
        "length": cases[0].length,
        "cases": [case.case_id for case in cases],
        "heads": None if heads is None else head_text(heads, " "),
        "metric": metric if heads is None else None,
        "k": sizes,
        "each": head_text(ranked[chosen[-1].name], " ") if each else None,
        "n_draws": n_draws,
        "seed": seed,
        "dtype": dtype,
    }
    study = f"{kind}-{cases[0].length}-{config_hash(config)[:8]}"
    work = []
    for checkpoint in chosen:
        where = f"checkpoint {checkpoint.name}"
        check_heads(ranked[checkpoint.name][: max(sizes)], known[checkpoint.name], where)
        sets = head_sets(ranked[checkpoint.name], known[checkpoint.name], sizes, each=each, n_draws=n_draws, seed=seed)
        work.append(_Unit(opened, study, kind, checkpoint, sets))
    _warn_of_unmatched(work)
    _record(opened, study, config)
    report = progress or (lambda done, total, message: None)
    n_tokens = sum(case.length for case in cases)
    total = sum(unit.n_different * n_tokens for unit in work)
    done = sum(unit.n_different * n_tokens for unit in work if unit.is_done)
    report(done, total, "resuming" if done else "starting")
    cache_fault: str | None = None
    for unit in work:
        if unit.is_done:
            continue
        model = load_located(unit.checkpoint, device=device, dtype=dtype, access=access)
        if cache_fault is None:
            checked = self_check(model)
            checked.require()
            cache_fault = "" if checked.shares_prefixes else checked.sharing

        def advance(n_read: int, name: str = unit.checkpoint.name) -> None:
            nonlocal done
            done += n_read
            report(done, total, name)

        unit.run(replace(model, cache_fault=cache_fault), cases, advance)
        # Two checkpoints of a large model may not fit side by side.
        del model
        release_memory()
    report(total, total, "done")
    names = [checkpoint.name for checkpoint in chosen]
    return ablation_rows(Run.open(opened.path), study).filter(pl.col("checkpoint").is_in(names))


def ablation_studies(run: Run) -> list[str]:
    """Names of the ablation studies of a run that hold results, in the order in which they were begun.

    Example:
        >>> ablation_studies(Run.open("runs/demo"))   # doctest: +SKIP
        ['zero-1024-5c8f8a5e']
    """
    entries = run.manifest.get("ablations", [])
    return [entry["name"] for entry in entries if any(_folder(run).glob(f"{file_stem(entry['name'])}.*.parquet"))]


def ablation_rows(run: Run, study: str | None = None) -> pl.DataFrame:
    """The answers of an ablation study, columns as in `ABLATIONS_SCHEMA`, by tokens.

    Args:
        run: an opened run.
        study: its name; None means the one begun last.

    Raises:
        LccpError: no study, or none of this name.

    Example:
        >>> ablation_rows(Run.open("runs/demo")).columns[:3]   # doctest: +SKIP
        ['study', 'checkpoint', 'tokens_seen']
    """
    known = ablation_studies(run)
    if not known:
        raise LccpError(f"run {run.path} has no ablations; make some with `lccp ablate {run.path}`")
    study = study or known[-1]
    if study not in known:
        raise LccpError(f"run {run.path} has no ablation study {study!r}; it has {', '.join(known)}")
    parts = sorted(_folder(run).glob(f"{file_stem(study)}.*.parquet"))
    check_parts(parts, ABLATIONS_SCHEMA, "delete it and run `lccp ablate` again, it redoes this part")
    return pl.read_parquet(parts).sort("tokens_seen", maintain_order=True)


@dataclass(frozen=True)
class _Unit:
    """One checkpoint's part of a study."""

    in_run: Run
    study: str
    kind: str
    checkpoint: Checkpoint
    sets: Sequence[HeadSet]

    @property
    def part(self) -> Path:
        return _folder(self.in_run) / f"{file_stem(self.study)}.{file_stem(self.checkpoint.name)}.parquet"

    @property
    def is_done(self) -> bool:
        return is_whole(self.part)

    @property
    def different(self) -> list[tuple[Head, ...]]:
        """Every set of heads once; the same one may be drawn for several."""
        return list(dict.fromkeys(tuple(sorted(own.heads)) for own in self.sets))

    @property
    def n_different(self) -> int:
        return len(self.different)

    def run(self, model: HookedModel, cases: Sequence[Case], advance: Callable[[int], None]) -> None:
        from lccp_interp.interventions.answers import outcomes_without

        began = time.monotonic()
        answers = dict(
            zip(
                self.different,
                outcomes_without(model, cases, self.different, kind=self.kind, on_tokens=advance),
                strict=True,
            )
        )
        rows = [
            {
                "study": self.study,
                "checkpoint": self.checkpoint.name,
                "tokens_seen": self.checkpoint.tokens_seen,
                "case_id": case.case_id,
                "kind": self.kind,
                "set": own.role,
                "k": len(own.heads),
                "draw": own.draw,
                "heads": head_text(own.heads, " "),
                "matched_to": None if own.matched_to is None else head_text(own.matched_to, " "),
                "layer_matched": own.layer_matched,
                "loss_nats": loss,
                "greedy_exact": exact,
            }
            for own in self.sets
            for case, (loss, exact) in zip(cases, answers[tuple(sorted(own.heads))], strict=True)
        ]
        record = {"device": str(model.device), "seconds": round(time.monotonic() - began, 1)}
        write_part(pl.DataFrame(rows, schema=ABLATIONS_SCHEMA), self.part, metadata={"execution": json.dumps(record)})


def _folder(run: Run) -> Path:
    return run.path / "ablations"


def _names(run: Run, checkpoints: str | Sequence[str]) -> Sequence[str] | None:
    if checkpoints == "all":
        return None
    if checkpoints == "last":
        return run.checkpoints["name"].to_list()[-1:] or None
    return [checkpoints] if isinstance(checkpoints, str) else checkpoints


def _warn_of_unmatched(work: Sequence[_Unit]) -> None:
    found = {(unit.checkpoint.name, len(own.heads)) for unit in work for own in unit.sets if own.layer_matched is False}
    if found:
        name, size = min(found)
        more = f" (and {len(found) - 1} more such sets)" if len(found) > 1 else ""
        warnings.warn(
            f"checkpoint {name}: the layers of its {size} best heads have too few other heads{more}; random sets take "
            "the rest from all layers",
            stacklevel=3,
        )


def _record(run: Run, study: str, config: dict[str, Any]) -> None:
    """Enter the study in run.json, once; its name holds the hash of its config."""
    with editing(run.path) as manifest:
        studies = manifest.setdefault("ablations", [])
        if study not in [entry["name"] for entry in studies]:
            studies.append({"name": study, "config": config, "config_hash": config_hash(config), **provenance()})
