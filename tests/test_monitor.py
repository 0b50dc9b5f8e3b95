"""The monitor in training: it sees what a sweep sees, changes nothing that training sees, and kills nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import synthetic
import torch
from conftest import tiny_model
from polars.testing import assert_frame_equal
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import lccp_interp
from lccp_interp.dynamics import census, events, lives, outcome_table, saturation_table, score_table
from lccp_interp.monitor import book, observe, quiet
from lccp_interp.monitor.callback import RetrievalHeadMonitor
from lccp_interp.monitor.observe import DEFAULT_GRID, HeadObserver
from lccp_interp.monitor.summary import heads_to_follow, summarise
from lccp_interp.monitor.wrapped import unwrap
from lccp_interp.schema import LccpError
from lccp_interp.store import Run
from lccp_interp.sweep import score_grid
from lccp_interp.tasks.interference import InterferenceGrid
from lccp_interp.tasks.niah import NiahGrid

# peft asks transformers for a property by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GRID = NiahGrid(lengths=(96, 160), depths=(0, 100), samples=4)
N_STEPS = 8
TOKENS_PER_STEP = 2 * 2 * 24


def build(tokenizer, *, seed=0, **changes):
    """A tiny Llama in whose training the random generator has a say."""
    changes = {"attention_dropout": 0.2, "max_position_embeddings": 256, **changes}
    return tiny_model("llama", seed=seed, weight_std=0.3, vocab_size=len(tokenizer), **changes)


class Listener(TrainerCallback):
    """Hears what TensorBoard would hear."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append((state.global_step, dict(logs)))


def fit(model, tokenizer, folder, *callbacks, resume=None, **changes):
    """Train with gradient accumulation; returns the trainer."""
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randint(0, len(tokenizer), (24,), generator=generator) for _ in range(40)]
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": N_STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "include_num_input_tokens_seen": "all",
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **(arguments | changes)),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in draws],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def monitor_in(folder, **options):
    return RetrievalHeadMonitor(
        folder, **({"every_steps": 2, "budget": None, "grid": GRID, "on_error": "raise"} | options)
    )


def same_weights(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """One training without and one with the monitor, and all that was heard."""
    folder = tmp_path_factory.mktemp("trained")
    plain, watched, listener = build(tokenizer), build(tokenizer), Listener()
    fit(plain, tokenizer, folder / "plain")
    trainer = fit(watched, tokenizer, folder / "watched", listener, monitor_in(folder / "run"))
    return SimpleNamespace(
        plain=plain, watched=watched, listener=listener, trainer=trainer, run=Run.open(folder / "run"), folder=folder
    )


class TestTraining:
    def test_weights_are_the_same_bit_for_bit(self, trained, tokenizer, tmp_path):
        assert same_weights(trained.plain, trained.watched)
        # The comparison can fail: one draw more from the generator gives other weights.
        other = build(tokenizer)
        fit(other, tokenizer, tmp_path, type("Draws", (TrainerCallback,), {"on_step_end": draw})())
        assert not same_weights(trained.plain, other)

    def test_observations_are_checkpoints_of_an_ordinary_run(self, trained):
        listed = trained.run.checkpoints
        assert listed["name"].to_list() == [f"step-{step:06d}" for step in (0, 2, 4, 6, 8)]
        assert listed["tokens_seen"].to_list() == [step * TOKENS_PER_STEP for step in (0, 2, 4, 6, 8)]
        assert score_table(trained.run).height == 5 * 3 * 4
        assert trained.run.config["observed"] == "in training"

    def test_it_sees_what_a_sweep_of_the_saved_checkpoint_sees(self, trained, tmp_path):
        saved = trained.folder / "watched" / "checkpoint-8"
        assert str(saved) in trained.run.checkpoints["path"].to_list()
        swept = score_grid([saved], tmp_path / "swept", GRID)
        key = ["case_id", "metric", "layer", "head"]
        ours = trained.run.scores.filter(checkpoint="step-000008").collect().sort(key)
        theirs = swept.scores.collect().sort(key)
        assert_frame_equal(ours.select(*key, "value"), theirs.select(*key, "value"), abs_tol=1e-5)
        end = pl.col("tokens_seen") == 8 * TOKENS_PER_STEP
        ours, theirs = (run.outcomes.filter(end).collect().sort("case_id") for run in (trained.run, swept))
        assert_frame_equal(ours.select("answer_loss_nats"), theirs.select("answer_loss_nats"), abs_tol=1e-4)

    def test_numbers_reach_every_callback_and_the_history(self, trained):
        heard = [(step, logs) for step, logs in trained.listener.heard if "lccp/heads_96" in logs]
        assert [step for step, _ in heard] == [0, 2, 4, 6, 8]
        kept = [entry for entry in trained.trainer.state.log_history if "lccp/heads_96" in entry]
        assert [{**logs, "step": step} for step, logs in heard] == kept
        # The Trainer's own logs still come at their steps.
        assert [step for step, logs in trained.listener.heard if "loss" in logs] == [4, 8]
        _, last = heard[-1]
        outcomes = outcome_table(trained.run).filter(tokens_seen=8 * TOKENS_PER_STEP)
        for length in GRID.lengths:
            at = outcomes.filter(length=length).row(0, named=True)
            table = score_table(trained.run, length=length)
            counted = census(table).row(-1, named=True)
            assert last[f"lccp/heads_{length}"] == counted["n_retrieval_heads"]
            # A random model has no retrieval heads, and what is undefined is not logged.
            assert np.isnan(counted["mean_initial_score"]) == (f"lccp/initial_score_{length}" not in last)
            assert last[f"lccp/ppl_{length}"] == pytest.approx(at["answer_ppl"])
            assert last[f"lccp/loss_nats_{length}"] == pytest.approx(at["loss_nats"])
            living = lives(table).filter(~pl.col("provisional"))
            assert last[f"lccp/births_{length}"] == living["born_checkpoint"].count()
            verdict = saturation_table(trained.run, metrics=["loss_nats"]).filter(length=length)["verdict"][0]
            code = {"saturated": 1, "still improving": 0, "cannot tell": -1}[verdict]
            assert last[f"lccp/saturated_{length}"] == code
        assert {"lccp/seconds", "lccp/peak_raised_mb", "epoch"} < set(last)
        assert last["lccp/interval_steps"] == 2
        assert 0 < last["lccp/cost_share"] < 1
        assert last["lccp/failures"] == 0

    def test_the_journal_holds_the_numbers_and_the_reasons(self, trained):
        lines = [json.loads(line) for line in (trained.run.path / book.JOURNAL).read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
        assert "at least 5 are needed" in lines[0]["lengths"][0]["reason"]
        assert lines[-1]["seconds"] > 0

    def test_a_resumed_training_goes_on_in_the_same_run(self, trained, tokenizer, tmp_path):
        resumed = build(tokenizer, seed=5)
        told = []
        fit(resumed, tokenizer, tmp_path / "again", monitor_in(tmp_path / "run"), max_steps=4, num_train_epochs=1)
        before = Run.open(tmp_path / "run").checkpoints["name"].to_list()
        monitor = monitor_in(tmp_path / "run", tell=told.append)
        listener = Listener()
        fit(resumed, tokenizer, tmp_path / "again", listener, monitor, resume=True)
        assert before == [f"step-{step:06d}" for step in (0, 2, 4)]
        assert Run.open(tmp_path / "run").checkpoints["name"].to_list() == [*before, "step-000006", "step-000008"]
        assert [step for step, logs in listener.heard if "lccp/heads_96" in logs] == [6, 8]
        assert not told

    @OLD_NAME
    def test_with_lora_and_gradient_checkpointing_weights_are_the_same(self, tokenizer, tmp_path):
        from peft import LoraConfig, get_peft_model

        def adapted():
            model = build(tokenizer)
            settings = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return get_peft_model(model, settings)

        one, other = adapted(), adapted()
        fit(one, tokenizer, tmp_path / "plain", activation_checkpointing=True, max_steps=4)
        fit(other, tokenizer, tmp_path / "w", monitor_in(tmp_path / "r"), activation_checkpointing=True, max_steps=4)
        assert same_weights(one, other)
        # The adapter is part of what is seen: the model without it answers otherwise.
        run = Run.open(tmp_path / "r")
        bare = HeadObserver(tmp_path / "bare", tokenizer, grid=GRID, on_error="raise", budget=None)
        bare.begin(build(tokenizer))
        first = run.outcomes.filter(checkpoint="step-000000").collect().sort("case_id")["answer_ppl"]
        without = Run.open(tmp_path / "bare").outcomes.collect().sort("case_id")["answer_ppl"]
        assert (first - without).abs().min() > 1e-3

    def test_with_autocast_weights_are_the_same(self, tokenizer, tmp_path):
        one, other = build(tokenizer), build(tokenizer)
        fit(one, tokenizer, tmp_path / "plain", bf16=True, max_steps=4)
        fit(other, tokenizer, tmp_path / "watched", monitor_in(tmp_path / "run"), bf16=True, max_steps=4)
        assert same_weights(one, other)
        assert Run.open(tmp_path / "run").checkpoints.height == 3


def draw(self, args, state, control, **kwargs):
    """What an observation must not do."""
    torch.rand(1)


class TestModelIsLeftAsItWas:
    def test_modes_generators_gradients_attention_and_hooks(self, tokenizer, tmp_path):
        def careless(rows):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
            return rows.weights.amax((1, 2))

        model = build(tokenizer)
        model.train()
        model.model.layers[1].eval()
        model.activation_checkpointing_enable()
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        modes = [module.training for module in model.modules()]
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        observer = HeadObserver(
            tmp_path / "run", tokenizer, grid=GRID, metrics={"careless": careless}, on_error="raise"
        )
        assert observer.begin(model)
        assert [module.training for module in model.modules()] == modes
        assert len(set(modes)) == 2
        assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
        assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
        assert model.config._attn_implementation == "sdpa"
        assert model.is_activation_checkpointing

    def test_an_exception_inside_puts_everything_back_too(self, tokenizer):
        model = build(tokenizer).train()
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="broken"), quiet.undisturbed(model, model):  # noqa: PT012
            torch.rand(3)
            assert not model.training
            raise ValueError("broken")
        assert model.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_rotary_embeddings_that_remember_forget_what_they_saw(self, tokenizer, tmp_path):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        model = build(tokenizer, rope_parameters=rope, max_position_embeddings=64)
        rotary = model.model.rotary_emb
        before, seen = rotary.inv_freq.clone(), rotary.max_seq_len_cached
        ids = torch.arange(200)[None] % 50
        with quiet.undisturbed(model, model), torch.no_grad():
            model(input_ids=ids)
            assert not torch.equal(rotary.inv_freq, before)
        assert torch.equal(rotary.inv_freq, before)
        assert rotary.max_seq_len_cached == seen

    def test_an_attention_without_rows_is_swapped_and_put_back(self, tokenizer):
        model = build(tokenizer)
        model.config._attn_implementation_internal = "flex_attention"
        with quiet.undisturbed(model, model):
            assert model.config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "flex_attention"

    def test_autocast_keeps_no_weights_that_were_cast_without_gradients(self, tokenizer, tmp_path):
        model = build(tokenizer).train()
        observer = HeadObserver(tmp_path / "run", tokenizer, grid=GRID, on_error="raise")
        ids = torch.arange(8)[None]
        with torch.autocast("cpu", torch.bfloat16):
            observer.begin(model)
            model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestFailure:
    def test_it_is_told_and_training_goes_on(self, trained, tokenizer, tmp_path, monkeypatch):
        def broken(*args, **kwargs):
            torch.rand(7)
            raise RuntimeError("the device fell off\nand more")

        monkeypatch.setattr(observe, "score_cases", broken)
        told, listener, model = [], Listener(), build(tokenizer)
        fit(model, tokenizer, tmp_path / "t", listener, monitor_in(tmp_path / "r", on_error="warn", tell=told.append))
        assert same_weights(model, trained.plain)
        assert told[0] == (
            "monitor: step-000000 could not be observed, training goes on (RuntimeError: the device fell off)"
        )
        assert told[-1].endswith("; that was 3 times in a row, so nothing more is tried")
        assert len(told) == 3
        assert [logs["lccp/failures"] for _, logs in listener.heard if "lccp/failures" in logs] == [1, 2, 3]
        noted = [json.loads(line) for line in (tmp_path / "r" / book.JOURNAL).read_text().splitlines()]
        assert noted[0] == {"step": 0, "tokens_seen": 0, "failed": "RuntimeError: the device fell off"}

    def test_it_is_raised_if_asked_for(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(observe, "score_cases", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(build(tokenizer), tokenizer, tmp_path / "t", monitor_in(tmp_path / "r"))

    def test_one_success_starts_the_count_anew(self, tokenizer, tmp_path, monkeypatch):
        calls = []

        def now_and_then(*args, **kwargs):
            calls.append(1)
            if len(calls) % 3:
                raise RuntimeError("no")
            return score_cases(*args, **kwargs)

        score_cases = observe.score_cases
        monkeypatch.setattr(observe, "score_cases", now_and_then)
        told = []
        monitor = monitor_in(tmp_path / "r", on_error="warn", tell=told.append, every_steps=1)
        fit(build(tokenizer), tokenizer, tmp_path / "t", monitor)
        assert len(told) == 6
        assert len(calls) == N_STEPS + 1
        assert Run.open(tmp_path / "r").checkpoints["name"].to_list() == [f"step-{step:06d}" for step in (2, 5, 8)]

    def test_mistakes_of_set_up_are_raised_before_anything_is_trained(self, tokenizer, tmp_path):
        monitor = monitor_in(tmp_path / "r", on_error="warn")
        with pytest.raises(LccpError, match="cannot tell how many tokens"):
            fit(build(tokenizer), tokenizer, tmp_path / "t", monitor, include_num_input_tokens_seen="no")
        with pytest.raises(LccpError, match=r"made for 100 positions .* ask for 160 tokens"):
            fit(build(tokenizer, max_position_embeddings=100), tokenizer, tmp_path / "t", monitor)
        apart = InterferenceGrid(distances=(64,), interferences=(0,))
        with pytest.raises(LccpError, match="asks cases of niah or longbio, got task 'interference'"):
            fit(build(tokenizer), tokenizer, tmp_path / "t", monitor_in(tmp_path / "r", grid=apart))
        HeadObserver(tmp_path / "r", tokenizer, grid=GRID).begin(build(tokenizer))
        with pytest.raises(LccpError, match="holds another study: depths differ"):
            HeadObserver(tmp_path / "r", tokenizer, grid=replace(GRID, depths=(0, 50))).begin(build(tokenizer))
        with pytest.raises(LccpError, match="has no tokenizer"):
            HeadObserver(tmp_path / "s", grid=GRID).begin(build(tokenizer))
        with pytest.raises(LccpError, match="Linear holds no transformers model"):
            HeadObserver(tmp_path / "s", tokenizer, grid=GRID).begin(torch.nn.Linear(2, 2))
        with pytest.raises(LccpError, match=r"has not begun"):
            HeadObserver(tmp_path / "s", tokenizer, grid=GRID).observe(build(tokenizer), step=1, tokens_seen=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"on_error": "ignore"}, "unknown on_error 'ignore'; known: warn, raise"),
            ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
            ({"every_steps": 0}, "at least 1; got every_steps=0"),
            ({"every_steps": 5, "every_tokens": 5}, "one of the two"),
            ({"budget": 2.0}, "budget is the share of the time"),
            ({"metrics": ["retreival"]}, "retreival"),
            ({"initial_heads": "no/such/run"}, "no run at no/such/run"),
            ({"tokens_before": -1}, "tokens_before=-1"),
        ],
    )
    def test_numbers_out_of_range(self, options, message):
        with pytest.raises(LccpError, match=message):
            RetrievalHeadMonitor("nowhere", **options)


class TestObserver:
    def test_tables_at_hand_are_those_of_the_run(self, trained, tokenizer, tmp_path):
        """Rows made of one observation's results equal those read from all parts."""
        observer = HeadObserver(tmp_path / "r", tokenizer, grid=GRID, every_steps=1, budget=None, on_error="raise")
        observer.begin(build(tokenizer))
        observer.after_step(build(tokenizer, seed=3), step=1, tokens_seen=10)
        run = Run.open(tmp_path / "r")
        for length, table in observer._book._tables.items():
            assert_frame_equal(table, score_table(run, length=length), check_dtypes=False)
        # NaN is no equal of itself; None is.
        assert summarise(run, "step-000001").record() == observer.last.record()

    def test_heads_to_follow_may_be_given_or_come_from_a_run(self, tokenizer, tmp_path):
        model = build(tokenizer)
        given = HeadObserver(tmp_path / "a", tokenizer, grid=GRID, initial_heads=[(0, 1), (2, 3)], on_error="raise")
        logs = given.begin(model)
        table = score_table(Run.open(tmp_path / "a"), length=160)
        mine = table.filter(pl.concat_list("layer", "head").is_in([[0, 1], [2, 3]]))
        assert mine.height == 2
        assert logs["lccp/initial_score_160"] == pytest.approx(mine["score"].mean())
        assert given.last.lengths[-1].n_initial == 2
        planted = synthetic.write_run(tmp_path / "planted", lengths=(256,), n_needles=2)
        assert heads_to_follow(planted) == [(0, 3), (1, 2), (2, 1), (2, 5), (3, 4)]
        theirs = HeadObserver(tmp_path / "b", tokenizer, grid=GRID, initial_heads=planted.path, on_error="raise")
        theirs.begin(model)
        assert theirs.last.lengths[-1].n_initial == 5

    def test_a_step_that_comes_again_with_other_weights_is_told(self, tokenizer, tmp_path):
        told = []

        def observer():
            return HeadObserver(
                tmp_path / "r", tokenizer, grid=GRID, every_steps=2, budget=None, on_error="raise", tell=told.append
            )

        first = observer()
        first.begin(build(tokenizer))
        first.after_step(build(tokenizer), step=2, tokens_seen=20)
        again = observer()
        assert again.begin(build(tokenizer)) == {}
        assert again.after_step(build(tokenizer), step=2, tokens_seen=20)["lccp/difference_nats"] < 1e-5
        assert not told
        logs = observer()
        logs.begin(build(tokenizer))
        assert logs.after_step(build(tokenizer, seed=9), step=2, tokens_seen=20)["lccp/difference_nats"] > 1e-2
        assert "step-000002 was observed before, with other weights" in told[0]
        assert Run.open(tmp_path / "r").checkpoints.height == 2

    def test_every_tokens(self, tokenizer, tmp_path):
        observer = HeadObserver(
            tmp_path / "r", tokenizer, grid=NiahGrid(lengths=(96,)), every_tokens=100, budget=None, on_error="raise"
        )
        model = build(tokenizer)
        seen = [bool(observer.after_step(model, step=step, tokens_seen=step * 40)) for step in range(1, 7)]
        assert seen == [True, False, True, False, True, False]  # at 40 (the first), 120 and 200 tokens

    def test_chunks_bound_a_pass_and_change_nothing(self, tokenizer, tmp_path):
        model, widest = build(tokenizer), []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: widest.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        whole = HeadObserver(tmp_path / "a", tokenizer, grid=GRID, check=False, on_error="raise").begin(model)
        n_whole = max(widest)
        widest.clear()
        small = HeadObserver(tmp_path / "b", tokenizer, grid=GRID, check=False, chunk_tokens=50, on_error="raise")
        logs = small.begin(model)
        assert max(widest) <= 50 < n_whole
        for key in ("lccp/loss_nats_96", "lccp/loss_nats_160"):
            assert logs[key] == pytest.approx(whole[key], rel=1e-5)

    @OLD_NAME
    def test_prompt_tuning_is_refused_with_the_reason(self, tokenizer):
        from peft import PromptTuningConfig, TaskType, get_peft_model

        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        with pytest.raises(LccpError, match="PromptTuningConfig puts tokens of its own in front"):
            unwrap(get_peft_model(build(tokenizer), settings))

    def test_the_default_is_eight_cases_per_length(self):
        assert DEFAULT_GRID.n_cases == 8 * len(DEFAULT_GRID.lengths)


class TestSummary:
    """Of a run with planted births and deaths (`synthetic`)."""

    @pytest.fixture(scope="class")
    def planted(self, tmp_path_factory):
        return synthetic.write_run(tmp_path_factory.mktemp("planted") / "run")

    def test_it_is_what_the_tables_say(self, planted):
        found = summarise(planted, "lccp-1.2M")
        assert [at.length for at in found.lengths] == list(synthetic.LENGTHS)
        for at in found.lengths:
            table = score_table(planted, length=at.length)
            counted = census(table).row(-1, named=True)
            assert (at.n_retrieval_heads, at.n_initial) == (counted["n_retrieval_heads"], counted["n_initial"])
            assert at.initial_score == pytest.approx(counted["mean_initial_score"])
            settled = events(table).filter(~pl.col("provisional"))["kind"].to_list()
            assert (at.births, at.deaths) == (settled.count("birth"), settled.count("death"))
            # Planted: 2-1, 3-4, 1-6, 3-0 and again 2-5 are born, 0-3 and 2-5 die.
            assert (at.births, at.deaths) == (5, 2)
            answers = outcome_table(planted).filter(checkpoint="lccp-1.2M", length=at.length).row(0, named=True)
            assert at.answer_ppl == pytest.approx(answers["answer_ppl"])
            assert at.niah_score == pytest.approx(answers["niah_score"])
        assert found.verdict == found.lengths[-1].verdict
        assert found.line().startswith("lccp-1.2M (4,800,000 tokens)  256: ")

    def test_events_after_the_checkpoint_do_not_count(self, planted):
        assert [summarise(planted, name).lengths[0].births for name in ("pretrain-0.5M", "lccp-0.5M")] == [0, 3]

    def test_what_is_undefined_is_left_out_and_null(self, planted):
        followed = summarise(planted, "lccp-1.2M", initial=[(0, 99)])
        assert "lccp/initial_score_256" not in followed.logs()
        assert followed.record()["lengths"][0]["initial_score"] is None
        assert "initial -" in followed.line()
        json.dumps(followed.record(), allow_nan=False)

    def test_a_checkpoint_that_is_not_scored(self, planted):
        with pytest.raises(LccpError, match="'nothing' is not scored at 256 tokens"):
            summarise(planted, "nothing")


class TestCallback:
    def test_attach_does_what_the_list_does(self, tokenizer, tmp_path):
        listener = Listener()
        monitor = monitor_in(tmp_path / "r")
        arguments = TrainingArguments(str(tmp_path / "t"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(build(tokenizer), arguments, processing_class=tokenizer, callbacks=[listener])
        assert monitor.attach(trainer) is monitor
        assert monitor in trainer.callback_handler.callbacks
        monitor._log({"lccp/heads_96": 1.0}, arguments, trainer.state)
        assert listener.heard == [(0, {"lccp/heads_96": 1.0, "epoch": 0})]

    def test_without_a_handler_the_history_has_the_numbers(self, caplog):
        monitor = RetrievalHeadMonitor("r")
        state = SimpleNamespace(epoch=None, log_history=[], global_step=3)
        monitor._log({"lccp/heads_96": 1.0}, None, state)
        monitor._log({"lccp/heads_96": 2.0}, None, state)
        assert state.log_history == [{"lccp/heads_96": 1.0, "step": 3}, {"lccp/heads_96": 2.0, "step": 3}]
        assert len(caplog.records) == 1
        assert "call monitor.attach(trainer)" in caplog.text

    def test_tokens_from_the_loop_or_as_told(self):
        told = RetrievalHeadMonitor("r", tokens_per_step=1000, tokens_before=50)
        arguments = SimpleNamespace(include_num_input_tokens_seen="no", output_dir="out")
        place = told._place(arguments, SimpleNamespace(global_step=4, num_input_tokens_seen=7))
        assert place == {"step": 4, "tokens_seen": 4050, "path": Path("out/checkpoint-4")}
        counted = RetrievalHeadMonitor("r", tokens_before=50)
        arguments.include_num_input_tokens_seen = "non_padding"
        assert counted._place(arguments, SimpleNamespace(global_step=4, num_input_tokens_seen=7))["tokens_seen"] == 57

    def test_public_names(self):
        assert lccp_interp.RetrievalHeadMonitor is RetrievalHeadMonitor
        assert lccp_interp.HeadObserver is HeadObserver
