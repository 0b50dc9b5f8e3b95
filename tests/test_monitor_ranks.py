"""The monitor under data parallelism and sharding: two processes on the CPU, started by the tests themselves.

FSDP's first version refuses to run without an accelerator, so only the second one (`fully_shard`) is tested here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lccp_interp.monitor.observe import HeadObserver
from lccp_interp.monitor.wrapped import Ranks
from lccp_interp.store import Run
from lccp_interp.tasks.niah import NiahGrid

KINDS = ("ddp", "fsdp", "fsdp-lora")
N_STEPS = 4
GRID = NiahGrid(lengths=(64, 96), depths=(0, 100), samples=2)


def build(kind, n_tokens):
    """A tiny Llama, wrapped."""
    from conftest import tiny_model

    model = tiny_model("llama", seed=0, weight_std=0.3, vocab_size=n_tokens, attention_dropout=0.2)
    inner = model
    if kind.endswith("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        settings = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, settings)
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def local(tensor):
    """This rank's part of a parameter or gradient."""
    return None if tensor is None else getattr(tensor, "to_local", lambda: tensor)().detach().clone()


def train(kind, n_tokens, observer=None):
    """Own loop, observed between backward and step; returns this rank's weights."""
    model = build(kind, n_tokens).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(100 + Ranks.here().rank)
    if observer is not None:
        assert bool(observer.begin(model)) == Ranks.here().is_first
    for step in range(1, N_STEPS + 1):
        ids = torch.randint(0, n_tokens, (2, 24))
        model(input_ids=ids, labels=ids).loss.backward()
        if observer is not None:
            before = [local(parameter.grad) for parameter in model.parameters()]
            logs = observer.after_step(model, step=step, tokens_seen=step * 96, last_step=N_STEPS)
            assert bool(logs) == (Ranks.here().is_first and step % 2 == 0)
            after = [local(parameter.grad) for parameter in model.parameters()]
            assert any(gradient is not None for gradient in before)
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))
        optimizer.step()
        optimizer.zero_grad()
    return [local(parameter) for parameter in model.parameters()]


def failing_on(rank):
    """A metric that breaks on one rank only."""

    def metric(rows):
        if Ranks.here().rank == rank:
            raise ValueError("a bad rank")
        return rows.weights.amax((1, 2))

    return metric


def work(folder, rank):
    """One of two processes."""
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    options = {"every_steps": 2, "budget": None, "grid": GRID}
    for kind in KINDS:
        plain = train(kind, len(tokenizer))
        observer = HeadObserver(folder / kind, tokenizer, on_error="raise", **options)
        watched = train(kind, len(tokenizer), observer)
        assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True)), kind
    # An error on one rank is everybody's, and nobody waits for ever.
    told = []
    observer = HeadObserver(folder / "failing", tokenizer, metrics={"bad": failing_on(1)}, tell=told.append, **options)
    model = build("ddp", len(tokenizer))
    observer.begin(model)
    observer.after_step(model, step=2, tokens_seen=2)
    if rank == 0:
        (folder / "told").write_text("\n".join(told))
    # Neither is a mistake of set-up the first rank's alone.
    try:
        HeadObserver(folder / "ddp", tokenizer, grid=NiahGrid(lengths=(64,)), on_error="warn").begin(model)
    except Exception as error:
        (folder / f"refused-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def worked(tmp_path_factory, tokenizer):
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder / "tokenizer")
    here = Path(__file__).resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here.parent}:{here.parents[1]}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(here), str(folder), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_all_cases_are_there_once(worked, kind):
    """That weights and gradients are the same with and without is asserted where they are, in the processes."""
    run = Run.open(worked / kind)
    assert run.checkpoints["name"].to_list() == ["step-000000", "step-000002", "step-000004"]
    counted = run.outcomes.collect().group_by("checkpoint").len()["len"].to_list()
    assert counted == [GRID.n_cases] * 3
    assert run.manifest["executions"][0]["ranks"] == 2


def test_sharded_shared_and_single_see_the_same(worked, tokenizer, tmp_path):
    model = build("single", len(tokenizer))
    HeadObserver(tmp_path / "single", tokenizer, grid=GRID, on_error="raise").begin(model)
    key = ["case_id", "metric", "layer", "head"]
    single = Run.open(tmp_path / "single").scores.collect().sort(key)
    for kind in ("ddp", "fsdp"):
        other = Run.open(worked / kind).scores.filter(checkpoint="step-000000").collect().sort(key)
        assert other.select(key).equals(single.select(key))
        assert (other["value"] - single["value"]).abs().max() < 1e-5


def test_an_error_on_one_rank_is_told_by_the_first(worked):
    told = (worked / "told").read_text().splitlines()
    assert len(told) == 2
    assert "training goes on (LccpError: rank 1 of 2: ValueError: a bad rank)" in told[0]


def test_a_mistake_of_set_up_is_raised_on_every_rank(worked):
    for rank in (0, 1):
        assert "holds another study" in (worked / f"refused-{rank}").read_text()


def test_ranks_of_one_share_nothing():
    ranks = Ranks()
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first("x") == "x"
    assert [Ranks(rank, 3).share(range(7)) for rank in range(3)] == [range(0, 7, 3), range(1, 7, 3), range(2, 7, 3)]


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
