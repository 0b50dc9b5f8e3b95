"""Generate mode against a slow loop that follows the published algorithm step by step, and against teacher-forcing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import synthetic
import torch
from rouge_score import rouge_scorer

from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.capture.prefill import Prefill
from lccp_interp.checkpoints import bundled_trajectory
from lccp_interp.dynamics import RunTables, head_records, outcome_table, score_table
from lccp_interp.figures import caption, draw_figures
from lccp_interp.report import write_report
from lccp_interp.report.findings import findings
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.scoring import generate
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.generate import decode_greedily, rouge1_recall, score_generated, stop_rule
from lccp_interp.scoring.metrics import select_metrics
from lccp_interp.store import Run, RunWriter, result_frames
from lccp_interp.sweep import DEFAULT_METRICS
from lccp_interp.tasks.niah import NiahGrid, build_cases
from lccp_interp.tasks.prefixes import walk

METRICS = select_metrics(DEFAULT_METRICS)
WU = select_metrics(["wu"])


def slow_trial(model, case, *, max_new_tokens=50):
    """One trial of arXiv 2404.15574, with nothing kept from one step to the next.

    `model` runs eager attention. Returns scores[layer][head], the tokens written, and the recall.
    """
    ids, written = list(case.prompt_ids), []
    scores = None
    while len(written) < max_new_tokens:
        with torch.inference_mode():
            output = model.model(torch.tensor([ids]), output_attentions=True, use_cache=False)
        token = int(output.logits[0, -1].argmax())
        scores = scores or [[0.0] * layer.shape[1] for layer in output.attentions]
        for layer, attention in enumerate(output.attentions):
            for head in range(attention.shape[1]):
                row = attention[0, head, -1].tolist()
                attended = max(range(len(row)), key=row.__getitem__)
                if case.source.start <= attended < case.source.end and case.prompt_ids[attended] == token:
                    scores[layer][head] += 1 / len(case.source)
        written.append(token)
        ids.append(token)
        if "\n" in model.tokenizer.decode([token]):
            break
    needle = model.tokenizer.decode(case.prompt_ids[case.source.start : case.source.end])
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    recall = scorer.score(needle, model.tokenizer.decode(written).strip())["rouge1"].recall
    return scores, tuple(written), recall


def eager_twin(folder):
    model = load_model(folder)
    model.model.set_attn_implementation("eager")
    return model


def few_token_cases(n=5, *, tokens, length=40, seed=0):
    """Prompts of few different tokens, most of them source: even an untrained head hits one now and then."""
    generator = np.random.default_rng(seed)
    cases = []
    for index in range(n):
        ids = tuple(int(token) for token in generator.choice(tokens, size=length))
        source = Span(int(generator.integers(1, 8)), int(generator.integers(length - 8, length - 1)))
        answer = ids[source.start : source.end]
        cases.append(
            Case(f"c{index}", "niah", length + len(answer), 0.5, "n0", "h0", 0, 0, ids, answer, source, source)
        )
    return cases


@pytest.fixture(scope="module")
def random_model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def random_cases(random_model):
    """Cases made of the tokens that the random model likes best to write."""
    prefill, stops = Prefill(random_model), stop_rule(random_model)
    written = Counter(token for start in range(20, 60) for token in decode_greedily(prefill, (start,), stops, 9))
    return few_token_cases(tokens=[token for token, _ in written.most_common(4)])


@pytest.fixture(scope="module")
def trained():
    """The last checkpoint of the bundled trajectory."""
    return load_model(bundled_trajectory()[-1].path)


@pytest.fixture(scope="module")
def trained_cases(trained):
    return build_cases(NiahGrid(lengths=(256,), depths=(0, 50, 100), samples=4), trained.tokenizer)


def test_wu_equals_the_slow_reference_on_a_random_model(random_model, random_cases, checkpoint, monkeypatch):
    # Nothing that random weights write passes the gate; here it is the counting that is compared.
    monkeypatch.setattr(generate, "MIN_ROUGE1_RECALL", -1.0)
    reference, n_hits = eager_twin(checkpoint), 0
    for case, result in zip(random_cases, score_generated(random_model, random_cases, WU), strict=True):
        expected, written, _ = slow_trial(reference, case)
        assert result.greedy_ids == written
        np.testing.assert_allclose(result.scores["wu"], expected, atol=1e-6)
        n_hits += np.count_nonzero(expected)
    assert n_hits > 5  # zeros alone would prove nothing


@pytest.mark.parametrize("name", ["last", "middle"])
def test_wu_and_its_gate_equal_the_slow_reference_on_the_bundled_trajectory(name, trained):
    trajectory = bundled_trajectory()
    folder = {"last": trajectory[-1], "middle": trajectory[6]}[name].path
    model, reference = load_model(folder), eager_twin(folder)
    cases = build_cases(NiahGrid(lengths=(256,), depths=(10, 90), samples=3, seed=5), model.tokenizer)
    counted = []
    results = score_generated(model, cases, WU)
    for case, result in zip(cases, results, strict=True):
        expected, written, recall = slow_trial(reference, case)
        assert result.greedy_ids == written
        assert result.rouge1_recall == recall
        if 100 * recall > 50:
            counted.append(expected)
            np.testing.assert_allclose(result.scores["wu"], expected, atol=1e-6)
        else:
            assert np.isnan(result.scores["wu"]).all()
    if name == "middle":
        assert 0 < len(counted) < len(cases)
    # What a table of the run shows: the mean over counted trials, and their number.
    values = np.stack([result.scores["wu"] for result in results])
    np.testing.assert_allclose(np.nanmean(values, axis=0), np.mean(counted, axis=0), atol=1e-6)
    assert np.nanmean(values, axis=0).max() > 0.3


def test_where_the_greedy_path_is_the_gold_answer_both_modes_agree(trained, trained_cases):
    written = score_generated(trained, trained_cases, METRICS)
    forced = score_cases(trained, trained_cases, METRICS)
    n_exact = 0
    for case, ours, theirs in zip(trained_cases, written, forced, strict=True):
        n_answer = len(case.answer_ids)
        # Of a case with the gold answer, and of one without, the loss is that of the gold answer.
        np.testing.assert_allclose(ours.answer_loss_nats, theirs.answer_loss_nats, atol=1e-5)
        assert (ours.greedy_ids[:n_answer] == case.answer_ids) == (theirs.greedy_ids == case.answer_ids)
        if theirs.greedy_ids == case.answer_ids:
            n_exact += 1
            assert trained.tokenizer.decode(ours.greedy_ids[n_answer:]) == ".\n"  # the full stop is no copy event
            for name in METRICS:
                np.testing.assert_allclose(ours.scores[name], theirs.scores[name], atol=1e-5, err_msg=name)
    assert n_exact > 6


def test_the_loss_of_another_answer_than_the_one_written_is_teacher_forced(random_model, random_cases):
    written = score_generated(random_model, random_cases, WU)
    forced = score_cases(random_model, random_cases, WU)
    for case, ours, theirs in zip(random_cases, written, forced, strict=True):
        assert ours.greedy_ids[: len(case.answer_ids)] != case.answer_ids
        assert ours.answer_loss_nats == pytest.approx(theirs.answer_loss_nats, abs=1e-5)


def test_shared_beginnings_are_run_once_and_order_does_not_matter(trained):
    grid = build_cases(NiahGrid(lengths=(200, 256), depths=(0, 50, 100), seed=3), trained.tokenizer)
    fed, told = [], []
    handle = trained.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: fed.append(args[0].shape[1])
    )
    try:
        results = score_generated(trained, grid, METRICS, on_tokens=told.append, chunk_tokens=70)
    finally:
        handle.remove()
    assert sorted(told) == sorted(case.length for case in grid)
    expected = 0
    for visit in walk(grid):
        case, result = grid[visit.index], results[visit.index]
        written, known = result.greedy_ids, {*case.answer_ids, *case.prompt_ids[case.source.start : case.source.end]}
        expected += len(case.prompt_ids) - visit.kept  # the prompt, from where it leaves the one before
        expected += len(written) - 1  # a token per step
        expected += max(n for n, token in enumerate(written, start=1) if token in known)  # one pass for the rows
        if written[: len(case.answer_ids)] != case.answer_ids:
            expected += len(case.answer_ids)  # one for the loss
    assert sum(fed) == expected < sum(len(case.prompt_ids) for case in grid)
    alone = [score_generated(trained, [case], METRICS)[0] for case in grid]
    for one, other in zip(results, alone, strict=True):
        assert (one.case_id, one.greedy_ids, one.generated) == (other.case_id, other.greedy_ids, other.generated)
        for name in METRICS:
            np.testing.assert_allclose(one.scores[name], other.scores[name], atol=1e-5)


def test_a_model_whose_cache_cannot_be_cropped_says_what_it_costs(trained, trained_cases):
    whole = dataclasses.replace(trained, cache_fault="its cache is broken for the test")
    with pytest.warns(UserWarning, match="its cache is broken for the test, so every prompt is run whole two"):
        results = score_generated(whole, trained_cases[:2], METRICS)
    for one, other in zip(results, score_generated(trained, trained_cases[:2], METRICS), strict=True):
        assert one.greedy_ids == other.greedy_ids
        np.testing.assert_allclose(one.scores["needle_mass"], other.scores["needle_mass"], atol=1e-5)


def test_a_users_own_metric_sees_whole_rows(trained, trained_cases):
    shapes = []

    def first_token_mass(rows):
        shapes.append((rows.weights.shape[1:], rows.answer_ids.tolist(), rows.prompt_ids.numel()))
        assert torch.allclose(rows.weights.sum(-1), torch.ones(rows.weights.shape[:2]), atol=1e-5)
        return rows.weights[:, :, 0].mean(dim=-1)

    case = trained_cases[0]
    (result,) = score_generated(trained, [case], {"mine": first_token_mass})
    n_prompt, n_answer = len(case.prompt_ids), len(case.answer_ids)
    assert set(map(str, shapes)) == {
        str((torch.Size((n_answer, n_prompt + n_answer - 1)), list(case.answer_ids), n_prompt))
    }
    assert result.scores["mine"].shape == (trained.n_layers, trained.n_heads)


# What a scripted model writes, and where its heads look, stands in the tests below; the tokenizer is the organism's.


class Scripted:
    """Stands in for `Prefill`: writes `script` after any prompt; head h attends `positions[h][step]`."""

    script: tuple[int, ...] = ()
    positions: tuple[tuple[int, ...], ...] = ((),)
    n_prompt = 0
    vocabulary = 700

    def __init__(self, model, *, chunk_tokens):
        self.model = model

    def run(self, ids, rows_from, sink):
        steps = range(rows_from - self.n_prompt + 1, len(ids) - self.n_prompt + 1)
        if sink is not None:
            weights = torch.full((1, len(self.positions), len(steps), len(ids)), 0.2 / len(ids))
            for head, attended in enumerate(self.positions):
                for row, step in enumerate(steps):
                    weights[0, head, row, attended[step]] += 0.8
            sink(0, weights)
        tokens = torch.tensor([self.script[step] for step in steps])
        return torch.nn.functional.one_hot(tokens, self.vocabulary).float() * 9


@pytest.fixture
def scripted(random_model, monkeypatch):
    """Function (source, written, positions in the source or -1 for elsewhere) -> the one result."""

    def run(source, written, positions=None, **options):
        def encode(text):
            return tuple(random_model.tokenizer.encode(text))

        source_ids, script = encode(source), encode(written)
        prompt = (*encode(" Which"), *source_ids, *encode(" is it"))
        start = len(encode(" Which"))
        span = Span(start, start + len(source_ids))
        positions = positions or [[-1] * len(script)]
        monkeypatch.setattr(Scripted, "script", (*script, *encode("\n"), *script * 20))
        monkeypatch.setattr(Scripted, "n_prompt", len(prompt))
        monkeypatch.setattr(
            Scripted, "positions", [[0 if at < 0 else start + at for at in head] + [0] for head in positions]
        )
        monkeypatch.setattr(generate, "Prefill", Scripted)
        case = Case("c", "niah", len(prompt) + 1, 0.5, "n", "h", 0, 0, prompt, source_ids[:1], span, span)
        (result,) = score_generated(random_model, [case], METRICS, **options)
        return result

    return run


def test_repeats_count_above_one(scripted):
    # " golden" again and again, always looking at it; then only once.
    result = scripted(" golden canvas", " golden canvas golden golden", [[0, 1, 0, 0], [0, 0, 0, -1], [1, 0, 1, 1]])
    assert result.scores["wu"][0].tolist() == [2.0, 1.0, 0.0]
    assert result.scores["retrieval"][0].tolist() == [1.0, 0.5, 0.0]
    assert result.generated == "golden canvas golden golden"
    assert result.rouge1_recall == 1.0


def test_the_gate_is_above_one_half(scripted):
    half = scripted(" golden canvas", " golden", [[0]])
    assert half.rouge1_recall == 0.5
    assert all(np.isnan(values).all() and values.shape == (1, 1) for values in half.scores.values())
    more = scripted(" golden canvas garden", " golden canvas", [[0, 1]])
    assert more.scores["wu"].tolist() == [[pytest.approx(2 / 3)]]


def test_a_line_break_in_the_source_is_an_event_like_any_other(scripted):
    """The published loop counts the step that stops, too."""
    result = scripted(" golden\n canvas garden", " golden garden canvas\n", [[0, -1, 2, 1], [-1, -1, -1, 1]])
    assert result.greedy_ids[-1] == 10
    assert result.scores["wu"][0].tolist() == [0.75, 0.25]


def test_an_answer_that_begins_with_its_end_is_empty(scripted):
    result = scripted(" golden canvas", "\n", [[-1]])
    assert (result.generated, result.rouge1_recall, len(result.greedy_ids)) == ("", 0.0, 1)
    assert np.isnan(result.scores["wu"]).all()


def test_at_most_so_many_tokens(scripted, random_model, random_cases):
    assert scripted(" golden canvas", " golden canvas garden", [[0, 1, -1]], max_new_tokens=2).generated == (
        "golden canvas"
    )
    endless = " golden canvas" * 40
    for options, n in (({}, 50), ({"max_new_tokens": 7}, 7), ({"max_new_tokens": 1}, 1)):
        assert len(scripted(" golden canvas", endless, [[0] * 80], **options).greedy_ids) == n
    with pytest.raises(LccpError, match="max_new_tokens must be at least 1, got 0; the usual number is 50"):
        score_generated(random_model, random_cases, WU, max_new_tokens=0)


def test_what_stops():
    texts = {1: "a", 2: ".\n\n", 3: "\n", 4: "</s>", 5: "<|eot|>", 6: "b"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[ids[0]], eos_token_id=4)
    for configured, expected in ((5, {2, 3, 4, 5}), ([5, 6], {2, 3, 4, 5, 6}), (None, {2, 3, 4})):
        inner = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
        stops = stop_rule(HookedModel(inner, tokenizer, "stub"))
        assert {token for token in texts if stops(token)} == expected


def test_decoding_stops_at_the_end_of_text(checkpoint, random_cases):
    model = load_model(checkpoint)
    prompt = random_cases[0].prompt_ids
    whole = decode_greedily(Prefill(model), prompt, stop_rule(model), 20)
    end = whole[len(whole) // 2]
    model.model.generation_config.eos_token_id = end
    cut = decode_greedily(Prefill(model), prompt, stop_rule(model), 20)
    assert cut == whole[: whole.index(end) + 1]
    assert len(cut) < len(whole)


def test_nan_logits_name_checkpoint_and_case(checkpoint, random_cases):
    model = load_model(checkpoint)
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(LccpError, match=r"checkpoint tokens-1M, case c\d: .* logits are NaN; its weights are broken"):
        score_generated(model, random_cases[:1], WU)


@pytest.mark.parametrize(
    ("reference", "written", "expected"),
    [
        ("eat a sandwich and sit in the park", "Sandwiches: eating, in parks!", 4 / 8),  # stemmed, in any order
        ("go on and on", "on", 1 / 4),  # a word counts as often as it is written
        ("go on and on", "on on on", 2 / 4),
        ("26 July 1992", "1992", 1 / 3),
        ("seven", "", 0.0),
        # Other scripts: the package's words would be none, or only the number.
        ("在公园里吃三明治", "在公园里吃三明治。", 1.0),
        ("在公园里吃三明治", "他在公园", 3 / 8),
        ("2024年去公园", "2024", 1 / 5),
        ("公園でサンドイッチを食べる", "公園で食べる", 6 / 13),
        ("съешь сэндвич в парке", "В парке съешь мороженое", 3 / 4),
        ("पार्क में बैठो", "पार्क में", 2 / 3),  # a word with vowel signs is one word
        ("กินแซนด์วิช", "กินแซนด์วิช", 1.0),
        ("the café's sandwiches", "a CAFE\u0301 sandwich", 2 / 4),  # composed; ASCII words stemmed as ever
        ("☂ ★", "★", 1 / 2),  # no letters at all
        ("☂ ★", "umbrella", 0.0),
    ],
)
def test_recall_by_hand(reference, written, expected):
    assert rouge1_recall(reference, written) == pytest.approx(expected)


def test_the_package_alone_has_no_words_for_other_scripts():
    """The reason for words of our own; where this changes, they may go."""
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    assert scorer.score("在公园里吃三明治", "在公园里吃三明治")["rouge1"].recall == 0


def written_run(path):
    """A synthetic run in generate mode: early on nothing passes the gate, then part, then all."""
    batch, trajectory = synthetic.cases(), synthetic.checkpoints()
    writer = RunWriter(path, {"mode": "generate"}, batch)
    writer.add_checkpoints(trajectory)
    answers = {case.case_id: case.answer_ids for case in batch}
    for i, checkpoint in enumerate(trajectory):
        made = []
        for result in synthetic.results(i, batch, np.random.default_rng(i)):
            passes = i >= 6 or (i >= 4 and result.case_id.endswith("-0"))
            scores = {name: values if passes else values * np.nan for name, values in result.scores.items()}
            made.append(
                dataclasses.replace(
                    result,
                    scores=scores,
                    greedy_ids=(*result.greedy_ids, 7, 8),
                    generated="so",
                    rouge1_recall=float(passes),
                )
            )
        scores, outcomes = result_frames(checkpoint, "generate", made, answers)
        writer.append(checkpoint.name, 0, scores=scores, outcomes=outcomes)
    return Run.open(path)


@pytest.fixture(scope="module")
def generate_run(tmp_path_factory):
    return written_run(tmp_path_factory.mktemp("generate") / "run")


def test_tables_of_a_run_in_generate_mode_count_what_counts(generate_run):
    table = score_table(generate_run, length=1024)  # without a mode: the one that the run holds
    counted = table.group_by("checkpoint", maintain_order=True).agg(pl.col("n").unique())
    assert counted["n"].to_list() == [[0]] * 4 + [[5]] * 2 + [[40]] * 10
    early = table.filter(pl.col("n") == 0)
    assert early["score"].is_nan().all()
    assert table.filter(pl.col("n") == 40)["score"].is_not_nan().all()
    outcomes = outcome_table(generate_run, by=())
    assert outcomes["n"].to_list() == [120] * 16  # what a model answers is known of every case
    assert outcomes["answer_ppl"].is_not_nan().all()
    # Right is what begins with the gold answer, whatever follows it.
    first, last = outcomes["niah_score"][0], outcomes["niah_score"][-1]
    assert 0 < first < last == 100
    weakest = head_records(generate_run, checkpoint=table["checkpoint"][0])[0]
    assert (weakest["score"], weakest["n"]) == (None, 0)


def test_figures_and_report_of_a_run_in_generate_mode(generate_run, tmp_path):
    tables = RunTables(generate_run, 1024)
    assert tables.read_mode == "generate"
    counted = tables.census
    assert counted["n_retrieval_heads"].to_list()[:4] == [0, 0, 0, 0]
    assert counted["n_retrieval_heads"][-1] >= 5
    assert "mean over 0 to 40 cases, greedy generation" in caption("head_heatmaps", tables)
    assert len(draw_figures(tables, tmp_path / "figures", formats=["svg"])) == 11
    assert findings(tables)
    page = write_report(generate_run, tmp_path / "report.html").read_text()
    assert ">generate</td>" in page
    assert "NaN" not in page.split("<script")[0]


def test_a_run_that_holds_both_modes_is_read_as_the_paper_has_it(tmp_path):
    batch, (checkpoint, *_) = synthetic.cases(lengths=(256,)), synthetic.checkpoints()
    writer = RunWriter(tmp_path / "run", {}, batch)
    writer.add_checkpoints([checkpoint])
    answers = {case.case_id: case.answer_ids for case in batch}
    forced = synthetic.results(0, batch, np.random.default_rng(0))
    written = [
        dataclasses.replace(r, scores={k: v * np.nan for k, v in r.scores.items()}, generated="") for r in forced
    ]
    for shard, (mode, results) in enumerate([("generate", written), ("teacher_forced", forced)]):
        scores, outcomes = result_frames(checkpoint, mode, results, answers)
        writer.append(checkpoint.name, shard, scores=scores, outcomes=outcomes)
    run = Run.open(tmp_path / "run")
    assert score_table(run).equals(score_table(run, mode="teacher_forced"))
    assert score_table(run, mode="generate")["n"].unique().to_list() == [0]
    with pytest.raises(LccpError, match=r"unknown mode 'generated' in .*: known are generate, teacher_forced; did"):
        outcome_table(run, mode="generated")
