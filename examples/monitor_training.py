"""Watch retrieval heads while a model trains: the bundled trajectory's long-context stage, followed live.

    python examples/monitor_training.py RUN [STEPS]

Takes the last checkpoint of the bundled pretraining, enters long-context training by its recipe (a RoPE base of 2e5,
fresh optimizers, the same batches), and observes the heads every 10 of STEPS steps (default 80: 327,680 tokens, about
two minutes of one core). The trajectory's own checkpoints of that stretch are then scored on the same cases, from their
folders, and both are shown side by side: they differ by what rounding the weights to float16 did, which training
carries on. `lccp heads RUN`, `lccp report RUN` and all else work on what the monitor wrote.

The loop is one's own on purpose; with the Trainer it is `callbacks=[RetrievalHeadMonitor(RUN, every_steps=10)]`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import process_time

import polars as pl
import torch

from lccp_interp import HeadObserver, NiahGrid, Run, bundled_trajectory, load_model, score_grid
from lccp_interp.dynamics import outcome_table, score_table
from lccp_interp.dynamics.heads import is_retrieval_head
from lccp_interp.organism.recipe import find_recipe
from lccp_interp.organism.train import Muon, build_batch, build_model, losses, lr_factor, pick_rung

GRID = NiahGrid(lengths=(1024, 4096), depths=(0, 33, 67, 100), samples=2)
SEED = 0


def main(out: str, n_steps: int = 80) -> None:
    """Train for `n_steps` steps with the observer attached, then compare with the bundled checkpoints."""
    torch.set_num_threads(1)
    recipe = find_recipe("small")
    stage = recipe.stages[-1]
    *_, base = [checkpoint for checkpoint in bundled_trajectory() if checkpoint.stage == "pretrain"]
    start = load_model(base.path, device="cpu")
    model = build_model(recipe, rope_theta=stage.rope_theta)
    model.load_state_dict(start.model.state_dict())
    model.train()
    named = dict(model.named_parameters())
    matrices = [param for name, param in named.items() if param.ndim == 2 and "embed" not in name]
    others = [param for name, param in named.items() if param.ndim != 2 or "embed" in name]
    optimizers = (
        (Muon(matrices, lr=1, momentum=recipe.muon_momentum, weight_decay=stage.weight_decay), recipe.muon_lr),
        (torch.optim.AdamW(others, betas=recipe.adam_betas, weight_decay=0.0), recipe.adam_lr),
    )
    # No budget: an observation costs what training on some 14 thousand tokens does, and ten steps here are 41 thousand.
    # CPU seconds, so that other work on the machine does not count.
    observer = HeadObserver(
        out, start.tokenizer, every_steps=10, grid=GRID, budget=None, stage=stage.name, clock=process_time
    )
    observer.begin(model, step=0, tokens_seen=base.tokens_seen)
    began = process_time()
    for step in range(n_steps):
        rung = pick_rung(stage, n_steps=stage.n_tokens // stage.tokens_per_step, seed=SEED, step=step, gate_step=None)
        tokens, weights = build_batch(stage, seed=SEED, step=step, context_length=rung.context_length)
        loss, _ = losses(model, tokens, weights)
        loss.backward()
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(stage, tokens=step * stage.tokens_per_step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen = base.tokens_seen + (step + 1) * stage.tokens_per_step
        logs = observer.after_step(model, step=step + 1, tokens_seen=seen, last_step=n_steps)
        if logs and observer.last is not None:
            print(f"{observer.last.line()}; observing took {100 * logs['lccp/cost_share']:.0f} % so far", flush=True)
    print(f"{n_steps} steps in {process_time() - began:.0f} s of one core\n")
    compare(Run.open(out), f"{out}-bundled")


def compare(live: Run, out: str) -> None:
    """Score the bundled checkpoints that the run passed through, and set both side by side."""
    passed = set(live.checkpoints["tokens_seen"].to_list())
    # Not the base: with the stage its RoPE base changes, and with that what it attends to.
    trajectory = [each for each in bundled_trajectory() if each.stage == "lccp" and each.tokens_seen in passed]
    bundled = score_grid(trajectory, out, GRID)
    key = ["tokens_seen", "length"]
    heads = [*key, "layer", "head"]
    tables = []
    for length in GRID.lengths:
        ours, theirs = (score_table(run, length=length) for run in (live, bundled))
        both = ours.with_columns(retrieves=is_retrieval_head(ours)).join(
            theirs.with_columns(retrieves=is_retrieval_head(theirs)), on=heads, suffix="_bundled"
        )
        tables.append(both.select(*heads, "^(score|retrieves).*$"))
    apart = (pl.col("score") - pl.col("score_bundled")).abs()
    by_head = (
        pl.concat(tables)
        .group_by(key)
        .agg(
            heads=pl.col("retrieves").sum(),
            heads_bundled=pl.col("retrieves_bundled").sum(),
            mean_apart=apart.mean(),
            most_apart=apart.max(),
            r=pl.corr("score", "score_bundled"),
        )
    )
    answers = outcome_table(live).join(outcome_table(bundled), on=key, suffix="_bundled")
    answers = answers.select(pl.col("checkpoint_bundled").alias("checkpoint"), *key, "loss_nats", "loss_nats_bundled")
    pl.Config.set_tbl_rows(-1).set_tbl_cols(-1).set_tbl_width_chars(200).set_tbl_hide_dataframe_shape(True)
    print(answers.join(by_head, on=key).sort("length", "tokens_seen").with_columns(pl.col(pl.Float64).round(4)))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(str(Path(sys.argv[1])), *map(int, sys.argv[2:]))
