"""Outside data in: published head lists and benchmark results, and what is said of a file that is no such thing."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import polars as pl
import pytest
from external import external
from synthetic import cases

from lccp_interp.imports import (
    HEADS_SCHEMA,
    import_heads,
    import_probes,
    imported_heads,
    imported_names,
    list_shape,
    match_checkpoints,
    read_heads,
    read_probes,
    records,
    summarise_heads,
    top_heads,
)
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import PROBES_SCHEMA, Run, RunWriter

# The ten best heads of Llama-2-7B-80K as they were published (Wu et al., arXiv 2404.15574).
PUBLISHED_TOP = [
    ((16, 19), 0.943), ((11, 15), 0.920), ((8, 26), 0.800), ((6, 9), 0.618), ((7, 12), 0.614),
    ((17, 22), 0.557), ((11, 2), 0.459), ((6, 16), 0.437), ((19, 15), 0.420), ((21, 30), 0.400),
]  # fmt: skip


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path):
    writer = RunWriter(tmp_path / "run", {"seed": 0}, cases([256], 1))
    paths = ["/weights/base", "/weights/step-1", "/other/step-2", "/another/step-2"]
    writer.add_checkpoints(
        [
            Checkpoint(name, path, tokens, hash=name)
            for name, path, tokens in zip(["base", "early", "mid", "late"], paths, [0, 10, 20, 30], strict=True)
        ]
    )
    return Run.open(tmp_path / "run")


def test_the_published_list_of_llama_2_gives_its_published_heads():
    heads = read_heads(external("head_scores/llama-2-7b-80k.json"))
    assert list_shape(heads) == (32, 32)
    summary = summarise_heads(heads)
    assert (summary["n_heads"], summary["n_above_threshold"], summary["min_trials"]) == (1024, 33, 586)
    best = top_heads(heads, 10).select("layer", "head", "score").rows()
    assert [((layer, head), round(score, 3)) for layer, head, score in best] == PUBLISHED_TOP
    assert (heads["ci_low"] <= heads["score"]).all()
    assert (heads["ci_high"] >= heads["score"]).all()


def test_the_published_list_of_mistral():
    summary = summarise_heads(read_heads(external("head_scores/Mistral-7B-v0.2-hf.json")))
    assert (summary["n_heads"], summary["n_above_threshold"], summary["max_trials"]) == (1024, 43, 362)


def test_scores_per_trial_are_averaged_with_students_interval(tmp_path):
    file = write(tmp_path / "a.json", json.dumps({"1-0": [0.0, 1, 2.0], "0-1": [0.5], "0-0": [], "1-1": [0, 0]}))
    heads = read_heads(file)
    assert dict(heads.schema) == HEADS_SCHEMA
    assert heads.select("layer", "head", "n").rows() == [(0, 0, 0), (0, 1, 1), (1, 0, 3), (1, 1, 2)]
    row = heads.row(2, named=True)
    # Mean 1, standard deviation 1, standard error 1 / sqrt(3); Student's t with 2 degrees of freedom: 4.3027.
    assert row["score"] == 1.0
    assert row["ci_low"] == pytest.approx(1 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert row["ci_high"] == pytest.approx(1 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert heads["score"].is_nan().to_list() == [True, False, False, False]
    assert heads["ci_low"].is_nan().to_list() == [True, True, False, False]
    assert set(heads["source"]) == {"a.json"}
    assert list_shape(heads) == (2, 2)
    assert [row["score"] for row in records(top_heads(heads))] == [1.0, 0.5, 0.0, None]


def test_duo_attention_is_layers_by_key_value_heads(tmp_path):
    gates = np.array([[0.25, -1e-4, 1.0], [0.5, 0.0, 0.125]])
    np.savetxt(tmp_path / "full_attention_heads.tsv", gates, delimiter="\t")
    heads = read_heads(tmp_path / "full_attention_heads.tsv")
    assert heads.select("layer", "head").rows() == [(i, j) for i in range(2) for j in range(3)]
    assert heads["score"].to_list() == pytest.approx(gates.reshape(-1).tolist())
    assert set(heads["kind"]) == {"duo"}
    assert heads["n"].null_count() == 6


def test_a_plain_csv_of_heads(tmp_path):
    text = "\ufeffhead, layer, score, n, model\r\n3,1,0.25,40,x\r\n\r\n0,0,nan,,x\r\n5,0,,0,x\r\n"
    heads = read_heads(write(tmp_path / "mine.csv", text))
    assert heads.select("layer", "head", "n").rows() == [(0, 0, None), (0, 5, 0), (1, 3, 40)]
    assert heads["score"].is_nan().to_list() == [True, True, False]
    assert list_shape(heads) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"a\.json line 1: no JSON"),
        ("a.json", "[1]", r'expected one JSON object \{"layer-head": \[score, \.\.\.\], \.\.\.\}, got \[1\]'),
        ("a.json", "{}", r"expected one JSON object .* got \{\}"),
        ("a.json", '{"L1H2": [1]}', r'key \'L1H2\' names no head; expected "layer-head", like "16-19"'),
        ("a.json", '{"1-2": 0.5}', r"key '1-2': expected a list of scores, one per trial, got 0\.5"),
        ("a.json", '{"1-2": [0.5, "x"]}', r"key '1-2', trial 2: expected a finite number, got \"x\""),
        ("a.json", '{"1-2": [NaN]}', r"key '1-2', trial 1: expected a finite number, got NaN"),
        ("a.json", '{"1-2": [true]}', r"key '1-2', trial 1: expected a finite number, got true"),
        ("a.json", '{"1-2": [1%s]}' % ("0" * 400), r"key '1-2', trial 1: expected a finite number"),
        ("a.json", '{"1-2": [1], "1-2": [2]}', r"key '1-2' stands there twice"),
        ("a.json", '{"1-2": [1], "01-2": [2]}', r"keys '1-2' and '01-2' name the same head"),
        ("a.json", " \n", r"a\.json is empty"),
        ("a.tsv", "0.5\t0.5\n0.5\n", r"line 2: expected 2 tab-separated numbers .* got 1"),
        ("a.tsv", "0.5\t0.5\n0.5\tx\n", r"line 2, column 2: expected a number, got \"x\""),
        ("a.tsv", "0.5\tinf\n", r"line 1, column 2: expected a finite number, got \"inf\""),
        ("a.tsv", "nan\t0.1\n", r"line 1, column 1: expected a finite number, got 'nan'"),
        ("a.csv", "layer,score\n1,2\n", r"line 1: no column 'head'; expected layer, head, score, got layer, score"),
        ("a.csv", "layer,head,score\n", r"no rows; expected a header with layer, head, score"),
        ("a.csv", "layer,head,score\n1,2\n", r"line 2: expected 3 cells \(layer, head, score\), got 2"),
        ("a.csv", "layer,head,score\n1,-2,0.5\n", r"line 2, head: expected a whole number, 0 or more, got \"-2\""),
        ("a.csv", "layer,head,score\n1.0,2,0.5\n", r"line 2, layer: expected a whole number"),
        ("a.csv", "layer,head,score\n1,2,many\n", r"line 2, score: expected a number, got \"many\""),
        ("a.csv", "layer,head,score\n1,2,1\n\n1,2,2\n", r"line 4: layer 1 head 2 stands in line 2 too; keep one"),
        ("a.csv", "layer,head,score,score\n1,2,1,2\n", r"line 1: column 'score' stands there twice"),
        ("a.csv", 'layer,head,score\n1,2,"x\n', r"line 2: no CSV \("),
        ("a.txt", "x", r"a\.txt: no head list by its ending; known are \.json \(wu\), \.tsv \(duo\), \.csv"),
    ],
)
def test_a_malformed_list_is_refused_by_line_or_key(tmp_path, name, text, message):
    with pytest.raises(LccpError, match=message) as error:
        read_heads(write(tmp_path / name, text))
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_text_is_refused(tmp_path):
    with pytest.raises(LccpError, match=r"gone\.json cannot be read: No such file"):
        read_heads(tmp_path / "gone.json")
    with pytest.raises(LccpError, match="cannot be read: Is a directory"):
        read_heads(tmp_path, "wu")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LccpError, match=r"no text in UTF-8 \(byte 0\)"):
        read_heads(tmp_path / "a.json")
    with pytest.raises(LccpError, match="unknown kind of head list 'xls'; known are wu, duo, heads-csv"):
        read_heads(tmp_path / "a.json", "xls")


def test_a_list_is_kept_in_the_run_with_where_it_came_from(tmp_path, run):
    file = write(tmp_path / "mine.csv", "layer,head,score\n0,1,0.5\n")
    for _ in range(2):  # importing again changes nothing
        import_heads(run.path, None, file)
    reopened = Run.open(run.path)
    assert imported_names(reopened) == ["mine"]
    assert imported_heads(reopened, "mine").equals(read_heads(file))
    (record,) = reopened.manifest["imports"]
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["imported"].startswith("20")
    assert {key: record[key] for key in ("name", "kind", "file", "table", "rows")} == {
        "name": "mine", "kind": "heads-csv", "file": "mine.csv", "table": "imported/mine.parquet", "rows": 1,
    }  # fmt: skip
    write(file, "layer,head,score\n0,1,0.75\n")
    with pytest.raises(LccpError, match=r"mine\.parquet is there with other scores; give another --name"):
        import_heads(run.path, None, file)
    import_heads(run.path, None, file, name="../mine")
    assert imported_names(Run.open(run.path)) == ["../mine", "mine"]
    assert imported_heads(run, "../mine")["score"].to_list() == [0.75]
    assert not (run.path / "mine.parquet").exists()


def test_an_unknown_or_torn_list_is_named(tmp_path, run):
    with pytest.raises(
        LccpError, match=r"no imported head list 'x'; it has: none; add one with `lccp import KIND FILE"
    ):
        imported_heads(run, "x")
    import_heads(run.path, None, write(tmp_path / "mine.csv", "layer,head,score\n0,1,0.5\n"))
    with pytest.raises(LccpError, match="it has: mine;"):
        imported_heads(Run.open(run.path), "x")
    (run.path / "imported" / "mine.parquet").write_bytes(b"PAR1")
    with pytest.raises(LccpError, match=r"mine\.parquet is not a whole Parquet file; import its file again"):
        imported_heads(run, "mine")


PROBES_CSV = """checkpoint,tokens,benchmark,subset,length,metric,score,n,stderr
base,0,ruler,qa_1,4096,accuracy,61.5,500,2.1
step-1,,ruler,qa_1,,accuracy,nan,,
"""


def test_benchmark_results_become_probes_of_the_run(tmp_path, run):
    added = import_probes(run.path, "probes-csv", write(tmp_path / "ruler.csv", PROBES_CSV))
    assert dict(added.schema) == PROBES_SCHEMA
    stored = Run.open(run.path).probes.collect()
    assert stored.equals(added)
    assert stored.rows()[0] == ("base", 0, "ruler", "qa_1", 4096, "accuracy", 61.5, 500, 2.1)
    assert stored.select("checkpoint", "tokens_seen", "length", "n", "stderr").rows()[1] == ("early", 10) + (None,) * 3
    assert math.isnan(stored["score"][1])
    (record,) = Run.open(run.path).manifest["imports"]
    assert (record["table"], record["rows"]) == ("probes/ruler.parquet", 2)
    assert record["checkpoints"] == {"base": "base", "step-1": "early"}
    assert imported_names(Run.open(run.path)) == []


def test_json_says_the_same_as_csv(tmp_path):
    entries = [
        {"checkpoint": "base", "tokens_seen": 0, "benchmark": "ruler", "subset": "qa_1", "length": 4096,
         "metric": "accuracy", "score": 61.5, "n": 500, "stderr": 2.1},
        {"checkpoint": "step-1", "benchmark": "ruler", "subset": "qa_1", "metric": "accuracy", "score": None},
    ]  # fmt: skip
    from_json = read_probes(write(tmp_path / "a.json", json.dumps(entries)), "probes-json")
    assert from_json.equals(read_probes(write(tmp_path / "a.csv", PROBES_CSV), "probes-csv"))


def csv_row(checkpoint="base", tokens="", benchmark="ruler", metric="acc", score="1", length="", extra=""):
    header = f"checkpoint,tokens_seen,benchmark,metric,score,length{extra}"
    return f"{header}\n{checkpoint},{tokens},{benchmark},{metric},{score},{length}{extra and ',1'}\n"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("probes-csv", csv_row(extra=",std_err"), r"line 1: unknown column 'std_err'; known are checkpoint,"),
        ("probes-csv", csv_row(score=""), r"line 2: score is empty; each row needs one \(write nan where"),
        ("probes-csv", csv_row(benchmark=""), r"line 2: benchmark is empty"),
        ("probes-csv", csv_row(score="1 %"), r"line 2, score: expected a number, got \"1 %\""),
        ("probes-csv", csv_row(length="4K"), r"line 2, length: expected a whole number, 0 or more, got \"4K\""),
        ("probes-csv", csv_row(tokens="some"), r"line 2, tokens_seen: 'some' is no number of tokens"),
        (
            "probes-csv",
            csv_row(tokens="5"),
            r"checkpoint 'base' has 5 tokens, but 'base' in .*run has 0; mend the file",
        ),
        ("probes-csv", csv_row("nope"), r"checkpoint 'nope' matches none of .*: base, early, mid, late; say which"),
        (
            "probes-csv",
            csv_row("step-2"),
            r"checkpoint 'step-2' matches several of .*: mid, late; .* --map 'step-2=NAME'",
        ),
        (
            "probes-csv",
            csv_row().rstrip() + "\n/weights/base,,ruler,x,1,\n",
            r"'base' and '/weights/base' are both 'base'",
        ),
        ("probes-csv", csv_row() + csv_row().split("\n")[1], r"metric acc is twice in the new results"),
        ("probes-json", "{}", r"expected a JSON list of objects with checkpoint, .* got \{\}"),
        ("probes-json", "[3]", r"entry 1: expected an object with checkpoint, .* got 3"),
        ("probes-json", '[{"checkpoint": "a"}]', r"entry 1: no column 'benchmark'"),
        (
            "probes-json",
            '[{"checkpoint": "base", "benchmark": "r", "metric": "m", "score": "1"}]',
            r"entry 1, score: expected a number, or null where it is undefined, got \"1\"",
        ),
        ("probes-xml", "x", r"unknown kind of benchmark results 'probes-xml'; known are probes-csv, probes-json"),
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, run, kind, text, message):
    with pytest.raises(LccpError, match=message) as error:
        import_probes(run.path, kind, write(tmp_path / "x.csv", text))
    assert "\n" not in str(error.value)
    assert not (run.path / "probes").exists()
    assert "imports" not in Run.open(run.path).manifest


def test_checkpoints_are_matched_by_map_name_or_folder(run):
    names = ["late", "x/BASE", "theirs", "step-1"]
    assert match_checkpoints(names, run, {"theirs": "mid"}) == {
        "late": "late", "x/BASE": "base", "theirs": "mid", "step-1": "early",
    }  # fmt: skip
    assert match_checkpoints(["base"], run, {"base": "late"}) == {"base": "late"}
    with pytest.raises(LccpError, match="--map x=mid: the file has no checkpoint 'x'; it has late, x/BASE"):
        match_checkpoints(names, run, {"x": "mid"})
    with pytest.raises(LccpError, match=r"--map theirs=y: .*run has no checkpoint 'y'; it has base, early, mid, late"):
        match_checkpoints(names, run, {"theirs": "y"})


def test_two_files_of_results_stand_side_by_side(tmp_path, run):
    import_probes(run.path, "probes-csv", write(tmp_path / "a.csv", csv_row()))
    import_probes(run.path, "probes-csv", write(tmp_path / "b.csv", csv_row(benchmark="mrcr")))
    with pytest.raises(LccpError, match="benchmark mrcr, metric acc is already in"):
        import_probes(run.path, "probes-csv", tmp_path / "b.csv", name="c")
    assert Run.open(run.path).probes.select(pl.len()).collect().item() == 2
    assert [record["name"] for record in Run.open(run.path).manifest["imports"]] == ["a", "b"]
