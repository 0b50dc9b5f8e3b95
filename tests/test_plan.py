"""Plans: tokens against a trie, memory against real models, verdicts in words, and the command."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from lccp_interp.capture import architectures
from lccp_interp.capture import footprint as footprint_module
from lccp_interp.capture.architectures import ARCHITECTURES
from lccp_interp.capture.footprint import Footprint, footprint, load_config
from lccp_interp.capture.model import HookedModel
from lccp_interp.capture.prefill import Prefill
from lccp_interp.capture.readout import PROOF_TOKENS
from lccp_interp.plan import (
    GIB,
    Memory,
    _tokens_shared,
    find_configs,
    parse_memory,
    plan_study,
    planning_tokenizer,
)
from lccp_interp.schema import Case, LccpError, Needle, Span
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import select_metrics
from lccp_interp.tasks.interference import InterferenceGrid
from lccp_interp.tasks.longbio import LongBioGrid
from lccp_interp.tasks.niah import NiahGrid, build_cases

HUNYUAN = Path(__file__).resolve().parents[1] / "examples" / "hunyuan-a13b"
N_TOKENS, CHUNK, N_ROWS = 300, 64, 5
NEEDLES = tuple(
    Needle(f"The {place} keeper hid the word {word} away.", f"Which word did the {place} keeper hide?", word)
    for place, word in (("harbour", "lantern"), ("garden", "thistle"))
)
TEXT = "It rained in the town. Mara walked home slowly, and nobody saw her! Who knows why? " * 60


def measured(config, **changes) -> Footprint:
    options = {"dtype": "float32", "n_tokens": N_TOKENS, "chunk_tokens": CHUNK, "n_rows": N_ROWS}
    return footprint(config, **{**options, **changes})


def run_for_real(model, n_tokens=N_TOKENS, chunk=CHUNK, n_rows=N_ROWS) -> Prefill:
    prefill = Prefill(HookedModel(model, None, "tiny"), chunk_tokens=chunk)
    prefill.run([index % 50 for index in range(n_tokens)], n_tokens - n_rows, lambda layer, rows: None)
    return prefill


def bytes_in_cache(cache) -> int:
    """Every tensor that the layers of a real cache hold."""
    held: list[object] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            held += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_parameters_and_cache_are_those_of_the_real_model(architecture):
    model = architectures.tiny_model(architecture)
    one = measured(model.config)
    assert one.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert one.weight_bytes == 4 * one.n_parameters
    prefill = Prefill(HookedModel(model, None, "tiny"), chunk_tokens=CHUNK)
    prefill.run([index % 50 for index in range(N_TOKENS)], N_TOKENS - 1, None)
    assert one.cache_bytes == bytes_in_cache(prefill._cache)


def test_cache_of_latent_attention_by_hand():
    one = measured(tiny_model("deepseek_v3").config, dtype="bfloat16")
    # Each of 3 layers keeps the latent (16) and the shared rotary key (4) of a token, in 2 bytes each.
    assert one.cache_bytes == 3 * (16 + 4) * 2 * N_TOKENS


def test_experts_that_are_not_chosen_are_not_active():
    model = tiny_model("hunyuan_v1_moe")
    routed = sum(
        p.numel() for name, p in model.named_parameters() if "experts.gate_up" in name or "experts.down" in name
    )
    one = measured(model.config)
    assert one.n_active_parameters == one.n_parameters - routed // 2
    dense = measured(tiny_model("llama").config)
    assert dense.n_active_parameters == dense.n_parameters


def peak_of_allocator(run) -> int:
    """The most that torch's CPU allocator held beyond what it held before, by its own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "hunyuan_v1_moe", "qwen3_next"])
def test_working_memory_is_near_what_the_allocator_hands_out(model_type):
    model = tiny_model(model_type)
    shape = {"n_tokens": 1500, "n_rows": 12}
    run_for_real(model, 100, 100, 2)
    peak = peak_of_allocator(lambda: run_for_real(model, chunk=400, **shape))
    one = measured(model.config, chunk_tokens=400, **shape)
    # An upper estimate: a CPU attends behind a cache without the masks that other devices may need.
    assert 0.8 < (one.cache_bytes + one.working_bytes) / peak < 3


def test_more_rows_longer_prompts_and_larger_chunks_take_more():
    config = tiny_model("llama").config
    base = measured(config).working_bytes
    assert measured(config, n_rows=50).working_bytes > base
    assert measured(config, n_tokens=600).working_bytes > base
    assert measured(config, chunk_tokens=200).working_bytes > base
    assert measured(config, batch_tokens=20 * N_TOKENS).working_bytes > 2 * base


def test_prompts_run_whole_are_continued_in_a_straight_line(monkeypatch):
    config = tiny_model("qwen3_next").config
    whole = measured(config, n_tokens=512)
    monkeypatch.setattr(footprint_module, "WHOLE_TOKENS", 256)
    continued = measured(config, n_tokens=512)
    assert whole.chunk_tokens == 512
    assert "linear_attention" in whole.obstacle
    assert continued.cache_bytes == whole.cache_bytes
    assert continued.working_bytes == pytest.approx(whole.working_bytes, rel=0.02)


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "linear"])
def test_scaled_positions_need_no_numbers(rope):
    scaled = tiny_model("llama", rope_scaling={"rope_type": rope, "factor": 4.0}).config
    assert measured(scaled).cache_bytes == measured(tiny_model("llama").config).cache_bytes


def test_layers_are_shared_out_over_devices():
    one = Footprint("llama", "bfloat16", 0, 0, 3, 10, 10, 1, 100, 30, 60, 7, "")
    assert one.total_bytes == 100 + 60 + 7
    # Two of three layers with their caches, what is no layer (10), and a pass.
    assert one.on_devices(2) == 2 * 30 + 2 * 20 + 10 + 7
    assert one.on_devices(3) == 30 + 20 + 10 + 7


def test_footprint_refuses_what_cannot_be_run():
    config = tiny_model("llama").config
    for changes, words in (
        ({"dtype": "float8"}, "unknown dtype 'float8'; known: float32"),
        ({"n_rows": 301}, "301 attention rows cannot be read from a prompt of 300 tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(LccpError, match=words):
            measured(config, **changes)
    with pytest.raises(LccpError, match="BloomForCausalLM does not route attention"):
        measured(AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=50))
    with pytest.raises(LccpError, match=r"a mamba of this config cannot be run without its weights \(AttributeError"):
        measured(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=50))


def test_hunyuan_by_hand():
    one = footprint(HUNYUAN, dtype="bfloat16", n_tokens=65536)
    hidden, width, layers = 4096, 3072, 32
    attention = 2 * hidden * 32 * 128 + 2 * hidden * 8 * 128 + 2 * 128
    experts = 65 * 3 * hidden * width + 64 * hidden
    by_hand = 128167 * hidden + layers * (attention + experts + 2 * hidden) + hidden
    assert one.n_parameters == by_hand == 80_393_183_232
    assert one.n_active_parameters == by_hand - layers * 56 * 3 * hidden * width == 12_747_448_320
    assert one.cache_bytes == 65536 * layers * 2 * 8 * 128 * 2 == 8 * GIB
    # One layer's keys of all query heads in float32 at the least; and far less than the cache of all layers.
    assert 65536 * 32 * 128 * 4 <= one.working_bytes < 8 * GIB


def case(prompt, answer=(9,)):
    total = len(prompt) + len(answer)
    return Case("c", "niah", total, 0.0, "n", "h", 0, 0, tuple(prompt), tuple(answer), Span(0, 1), Span(0, 1))


def test_tokens_by_hand():
    config = tiny_model("llama").config
    # Fed are all but the answer's last: (1,2,5), (1,2,4,6), (1,2,4,7,9) of the first shard, (1,2,5) of the second.
    shards = [[case((1, 2, 5)), case((1, 2, 4, 6)), case((1, 2, 4, 7), (9, 9))], [case((1, 2, 5))]]
    assert _tokens_shared(config, shards, "off") == 3 + 4 + 5 + 3
    assert _tokens_shared(config, shards, "on") == (4 + 2 + 1) + 3
    hybrid = tiny_model("qwen3_next").config
    assert _tokens_shared(hybrid, shards, "on") == 15


@pytest.fixture(scope="module")
def grid() -> NiahGrid:
    return NiahGrid(lengths=(300, 400), depths=(0, 50, 100), samples=2, needles=NEEDLES, haystack=TEXT)


@pytest.mark.parametrize("cases_per_shard", [5, 64])
def test_tokens_are_the_edges_of_a_trie(grid, tokenizer, cases_per_shard):
    cases = build_cases(grid, tokenizer)
    configs = [("tiny", tiny_model("llama").config)]
    plan = plan_study(grid, tokenizer, configs, cases_per_shard=cases_per_shard, sharing="on")
    edges = 0
    for start in range(0, len(cases), cases_per_shard):
        prefixes = set()
        for one in cases[start : start + cases_per_shard]:
            fed = one.prompt_ids + one.answer_ids[:-1]
            prefixes |= {fed[:end] for end in range(1, len(fed) + 1)}
        edges += len(prefixes)
    assert plan.n_cases == len(cases) == 24
    assert plan.tokens_naive == sum(one.length - 1 for one in cases) == 12 * 299 + 12 * 399
    assert plan.models[0].tokens_shared == edges < plan.tokens_naive


@pytest.mark.parametrize(
    ("sharing", "metric"), [("auto", "copy"), ("on", "copy"), ("off", "copy"), ("on", "qrscore"), ("auto", "dla")]
)
def test_the_engine_runs_the_tokens_that_were_planned(grid, tokenizer, sharing, metric):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    options = {"metrics": [metric], "cases_per_shard": 8, "sharing": sharing}
    plan = plan_study(grid, tokenizer, [("tiny", model.config)], **options)
    run = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    cases = build_cases(grid, tokenizer)
    for start in range(0, len(cases), 8):
        hooked = HookedModel(model, tokenizer, "tiny")
        score_cases(hooked, cases[start : start + 8], select_metrics([metric]), sharing=sharing)
    # Reading values begins with a proof on a few tokens, once per shard of 8 cases.
    proofs = 3 * PROOF_TOKENS if metric == "dla" else 0
    assert sum(run) == plan.models[0].tokens_shared + proofs


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            InterferenceGrid(distances=(64, 128), interferences=(0, 64, 128), needles=NEEDLES, haystack=TEXT),
            "interference, 12 cases per checkpoint = 2 distances x 3 interferences x 2 needles x 1 sample",
        ),
        (
            LongBioGrid(lengths=(300,), depths=(0, 100), samples=3),
            "longbio, 6 cases per checkpoint = 1 length x 2 depths x 3 samples",
        ),
    ],
    ids=["interference", "longbio"],
)
def test_every_grid_can_be_planned(grid, words, tokenizer):
    plan = plan_study(grid, tokenizer, [("tiny", tiny_model("llama").config)])
    cases = grid.build(tokenizer)
    assert words in plan.text()
    assert math.prod(plan.axes.values()) == plan.n_cases == len(cases)
    assert plan.lengths[-1] == max(case.length for case in cases)
    assert plan.tokens_naive == sum(case.length - 1 for case in cases)


def test_of_many_lengths_memory_is_shown_for_some_with_the_longest(tokenizer):
    grid = NiahGrid(lengths=tuple(range(300, 500, 10)), depths=(50,), needles=NEEDLES, haystack=TEXT)
    plan = plan_study(grid, tokenizer, [("tiny", tiny_model("llama").config)])
    assert plan.lengths == (300, 340, 380, 410, 450, 490)


def test_metrics_that_read_more_take_more(grid, tokenizer):
    config = tiny_model("llama", vocab_size=len(tokenizer)).config
    ones = {
        name: plan_study(grid, tokenizer, [("tiny", config)], metrics=[name]).models[0].footprints[-1]
        for name in ("copy", "qrscore", "dla")
    }
    cases = grid.build(tokenizer)
    n_events = max(len(case.answer_ids) for case in cases)
    assert ones["copy"].n_rows == n_events
    assert ones["qrscore"].n_rows == max(case.length - 1 - case.question.start for case in cases) > n_events
    # 4 heads, 2 key heads of 8 numbers, each of 4 bytes, on 400 keys.
    assert ones["dla"].working_bytes - ones["copy"].working_bytes == 4 * 400 * (4 * n_events + 2 * 8)


def planned(grid, tokenizer, memory, **options):
    config = tiny_model("llama", vocab_size=len(tokenizer)).config
    return plan_study(grid, tokenizer, [("tiny", config)], cases_per_shard=64, memory=memory, **options)


def test_verdicts(grid, tokenizer):
    unknown = planned(grid, tokenizer, None).models[0]
    assert unknown.fits is None
    assert unknown.verdict.startswith("give the GiB of your devices to see whether it fits: --memory 80")
    need = unknown.footprints[-1]
    assert need.n_tokens == 400

    def verdict(n_devices, n_bytes, **options):
        model = planned(grid, tokenizer, Memory(n_devices, int(n_bytes / 0.95) + 1), **options).models[0]
        return model.fits, model.verdict

    fits, words = verdict(1, need.total_bytes)
    assert fits
    assert words.startswith("fits on one device of ")
    assert words.endswith(" MiB are needed")
    # With 5 % to spare exactly; a byte less is too little, and shorter prompts and smaller numbers are proposed.
    fits, words = verdict(1, need.total_bytes - 2)
    assert not fits
    assert words.startswith("does not fit on one device of ")
    assert "--dtype bfloat16; or " in words
    assert "2 devices of" in words
    assert words.endswith("; or lengths up to 300")
    fits, words = verdict(2, need.on_devices(2))
    assert fits
    assert "with --device-map auto: " in words
    assert words.endswith("on the fullest")
    fits, words = verdict(1, 1000, dtype="bfloat16")
    assert not fits
    assert "try a smaller model; --device-map auto leaves what does not fit in host memory" in words


def test_smaller_chunks_are_proposed_where_they_are_enough(tokenizer):
    grid = NiahGrid(lengths=(3000,), depths=(50,))
    # Wide enough that what a chunk's tokens pass through outweighs its masks.
    config = tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=2048).config
    options = {"dtype": "float32", "n_tokens": 3000, "n_rows": 8}
    whole = footprint(config, chunk_tokens=3000, **options).total_bytes
    small = footprint(config, chunk_tokens=1024, **options).total_bytes
    memory = Memory(1, int((whole + small) / 2 / 0.95))
    model = plan_study(grid, tokenizer, [("tiny", config)], cases_per_shard=64, memory=memory, n_rows=8).models[0]
    assert not model.fits
    assert model.verdict.endswith("try --dtype bfloat16; or --chunk-tokens 1024")
    followed = {**options, "chunk_tokens": 1024}
    assert memory.holds(footprint(config, **followed).total_bytes)


def test_checkpoints_of_one_size_are_planned_together(grid, tokenizer):
    one, other = tiny_model("llama").config, tiny_model("llama", max_position_embeddings=64).config
    other.rope_parameters = {**other.rope_parameters, "rope_theta": 5e6}
    wide = tiny_model("llama", intermediate_size=64).config
    plan = plan_study(grid, tokenizer, [("a", one), ("b", wide), ("c", other)], cases_per_shard=64)
    assert [model.checkpoints for model in plan.models] == [("a", "c"), ("b",)]
    assert "x 2 checkpoints" in plan.text()


def test_notes_say_what_a_number_does_not(tokenizer):
    grid = NiahGrid(lengths=(300,), depths=(0, 100))
    config = tiny_model("qwen3_next", max_position_embeddings=256).config
    config.quantization_config = {"quant_method": "fp8"}
    plan = plan_study(grid, tokenizer, [("tiny", config)], cases_per_shard=64)
    assert plan.notes[0].startswith("prompts share little: in the bundled language")
    positions, whole, quantized = plan.models[0].notes
    assert positions == ("the model is made for 256 positions (max_position_embeddings); 300 tokens are extrapolation")
    assert whole.endswith("prompts are run whole, and share nothing")
    assert quantized.endswith("weights are planned as float32")


def test_memory_as_people_write_it():
    assert parse_memory("80") == parse_memory("80 GiB") == Memory(1, 80 * GIB)
    assert parse_memory("2x80") == parse_memory("2 × 80") == Memory(2, 80 * GIB)
    assert str(parse_memory("2x0.5")) == "2 devices of 0.5 GiB"
    for text in ("", "much", "0", "0x80", "2x", "-80"):
        with pytest.raises(LccpError, match=r"write the GiB of a device, like 80, or devices x GiB, like 2x80"):
            parse_memory(text)


def test_configs_are_found_without_weights(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    assert [name for name, _ in find_configs([tmp_path])] == ["a", "b"]
    assert find_configs([tmp_path / "a"]) == [("a", tmp_path / "a")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(LccpError, match=r"empty has no config\.json, nor has a folder in it"):
        find_configs([tmp_path / "empty"])
    with pytest.raises(LccpError, match=r"no folder at .*nowhere; give a checkpoint"):
        find_configs([tmp_path / "nowhere"])
    (tmp_path / "a" / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(LccpError, match=r"cannot be loaded: .*no_such_thing"):
        load_config(tmp_path / "a")


def test_a_tokenizer_stands_in_only_where_there_is_none(checkpoint, tmp_path):
    own, notes = planning_tokenizer([tmp_path, checkpoint])
    assert notes == ()
    other, notes = planning_tokenizer([tmp_path])
    assert notes[0].startswith("no tokenizer there: the bundled language's stands in")
    text = "Mara hid the lantern. ☂"
    assert own(text).input_ids == other(text).input_ids


def test_64k_of_hunyuan_on_the_command_line(lccp):
    code, out, _ = lccp(
        "plan", HUNYUAN, "--lengths", "16384,65536", "--depths", "50", "--samples", "1",
        "--memory", "2x80",
    )  # fmt: skip
    assert code == 0
    assert "hunyuan_v1_moe, 80.4B parameters (12.7B active per token), 32 layers" in out
    assert "2 cases per checkpoint = 2 lengths x 1 depth x 1 needle x 1 sample" in out
    assert f"{16383 + 65535:,} naive" in out
    assert "in bfloat16, 4,096 tokens a pass" in out
    longest = next(line for line in out.splitlines() if line.strip().startswith("65,536 "))
    assert longest.split()[1:3] == ["149.74", "8.00"]
    assert longest.endswith("no")
    assert max(map(len, out.splitlines())) <= 113
    out = " ".join(out.split())
    assert "does not fit on 2 devices of 80 GiB" in out
    assert "try 3 devices of 80 GiB with --device-map auto" in out
    assert "the model is made for 32,768 positions" in out
    assert "no tokenizer there: the bundled language's stands in" in out


def test_formats_of_the_command(lccp, trajectory):
    arguments = ("plan", trajectory, "--lengths", "128,192", "--samples", "1", "--memory", "1")
    code, out, _ = lccp(*arguments, "--format", "json")
    assert code == 0
    record = json.loads(out)
    assert record["n_cases"] == 10
    assert record["tokens_naive"] == 5 * 127 + 5 * 191
    model = record["models"][0]
    assert model["checkpoints"] == ["lccp-1", "lccp-2", "pretrain-0"]
    assert model["fits"] is True
    for one in model["footprints"]:
        assert one["total_bytes"] == one["weight_bytes"] + one["cache_bytes"] + one["working_bytes"]
    code, out, _ = lccp(*arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["length"] for row in rows] == ["128", "192"]
    assert {row["fits"] for row in rows} == {"yes"}
    assert float(rows[0]["weights_gib"]) * GIB == pytest.approx(model["footprints"][0]["weight_bytes"])


def test_mistakes_are_one_line(lccp, tmp_path, checkpoint):
    for arguments, words in (
        ((tmp_path,), "has no config.json, nor has a folder in it"),
        ((checkpoint, "--memory", "big"), "--memory 'big': write the GiB of a device"),
        ((checkpoint, "--dtype", "int4", "--lengths", "128"), "unknown dtype 'int4'"),
        ((checkpoint, "--sharing", "maybe"), "unknown sharing 'maybe'"),
        ((checkpoint, "--metrics", "retreival"), "unknown metric 'retreival'"),
        ((checkpoint, "--task", "interference", "--depths", "50"), "--depths belongs to --task niah or longbio"),
        ((checkpoint, "--chunk-tokens", "0"), "chunk_tokens must be at least 1"),
    ):
        code, out, err = lccp("plan", *arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
