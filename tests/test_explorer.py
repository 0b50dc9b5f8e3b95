"""The head explorer without a browser: arrays as in the tables, traits that refuse, attention as in the model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from synthetic import METRICS, N_HEADS, N_LAYERS, cases, write_run

from lccp_interp.capture.model import load_model
from lccp_interp.dynamics import RunTables, score_table
from lccp_interp.figures.explorer import HeadExplorer
from lccp_interp.figures.explorer_attention import AttentionReader, head_rows, read_text, token_texts, windows
from lccp_interp.figures.explorer_scores import STATISTICS, HeadArrays
from lccp_interp.schema import CaseResult, LccpError, Span
from lccp_interp.store import Run

CASE_ID = "niah-256-d0-s0-0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("explorer") / "run", lengths=(128, 256), n_needles=4)


@pytest.fixture(scope="module")
def explorer(run: Run) -> HeadExplorer:
    return HeadExplorer(run)


def _sent(explorer: HeadExplorer) -> tuple[np.ndarray, np.ndarray]:
    """The numbers as the browser unpacks them."""
    shape = explorer._about["shape"]
    size = int(np.prod(shape)) * 4
    values = np.frombuffer(explorer._scores[:size], "<f4").reshape(shape)
    return values, np.frombuffer(explorer._scores[size:], np.uint8).reshape(shape[2:])


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_sent_is_what_the_tables_hold(run: Run, explorer: HeadExplorer, metric: str) -> None:
    values, retrieves = _sent(explorer)
    about = explorer._about
    table = score_table(run, metric=metric)
    assert table.height == 16 * N_LAYERS * N_HEADS
    names = [one["name"] for one in about["checkpoints"]]
    for row in table.iter_rows(named=True):
        at = (names.index(row["checkpoint"]), row["layer"], row["head"])
        got = values[(slice(None), about["metrics"].index(metric), *at)]
        np.testing.assert_array_equal(got, np.float32([row[name] for name in STATISTICS]))
        if metric == "retrieval":
            assert retrieves[at] == (row["score"] > 0.1)


def test_colour_scales_hold_over_checkpoints_and_end_at_a_tick(explorer: HeadExplorer) -> None:
    values, _ = _sent(explorer)
    for m, metric in enumerate(explorer._about["metrics"]):
        low, high = explorer._about["scales"][metric]
        assert low == 0
        assert np.nanmax(values[0, m]) <= high <= 1.2


def test_births_and_deaths_are_those_of_the_tables(run: Run, explorer: HeadExplorer) -> None:
    names = [one["name"] for one in explorer._about["checkpoints"]]
    sent = {(e["kind"], e["layer"], e["head"], names[e["checkpoint"]]) for e in explorer._about["events"]}
    table = RunTables(run).events
    assert sent == set(table.select("kind", "layer", "head", "checkpoint").rows())
    assert ("birth", 1, 6, "lccp-0.4M") in sent
    assert explorer._about["stories"]["1-6"] == "born between 3.9M and 4M tokens"
    assert explorer._about["stories"]["2-5"].startswith("a retrieval head from the start, died between")
    assert "0-0" not in explorer._about["stories"]


def test_it_begins_at_the_strongest_head_of_the_last_checkpoint(run: Run, explorer: HeadExplorer) -> None:
    last = score_table(run).filter(checkpoint="lccp-1.2M").sort("score", descending=True).row(0, named=True)
    assert explorer.selection == {
        "layer": 3, "head": 4, "checkpoint": "lccp-1.2M", "metric": "retrieval", "case_id": None,
        "score": pytest.approx(last["score"], abs=1e-6), "ci_low": pytest.approx(last["ci_low"], abs=1e-6),
        "ci_high": pytest.approx(last["ci_high"], abs=1e-6), "n": 20, "retrieval_head": True,
    }  # fmt: skip
    assert (last["layer"], last["head"]) == (3, 4)


def test_selection_follows_the_traits(run: Run) -> None:
    explorer = HeadExplorer(run, length=128)
    explorer.layer, explorer.head, explorer.checkpoint = 2, 1, "pretrain-0.5M"
    explorer.metric, explorer.case_id = "copy", "niah-128-d50-s1-1"
    got = explorer.selection
    assert (got["layer"], got["head"], got["checkpoint"], got["metric"]) == (2, 1, "pretrain-0.5M", "copy")
    assert got["case_id"] == "niah-128-d50-s1-1"
    assert got["score"] < 0.1
    assert not got["retrieval_head"]


def test_a_message_of_the_browser_changes_the_traits(run: Run) -> None:
    explorer = HeadExplorer(run)
    explorer.set_state({"layer": 0, "head": 3, "checkpoint": "pretrain-0.5M"})
    assert explorer.selection["retrieval_head"]
    with pytest.raises(LccpError, match="layer 4 is not in"):
        explorer.set_state({"layer": 4})
    assert explorer.layer == 0


@pytest.mark.parametrize(
    ("trait", "value", "message"),
    [
        ("layer", 9, "layer 9 is not in .*; it has 0, 1, 2, 3"),
        ("head", -1, "head -1 is not in .*; it has 0, 1, 2, 3, 4, 5, 6, 7"),
        ("metric", "retreival", "unknown metric 'retreival' .* did you mean 'retrieval'"),
        ("checkpoint", "lccp-1.3M", "unknown checkpoint 'lccp-1.3M' .* did you mean"),
        ("case_id", "niah-128-d0-s0-0", "no case 'niah-128-d0-s0-0' of 256 tokens in .*; its 20 cases are niah-256"),
    ],
)
def test_what_the_run_does_not_have_is_refused(explorer: HeadExplorer, trait: str, value: object, message: str) -> None:
    before = getattr(explorer, trait)
    with pytest.raises(LccpError, match=message):
        setattr(explorer, trait, value)
    assert getattr(explorer, trait) == before


def test_wrong_arguments_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(LccpError, match="no cases of 7 tokens"):
        HeadExplorer(run, length=7)
    with pytest.raises(
        LccpError,
        match=r"unknown metric 'qr' .* known are retrieval, copy, needle_mass, wu; .*--metrics qr --out ANOTHER_RUN",
    ):
        HeadExplorer(run, metric="qr")
    with pytest.raises(LccpError, match="no folder of checkpoints at"):
        HeadExplorer(run, checkpoints=tmp_path / "none")
    with pytest.raises(LccpError, match="attention comes from one of them"):
        HeadExplorer(run, model=SimpleNamespace(name="m"), checkpoints=tmp_path)  # type: ignore[arg-type]


def test_undefined_scores_are_nan_and_never_zero(tmp_path: Path) -> None:
    def lose(i: int, result: CaseResult) -> CaseResult:
        scores = {name: values.copy() for name, values in result.scores.items()}
        for values in scores.values():
            values[1, 2] = np.nan
        return replace(result, scores=scores)

    explorer = HeadExplorer(write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=lose))
    values, retrieves = _sent(explorer)
    assert np.isnan(values[0, :, :, 1, 2]).all()
    assert not np.isnan(values[0, :, :, 1, 3]).any()
    assert not retrieves[:, 1, 2].any()
    explorer.layer, explorer.head = 1, 2
    assert np.isnan(explorer.selection["score"])
    assert explorer.selection["n"] == 0


def test_a_run_without_the_papers_metric_judges_by_the_one_asked_for(run: Run, tmp_path: Path) -> None:
    def only(i: int, result: CaseResult) -> CaseResult:
        return replace(result, scores={"wu": result.scores["wu"]})

    bare = write_run(tmp_path / "run", lengths=(256,), n_needles=3, change=only, only=[0, 1])
    explorer = HeadExplorer(bare, metric="wu")
    assert explorer._about["rule"].startswith("wu score above 0.1")
    assert _sent(explorer)[1][:, 0, 3].all()
    with pytest.raises(LccpError, match="unknown metric 'retrieval'"):
        HeadExplorer(bare)


def test_a_large_run_is_under_two_megabytes() -> None:
    shape = (len(STATISTICS), 4, 20, 32, 32)
    arrays = HeadArrays(
        None, METRICS, pl.DataFrame(), tuple(range(32)), tuple(range(32)),  # type: ignore[arg-type]
        np.zeros(shape, np.float32), np.zeros(shape[2:], bool),
    )  # fmt: skip
    assert len(arrays.packed) == 4 * 4 * 4 * 20 * 1024 + 20 * 1024 == 1_331_200


# ---------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return load_model(checkpoint, device="cpu")


def test_attention_is_the_models_own(run: Run, model) -> None:
    explorer = HeadExplorer(run, model=model)
    explorer.layer, explorer.head, explorer.case_id = 1, 2, CASE_ID
    case = next(case for case in cases((256,), 4) if case.case_id == CASE_ID)
    ids = torch.tensor([case.prompt_ids + case.answer_ids[:-1]])
    own = model.attention_rows(ids, [-3, -2, -1])[1][0, 2].numpy()
    shown = explorer._attention
    assert shown["model"] == model.name
    assert shown["segments"][0]["start"] == 0
    np.testing.assert_allclose(shown["segments"][0]["weights"], own.mean(axis=0), atol=2e-4)
    assert shown["needle_mass"] == pytest.approx(own.mean(axis=0)[1:5].sum(), abs=1e-5)
    assert shown["source_mass"] == pytest.approx(own.mean(axis=0)[2:5].sum(), abs=1e-5)
    assert shown["top"][0][0] == own.mean(axis=0).argmax()

    explorer.event = 1
    np.testing.assert_allclose(explorer._attention["segments"][0]["weights"], own[1], atol=2e-4)
    assert explorer._attention["query"] == 8
    explorer.event = 99
    assert explorer._attention["event"] == -1

    explorer.case_id = ""
    assert explorer._attention == {}


def test_one_layer_is_kept_and_heads_of_it_cost_no_pass(run: Run, model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: passes.append(a[0].shape) or forward(self, *a, **k)
    )
    explorer = HeadExplorer(run, model=model)
    explorer.layer, explorer.head, explorer.case_id = 1, 2, CASE_ID
    n_first = len(passes)
    explorer.head = 3
    explorer.event = 0
    explorer.checkpoint = "pretrain-0.5M"
    assert n_first == 1 == len(passes)
    explorer.layer = 2
    assert [tuple(shape) for shape in passes[1:]] == [(1, 3)]  # the answer alone: the prompt is in the cache
    assert explorer._reader._held[1].shape == (4, 3, 10)


def test_what_a_model_lacks_is_said(run: Run, model) -> None:
    explorer = HeadExplorer(run, model=model)
    explorer.layer, explorer.head, explorer.case_id = 0, 7, CASE_ID
    assert "has 4 heads in a layer, the run has head 7" in explorer._attention["problem"]
    explorer.head, explorer.layer = 0, 3
    assert (
        "layer 3 of checkpoint tokens-1M has no attention; it has in layers 0, 1, 2" in explorer._attention["problem"]
    )
    foreign = replace(cases((256,), 4)[0], prompt_ids=(10**6,) * 8)
    with pytest.raises(LccpError, match="the run was scored with another tokenizer"):
        AttentionReader(model, None).rows("any", foreign, 0)


def test_a_failing_model_is_said_on_the_page(run: Run, model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("mat1 and mat2\ncannot be multiplied")

    monkeypatch.setattr(type(model), "forward", fail)
    explorer = HeadExplorer(run, model=model)
    explorer.case_id = CASE_ID
    assert explorer._attention["problem"] == "RuntimeError: mat1 and mat2 cannot be multiplied"


def test_checkpoints_of_a_folder_follow_the_slider(trajectory: Path, tmp_path: Path) -> None:
    names = ["pretrain-0", "lccp-1", "lccp-2", *(f"gone-{i}" for i in range(13))]
    run = write_run(tmp_path / "run", names=names, lengths=(256,), n_needles=3)
    explorer = HeadExplorer(run, checkpoints=trajectory)
    explorer.layer, explorer.head, explorer.checkpoint = 1, 0, "lccp-1"
    explorer.case_id = CASE_ID
    first = explorer._attention
    assert first["model"] == "lccp-1"
    explorer.checkpoint = "lccp-2"
    assert explorer._attention["model"] == "lccp-2"
    assert explorer._attention["segments"][0]["weights"] != first["segments"][0]["weights"]
    explorer.checkpoint = "gone-0"
    assert "has no checkpoint 'gone-0'; it has pretrain-0, lccp-1, lccp-2" in explorer._attention["problem"]


def test_without_a_model_there_is_no_attention(run: Run) -> None:
    explorer = HeadExplorer(run)
    explorer.case_id = CASE_ID
    assert explorer._about["attention"] == "none"
    assert explorer._attention == {}


def test_long_prompts_are_cut_to_windows_and_say_what_is_left_out(tokenizer) -> None:
    n = 2000
    ids = tuple(int(i) for i in np.random.default_rng(0).integers(300, 400, n))
    case = replace(
        cases((256,), 1)[0],
        prompt_ids=ids,
        answer_ids=(ids[901], ids[902]),
        needle=Span(900, 905),
        source=Span(901, 903),
    )
    rows = np.full((2, n + 1), 1e-4, np.float32)
    rows[0, 901], rows[1, 1500] = 0.6, 0.7
    found = read_text(rows, case, tokenizer, -1)
    shown = [(s["start"], s["start"] + len(s["texts"])) for s in found["segments"]]
    left_out = found["gaps"]
    assert any(start <= 900 - 20 and end >= 905 + 20 for start, end in shown)
    assert any(start <= 1500 < end for start, end in shown)
    assert shown[-1][1] == n + 1
    assert sum(end - start for start, end in shown) + sum(count for count, _ in left_out) == n + 1
    kept = sum(sum(s["weights"]) for s in found["segments"])
    assert kept + sum(mass for _, mass in left_out) == pytest.approx(rows.mean(axis=0).sum(), rel=1e-3)
    assert (found["n_hits"], found["hits"]) == (1, [True, False])
    assert [place for place, _, _ in found["top"][:2]] == [1500, 901]
    assert found["events"] == token_texts(tokenizer, case.answer_ids, ids[-1])


def test_windows_cover_in_order_without_small_gaps() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(361, 3000))
        start = int(rng.integers(0, n - 10))
        top = [int(place) for place in rng.integers(0, n, 6)]
        found = windows(n, (start, start + 8), top)
        shown = {place for begin, end in found for place in range(begin, end)}
        assert {*top, *range(start, start + 8), n - 1, 0} <= shown
        assert all(after[0] - before[1] >= 6 for before, after in pairwise(found))
        assert all(0 <= begin < end <= n for begin, end in found)


def test_token_texts_join_to_the_text(tokenizer) -> None:
    text = "Nobody saw\nthe harbour. Ünï <b>&amp;</b> 0 3 5"
    ids = tokenizer(text).input_ids
    whole = "".join(token_texts(tokenizer, ids))
    assert whole.replace("\ufffd", "") == "".join(c for c in text if ord(c) < 128)
    assert "<b>&amp;</b>" in whole


def test_heads_beyond_the_model() -> None:
    rows = np.zeros((4, 2, 5), np.float32)
    assert head_rows(rows, 3, "m").shape == (2, 5)
    with pytest.raises(LccpError, match="checkpoint m has 4 heads in a layer, the run has head 4"):
        head_rows(rows, 4, "m")


# ---------------------------------------------------------------- house


def _run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_figures_import_no_anywidget_and_the_explorer_no_torch() -> None:
    code = "import sys, lccp_interp.figures; print('anywidget' in sys.modules)"
    assert _run_python(code) == "False"
    code = "import sys, lccp_interp.figures.explorer; print('anywidget' in sys.modules, 'torch' in sys.modules)"
    assert _run_python(code) == "True False"


def test_exploring_scores_needs_no_torch(run: Run) -> None:
    code = f"""
        import sys
        from lccp_interp.figures.explorer import HeadExplorer
        from lccp_interp.store import Run
        explorer = HeadExplorer(Run.open({str(run.path)!r}))
        explorer.case_id = {CASE_ID!r}
        print(explorer.selection["layer"], "torch" in sys.modules)
    """
    assert _run_python(textwrap.dedent(code)) == "3 False"


def test_without_anywidget_one_line_says_what_to_install() -> None:
    code = """
        import sys
        sys.modules["anywidget"] = None
        from lccp_interp.schema import LccpError
        try:
            from lccp_interp.figures.explorer import HeadExplorer
        except LccpError as error:
            print(error)
    """
    said = _run_python(textwrap.dedent(code))
    assert said.startswith("the head explorer needs anywidget, which is not installed")
    assert said.endswith("pip install lccp_interp[widgets]")
    assert "\n" not in said


def test_the_page_writes_text_as_text_and_loads_nothing() -> None:
    script, style = HeadExplorer._esm, HeadExplorer._css
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import("):
        assert way not in str(script)
    addresses = str(script).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in addresses
    assert "url(" not in str(style)
    assert "@import" not in str(style)
