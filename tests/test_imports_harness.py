"""Results of evaluation harnesses: each layout in miniature, what it becomes, and what is said of a file of none."""

from __future__ import annotations

import json
import shutil

import pytest
from external import external
from synthetic import cases

from lccp_interp.imports import KINDS, add_results, guess_kind, import_probes, read_probes, read_results
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import PROBES_SCHEMA, Run, RunWriter

SHOWN = ("benchmark", "subset", "length", "metric", "score", "n", "stderr")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows(frame):
    return frame.select(SHOWN).rows()


@pytest.fixture
def run(tmp_path):
    writer = RunWriter(tmp_path / "run", {"seed": 0}, cases([256], 1))
    writer.add_checkpoints(
        [Checkpoint(f"step-{i}", f"/weights/hf-{i}", 10 * i, hash=str(i)) for i in range(3)],
    )
    return Run.open(tmp_path / "run")


def lm_eval(**changes):
    """A small file in the layout of lm-evaluation-harness 0.4.13: a group of two tasks, and a task of its own."""
    return {
        "results": {
            "recall": {"name": "recall", "alias": "recall", "sample_len": 30, "acc,none": 0.5,
                       "acc_stderr,none": 0.09, "sample_count": {"acc,none": 30}},
            "recall_a": {"name": "recall_a", "alias": " - recall_a", "sample_len": 10, "acc,none": 0.3,
                         "acc_stderr,none": 0.15, "acc_norm,none": 0.4, "acc_norm_stderr,none": "N/A"},
            "recall_b": {"name": "recall_b", "alias": " - recall_b", "sample_len": 20, "acc,none": 0.6,
                         "acc_stderr,none": 0.11},
            "sums": {"name": "sums", "alias": "sums", "sample_len": 8, "exact_match,strict-match": 0.25,
                     "exact_match_stderr,strict-match": 0.16, "exact_match,flexible-extract": 0.5,
                     "exact_match_stderr,flexible-extract": "N/A", "mcc,none": -1, "mcc_stderr,none": "N/A"},
        },
        "groups": {"recall": {"name": "recall", "alias": "recall", "sample_len": 30, "acc,none": 0.5,
                              "acc_stderr,none": 0.09, "sample_count": {"acc,none": 30}}},
        "group_subtasks": {"recall": ["recall_a", "recall_b"], "sums": []},
        "configs": {},
        "n-samples": {name: {"original": 500, "effective": n} for name, n in
                      [("recall_a", 10), ("recall_b", 20), ("sums", 8)]},
        "config": {"model": "hf", "model_args": "pretrained=/weights/hf-1,dtype=bfloat16"},
        "lm_eval_version": "0.4.13",
        "model_source": "hf",
        "model_name": "/weights/hf-1",
        "model_name_sanitized": "__weights__hf-1",
    } | changes  # fmt: skip


def test_lm_eval_keeps_a_group_and_its_members_apart(tmp_path):
    (results,) = read_results(write(tmp_path / "results_1.json", lm_eval()), "lm-eval")
    assert dict(results.rows.schema) == PROBES_SCHEMA
    assert set(results.rows["checkpoint"]) == {"/weights/hf-1"}
    assert rows(results.rows) == [
        ("recall", None, None, "acc", 0.5, 30, 0.09),
        ("recall", "recall_a", None, "acc", 0.3, 10, 0.15),
        ("recall", "recall_a", None, "acc_norm", 0.4, 10, None),
        ("recall", "recall_b", None, "acc", 0.6, 20, 0.11),
        ("sums", None, None, "exact_match,strict-match", 0.25, 8, 0.16),
        ("sums", None, None, "exact_match,flexible-extract", 0.5, 8, None),
        ("sums", None, None, "mcc", -1.0, 8, None),  # a correlation of -1 is a score
    ]
    assert results.left_out == ()


def test_lm_eval_groups_in_groups_and_tasks_in_two(tmp_path):
    blank = {"all": {"alias": "all", " ,none": " ", " _stderr,none": " "}}
    nested = lm_eval(
        results=lm_eval()["results"] | blank,
        group_subtasks={"all": ["recall"], "recall": ["recall_a", "recall_b"], "other": ["recall_b"]},
    )
    frame = read_probes(write(tmp_path / "a.json", nested), "lm-eval")
    assert frame.select("benchmark", "subset").unique(maintain_order=True).rows() == [
        ("all", "recall"), ("all", "recall_a"), ("recall_b", None), ("sums", None),
    ]  # fmt: skip


def ruler_task(name, **metrics):
    return {name: {"name": name, "alias": name, "sample_len": 6, **metrics}}


def test_lm_eval_lengths_are_the_names_of_rulers_metrics(tmp_path):
    both = {"4096,none": 0.5, "4096_stderr,none": "N/A", "8192,none": 0.25, "8192_stderr,none": "N/A"}
    one = {"4096,none": -1, "4096_stderr,none": "N/A", "16384,none": 0.75, "16384_stderr,none": "N/A"}
    filtered = {"4096,none": 0.5, "4096,first-line": 0.25}
    sources = {"niah_1": {"metadata": {"config_source": "lm_eval/tasks/ruler/niah_1.yaml"}}}
    results = {
        "ruler": {"name": "ruler", "alias": "ruler", "4096,none": 0.5, "sample_count": {"4096,none": 9}},
        **ruler_task("niah_1", **both), **ruler_task("vt", **one), **ruler_task("cwe", **filtered),
    }  # fmt: skip
    content = lm_eval(results=results, groups={}, configs=sources, group_subtasks={"ruler": ["niah_1", "vt"]})
    content["n-samples"] = {name: {"original": 500, "effective": 6} for name in ("niah_1", "vt")}
    (grouped,) = read_results(write(tmp_path / "a.json", content), "lm-eval")
    assert rows(grouped.rows) == [
        ("ruler", None, 4096, "score", 0.5, 9, None),
        ("ruler", "niah_1", 4096, "score", 0.5, None, None),  # of six samples, some at either length
        ("ruler", "niah_1", 8192, "score", 0.25, None, None),
        ("ruler", "vt", 16384, "score", 0.75, 6, None),
        ("cwe", None, 4096, "score", 0.5, 6, None),
        ("cwe", None, 4096, "score,first-line", 0.25, 6, None),
    ]
    assert grouped.left_out == ("vt 4096,none (-1: not run)",)
    # Asked for alone the same task is the same benchmark, where the file tells the family.
    alone = content | {"group_subtasks": {}, "results": {k: v for k, v in results.items() if k != "ruler"}}
    frame = read_probes(write(tmp_path / "b.json", alone), "lm-eval")
    assert frame.select("benchmark", "subset").unique(maintain_order=True).rows() == [
        ("ruler", "niah_1"), ("vt", None), ("cwe", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "/weights/hf-1"),
        ({"model_name": None}, "/weights/hf-1"),
        ({"model_name": None, "config": {"model_args": {"pretrained": "base", "peft": "adapter-1"}}}, "adapter-1"),
        ({"config": {"model_args": "pretrained=/weights/hf-1,revision=step-2"}}, "/weights/hf-1@step-2"),
        ({"config": {"model_args": {"pretrained": "/weights/hf-1", "revision": "main"}}}, "/weights/hf-1"),
    ],
)
def test_lm_eval_names_its_model(tmp_path, changes, name):
    assert set(read_probes(write(tmp_path / "a.json", lm_eval(**changes)), "lm-eval")["checkpoint"]) == {name}


def test_what_is_no_number_is_left_out_by_name(tmp_path, run, lccp):
    task = {"alias": "t", "acc,none": 0.5, "f1,none": "N/A", "list,none": [1], "nan,none": float("nan"),
            "yes,none": True, "quoted,none": "0.5", "inf,none": float("inf")}  # fmt: skip
    file = write(tmp_path / "results.json", lm_eval(results={"t": task}, groups={}))
    (results,) = read_results(file, "lm-eval")
    assert rows(results.rows) == [("t", None, None, "acc", 0.5, None, None)]
    assert results.left_out == (
        "t f1,none (N/A)", "t list,none ([1])", "t nan,none (NaN)", "t yes,none (true)", "t quoted,none (0.5)",
        "t inf,none (Infinity)",
    )  # fmt: skip
    code, out, err = lccp("import", "lm-eval", file, "--into", run.path, "--format", "csv")
    assert (code, len(out.splitlines())) == (0, 2)
    assert "left out 6 that are no scores: t f1,none (N/A), t list,none ([1])" in err
    (record,) = Run.open(run.path).manifest["imports"]
    assert record["left_out"] == list(results.left_out)


def helmet(**changes):
    """A small file in HELMET's layout: two answers of one data set at one length."""
    args = {"model_name_or_path": "/weights/hf-1", "datasets": "json_kv", "input_max_length": 8192, "seed": 42,
            "test_files": "data/json_kv/test_k105_dep6.jsonl", "tag": "v1", "shots": 2}  # fmt: skip
    return {
        "args": args | changes.pop("args", {}),
        "data": [{"output": "a"}, {"output": "b"}],
        "metrics": {"exact_match": [True, False], "substring_exact_match": [True, True], "input_len": [8000, 8100],
                    "output_len": [5, 6]},
        "averaged_metrics": {"exact_match": 50.0, "substring_exact_match": 100.0, "input_len": 8050.0,
                             "output_len": 5.5},
        "throughput": 1.5,
    } | changes  # fmt: skip


HELMET_NAME = "{dataset}_v1_test_in{length}_size100_shots2_sampFalsemax100min0t0.0p1.0_chatFalse_42.json"


def helmet_name(dataset="json_kv", length=8192):
    return HELMET_NAME.format(dataset=dataset, length=length)


def test_helmet_is_a_data_set_at_a_length_in_percent(tmp_path):
    (results,) = read_results(write(tmp_path / helmet_name(), helmet()), "helmet")
    assert rows(results.rows) == [
        ("helmet", "json_kv", 8192, "exact_match", 50.0, 2, None),
        ("helmet", "json_kv", 8192, "substring_exact_match", 100.0, 2, None),
    ]
    assert results.rows["checkpoint"].to_list() == ["/weights/hf-1"] * 2
    assert results.left_out == ()


def test_helmet_of_a_model_that_thinks_is_told_by_its_nominal_length(tmp_path):
    content = helmet(args={"input_max_length": 8192 + 32768, "thinking": True})
    assert set(read_probes(write(tmp_path / helmet_name(), content), "helmet")["length"]) == {8192}
    with pytest.raises(LccpError, match=r"the name says 8192 tokens, args\.input_max_length 40960; mend the wrong one"):
        read_probes(write(tmp_path / helmet_name(), helmet(args={"input_max_length": 40960})), "helmet")


def test_a_folder_of_helmet_is_read_by_the_files_that_have_the_metrics(tmp_path, run):
    folder = tmp_path / "out" / "hf-1"
    write(folder / helmet_name(), helmet())
    write(folder / f"{helmet_name()}.score", {"exact_match": 50.0})  # the same as in the file beside it
    judged = helmet(args={"datasets": "narrativeqa"})
    write(folder / helmet_name("narrativeqa"), judged)
    judged["averaged_metrics"]["gpt-4-score"] = 1.5
    write(folder / helmet_name("narrativeqa").replace(".json", "-gpt4eval_o.json"), judged)
    write(folder / helmet_name("alce_asqa"), helmet(args={"datasets": "alce_asqa"}))
    write(folder / f"{helmet_name('alce_asqa')}.score", {"length": 60.0, "str_em": 20.0})
    write(folder / "notes.json", {"mine": 1})
    write(folder / "torn.json", "{")
    frame = import_probes(run.path, "helmet", tmp_path / "out")
    assert frame.select("checkpoint", "subset", "metric", "score", "n").rows() == [
        ("step-1", "alce_asqa", "str_em", 20.0, 2),
        ("step-1", "json_kv", "exact_match", 50.0, 2),
        ("step-1", "json_kv", "substring_exact_match", 100.0, 2),
        ("step-1", "narrativeqa", "exact_match", 50.0, 2),
        ("step-1", "narrativeqa", "substring_exact_match", 100.0, 2),
        ("step-1", "narrativeqa", "gpt-4-score", 1.5, None),
    ]
    imports = Run.open(run.path).manifest["imports"]
    assert len({record["sha256"] for record in imports}) == 3
    assert sorted(part.stem for part in (run.path / "probes").iterdir()) == [
        "helmet-step-1-alce_asqa-8192", "helmet-step-1-json_kv-8192", "helmet-step-1-narrativeqa-8192",
    ]  # fmt: skip
    # A folder that grew is imported again: what is there stays, what is new is added.
    write(folder / helmet_name(length=16384), helmet(args={"input_max_length": 16384}))
    before = {part: part.stat().st_mtime_ns for part in (run.path / "probes").iterdir()}
    import_probes(run.path, "helmet", tmp_path / "out")
    assert all(part.stat().st_mtime_ns == time for part, time in before.items())
    assert Run.open(run.path).manifest["imports"][:3] == imports
    assert len(Run.open(run.path).manifest["imports"]) == 4


RULER = "0,1,2,3\nTasks,niah_single_1,vt,qa_1\nScore,66.67,60.0,nan\nNulls,1/3,0/4,x\n"


def ruler_path(folder, model="hf-1", length="4096", name="summary.csv"):
    return folder / model / "synthetic" / length / "pred" / name


def test_ruler_is_told_by_its_path(tmp_path):
    (results,) = read_results(write(ruler_path(tmp_path), RULER), "ruler")
    assert results.rows["checkpoint"].to_list() == ["hf-1", "hf-1"]
    assert rows(results.rows) == [
        ("ruler", "niah_single_1", 4096, "score_percent", 66.67, 3, None),
        ("ruler", "vt", 4096, "score_percent", 60.0, 4, None),
    ]
    assert results.left_out == ("qa_1 score (nan)",)


def test_ruler_is_told_by_options_where_its_path_does_not(tmp_path):
    file = write(tmp_path / "summary.csv", RULER.partition("\n")[2])  # also without the line of column numbers
    with pytest.raises(LccpError, match=r"does not tell the context length \(looked for a path MODEL/.*; say --length"):
        read_results(file, "ruler")
    with pytest.raises(LccpError, match=r"does not tell of which checkpoint .* \(looked for a path MODEL/.*; say --ch"):
        read_results(file, "ruler", length=4096)
    frame = read_probes(file, "ruler", length=8192, checkpoint="step-2")
    assert frame.select("checkpoint", "length").unique().rows() == [("step-2", 8192)]
    with pytest.raises(LccpError, match="the folder says 4096 tokens, --length 8192; leave out --length"):
        read_results(write(ruler_path(tmp_path), RULER), "ruler", length=8192)
    # A folder that is no number tells no length, and a folder that is not RULER's tells no model.
    four = write(ruler_path(tmp_path, length="4K"), RULER)
    assert set(read_probes(four, "ruler", length=4096)["checkpoint"]) == {"hf-1"}
    other = write(tmp_path / "mine" / "4096" / "pred" / "summary.csv", RULER)
    assert set(read_probes(other, "ruler", checkpoint="x")["length"]) == {4096}
    with pytest.raises(LccpError, match="say --checkpoint NAME"):
        read_probes(other, "ruler")


def test_a_tree_of_ruler_holds_models_and_lengths(tmp_path, run, lccp):
    for model, length in (("hf-1", "4096"), ("hf-1", "8192"), ("hf-2", "4096")):
        write(ruler_path(tmp_path / "out", model, length), RULER)  # the very same numbers
    write(ruler_path(tmp_path / "out", name="summary-vt.csv"), "0,1\nTasks,vt\nScore,60.0\nNulls,0/4\n")
    write(ruler_path(tmp_path / "out", "hf-2", "8192", "summary-vt.csv"), "0,1\nTasks,vt\nScore,10.0\nNulls,0/4\n")
    write(ruler_path(tmp_path / "out", name="submission.csv"), "Task,ID,Prediction\n")
    for _ in range(2):
        code, out, err = lccp("import", "ruler", tmp_path / "out", "--into", run.path)
        assert (code, len(out.splitlines())) == (0, 8)
        assert "kept in" in err
        assert Run.open(run.path).probes.collect().select("checkpoint", "length", "subset", "score").rows() == [
            ("step-1", 4096, "niah_single_1", 66.67), ("step-1", 4096, "vt", 60.0),
            ("step-1", 8192, "niah_single_1", 66.67), ("step-1", 8192, "vt", 60.0),
            ("step-2", 4096, "niah_single_1", 66.67), ("step-2", 4096, "vt", 60.0),
            ("step-2", 8192, "vt", 10.0),
        ]  # fmt: skip
        assert sorted(part.stem for part in (run.path / "probes").iterdir()) == [
            "ruler-step-1-4096", "ruler-step-1-8192", "ruler-step-2-4096", "ruler-step-2-8192-vt",
        ]  # fmt: skip
        assert len(Run.open(run.path).manifest["imports"]) == 4
    with pytest.raises(
        LccpError, match=r"--checkpoint step-1: .*out has results of several: hf-1, hf-2; .* --map THEI"
    ):
        read_results(tmp_path / "out", "ruler", checkpoint="step-1")
    with pytest.raises(LccpError, match="--name x: there are 4 files, and each needs its own; leave out --name"):
        import_probes(run.path, "ruler", tmp_path / "out", name="x")


OPENCOMPASS = """dataset,version,metric,mode,hf-1,hf-2,reference
--------- Long ---------,-,-,-,-,-,-
ruler_4k,-,naive_average,gen,81.25,-,90.00
niah,d3a1e2,score,gen,50.00,75.00,100.00
"""


def test_opencompass_has_a_column_per_model(tmp_path, run):
    (results,) = read_results(write(tmp_path / "summary_1.csv", OPENCOMPASS), "opencompass")
    assert results.rows.select("checkpoint", "benchmark", "metric", "score").rows() == [
        ("hf-1", "ruler_4k", "naive_average", 81.25), ("reference", "ruler_4k", "naive_average", 90.0),
        ("hf-1", "niah", "score", 50.0), ("hf-2", "niah", "score", 75.0), ("reference", "niah", "score", 100.0),
    ]  # fmt: skip
    assert results.left_out == ("--------- Long --------- (-: not run)", "ruler_4k naive_average of hf-2 (-)")
    with pytest.raises(LccpError, match=r"'reference' matches none of .*: step-0, step-1, step-2; say which one with"):
        add_results(run.path, [results])
    assert not (run.path / "probes").exists()
    added = add_results(run.path, [results], mapping={"reference": ""})  # no checkpoint of this run
    assert added.names == ("opencompass-summary_1",)
    assert added.probes["checkpoint"].to_list() == ["step-1", "step-1", "step-2"]
    (record,) = Run.open(run.path).manifest["imports"]
    assert record["checkpoints"] == {"hf-1": "step-1", "hf-2": "step-2"}
    assert record["left_out"][-1] == "all of reference (--map reference=)"
    with pytest.raises(LccpError, match="--map leaves out all checkpoints of the file; keep one"):
        add_results(run.path, [results], mapping={"reference": "", "hf-1": "", "hf-2": ""})


@pytest.mark.parametrize("copied", [False, True])
def test_a_file_imported_twice_changes_nothing(tmp_path, run, copied):
    file = write(tmp_path / "results_1.json", lm_eval())
    first = import_probes(run.path, "lm-eval", file)
    manifest = Run.open(run.path).manifest
    again = shutil.copy(file, tmp_path / "other.json") if copied else file
    assert import_probes(run.path, "lm-eval", again).equals(first)
    assert Run.open(run.path).manifest == manifest
    assert [part.stem for part in (run.path / "probes").iterdir()] == ["lm-eval-step-1-results_1"]


def test_another_result_for_the_same_names_both_files(tmp_path, run):
    import_probes(run.path, "lm-eval", write(tmp_path / "first.json", lm_eval()))
    other = lm_eval()
    other["results"] = {"recall_b": {"acc,none": 0.7}}
    other["groups"] = {}
    file = write(tmp_path / "second.json", other)
    message = (
        r"second\.json: checkpoint step-1, benchmark recall, subset recall_b, metric acc is already in .*"
        r"lm-eval-step-1-first\.parquet \(from first\.json\): 0\.6 there, 0\.7 here \(1 such rows\)"
    )
    with pytest.raises(LccpError, match=message):
        import_probes(run.path, "lm-eval", file)
    # Of two files in one folder as well, and then neither is written.
    for name in ("a", "b"):
        write(tmp_path / "out" / name / "results_1.json", lm_eval(model_name="hf-2"))
    with pytest.raises(
        LccpError, match=r"b/results_1\.json: checkpoint step-2, .* already in .*a/results_1\.json: 0\.5 "
    ):
        import_probes(run.path, "lm-eval", tmp_path / "out")
    assert Run.open(run.path).probes.collect()["checkpoint"].unique().to_list() == ["step-1"]


def test_a_file_is_of_one_checkpoint_for_good(tmp_path, run):
    file = write(tmp_path / "a.json", lm_eval(model_name="theirs"))
    import_probes(run.path, "lm-eval", file, mapping={"theirs": "step-0"})
    for options in ({"mapping": {"theirs": "step-2"}}, {"checkpoint": "step-2"}):
        with pytest.raises(
            LccpError, match=r"imported before with 'theirs' as 'step-0', not 'step-2' .* delete .*probes"
        ):
            import_probes(run.path, "lm-eval", file, **options)
    import_probes(run.path, "lm-eval", file, checkpoint="step-0")  # the same said otherwise
    assert len(Run.open(run.path).manifest["imports"]) == 1
    (run.path / "probes" / "lm-eval-step-0-a.parquet").unlink()
    import_probes(run.path, "lm-eval", file, mapping={"theirs": "step-2"})
    assert set(Run.open(run.path).probes.collect()["checkpoint"]) == {"step-2"}


def test_checkpoint_says_of_what_a_file_is_that_names_none_or_another(tmp_path, run):
    nameless = lm_eval(model_name=None, config={"model_args": {}})
    file = write(tmp_path / "a.json", nameless)
    with pytest.raises(
        LccpError, match=r"does not tell .* \(looked for model_name and config\.model_args\); say --chec"
    ):
        import_probes(run.path, "lm-eval", file)
    assert set(import_probes(run.path, "lm-eval", file, checkpoint="step-2")["checkpoint"]) == {"step-2"}
    with pytest.raises(LccpError, match="checkpoint 'nope' matches none of"):
        import_probes(run.path, "lm-eval", file, checkpoint="nope")
    other = write(tmp_path / helmet_name(), helmet(args={"model_name_or_path": None}))
    with pytest.raises(LccpError, match=r"looked for args\.model_name_or_path"):
        import_probes(run.path, "helmet", other)
    assert set(import_probes(run.path, "helmet", other, checkpoint="step-0")["checkpoint"]) == {"step-0"}
    with pytest.raises(LccpError, match=r"--length is for ruler, .* not for helmet"):
        import_probes(run.path, "helmet", other, length=4096)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("lm-eval", {"a": 1, "b": 2}, "of lm-evaluation-harness: looked for the key results .*, found the keys a, b$"),
        ("lm-eval", [1], "looked for the key results with an object of metrics per task, found a list"),
        ("lm-eval", {}, "found an empty object"),
        ("lm-eval", {"results": {"t": {"acc": 0.5, "acc_stderr": 0.1}}},
         r'harness 0\.4 or later: looked for metrics named "metric,filter", found acc$'),
        ("lm-eval", lm_eval(results={"t": {"acc,none": "N/A"}}, groups={}),
         r"there is no score in it; left out: t acc,none \(N/A\)"),
        ("lm-eval", " ", "is empty; give the file to import"),
        ("lm-eval", "x,y\n", "line 1: no JSON"),
        ("helmet", lm_eval(), "of HELMET: looked for the keys args, averaged_metrics, found the keys results, "),
        ("helmet", {"args": {"seed": 1}, "averaged_metrics": {}}, "args with the key datasets, found the keys seed$"),
        ("helmet", helmet(args={"input_max_length": "long"}), 'max_length: expected a whole number of tokens, got "l'),
        ("helmet", helmet(averaged_metrics={"input_len": 3.0}), "there is no score in it$"),
        ("ruler", "a,b\n1,2\n", 'no results of RULER: looked for lines that begin with Tasks, .*, found .* "a", "1"'),
        ("ruler", "Tasks,a,b\nScore,1\n", "2 Tasks, but 1 Score"),
        ("ruler", "Tasks,a,a\nScore,1,2\n", "expected each task's name once under Tasks, got a, a"),
        ("ruler", "Tasks,a\nScore,nan\n", r"there is no score in it; left out: a score \(nan\)"),
        ("ruler", 'Tasks,"a\n', r"no CSV \("),
        ("ruler", "", "is empty"),
        ("opencompass", RULER, "line 1: no column 'dataset'; expected dataset, version, metric, mode, got 0, 1, 2, 3"),
        ("opencompass", "dataset,version,metric,mode\na,b,c,d\n", "expected a column per model after dataset, version"),
        ("opencompass", OPENCOMPASS.replace("hf-2", "hf-1"), "column 'hf-1' stands there twice"),
        ("opencompass", OPENCOMPASS.replace("75.00,", ""), "line 4: expected 7 cells"),
        ("opencompass", OPENCOMPASS.replace(",score,", ",,"), "line 4: expected the name of a data set and"),
        ("opencompass", "dataset,version,metric,mode,m\na,-,-,-,-\n", r"no score in it; left out: a \(-: not run\)"),
        ("lm_eval", {}, "unknown kind of benchmark results 'lm_eval'; known are probes-csv, probes-json, lm-eval,"),
    ],
)  # fmt: skip
def test_a_file_of_another_layout_says_what_was_looked_for(tmp_path, kind, content, message):
    file = write(tmp_path / "x", content)
    with pytest.raises(LccpError, match=message) as error:
        read_results(file, kind, length=4096 if kind == "ruler" else None)
    assert "\n" not in str(error.value)


def test_a_folder_without_results_and_a_score_without_its_file(tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in ("lm-eval", "helmet", "ruler"):
        with pytest.raises(LccpError, match=f"no results of kind {kind} in this folder; looked for"):
            read_results(tmp_path / "empty", kind)
    with pytest.raises(LccpError, match="is a folder; of kind opencompass give a file"):
        read_results(tmp_path / "empty", "opencompass")
    with pytest.raises(LccpError, match=r"says nothing of model and length; put a\.json beside it"):
        read_results(write(tmp_path / "a.json.score", {"str_em": 1.0}), "helmet")


GUESSED = {
    "lm-eval": lm_eval(),
    "helmet": helmet(),
    "ruler": RULER,
    "opencompass": OPENCOMPASS,
    "wu": {"0-1": [0.5]},
    "duo": "0.5\t0.25\n1e-3\t0.0\n",
    "heads-csv": "layer,head,score\n0,1,0.5\n",
    "probes-csv": "checkpoint,benchmark,metric,score\nstep-1,x,acc,1\n",
    "probes-json": [{"checkpoint": "step-1", "benchmark": "x", "metric": "acc", "score": 1}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_from_the_file(tmp_path, kind, lccp):
    file = write(tmp_path / "file", GUESSED[kind])
    assert guess_kind(file) == kind
    options = ["--length", 4096, "--checkpoint", "x"] if kind == "ruler" else []
    named = lccp("import", kind, file, *options)
    assert named[0] == 0
    assert lccp("import", "auto", file, *options) == lccp("import", file, *options) == named


def test_a_kind_is_not_told_where_none_or_several_fit(tmp_path, lccp):
    both = write(tmp_path / "both.json", lm_eval() | helmet())
    with pytest.raises(LccpError, match=r"both\.json: it may be any of lm-eval, helmet; name one: `lccp import KIND"):
        guess_kind(both)
    for content in ("hello\n", [1], [], {}, {"a": 1}, 3):
        with pytest.raises(
            LccpError, match=r"looks like none of the known kinds; name one: .* with wu, duo, heads-csv, "
        ):
            guess_kind(write(tmp_path / "x", content))
    (tmp_path / "out").mkdir()
    with pytest.raises(LccpError, match=r"none of the known kinds; .* with lm-eval, helmet, ruler$"):
        guess_kind(tmp_path / "out")
    write(ruler_path(tmp_path / "out"), RULER)
    assert guess_kind(tmp_path / "out") == "ruler"
    write(tmp_path / "out" / helmet_name(), helmet())
    with pytest.raises(LccpError, match="may be any of helmet, ruler"):
        guess_kind(tmp_path / "out")
    code, _, err = lccp("import", "ruler")
    assert (code, err) == (2, "lccp: import ruler: give the file too, `lccp import ruler FILE`\n")


def test_lccp_import_on_the_command_line(tmp_path, run, lccp):
    file = write(ruler_path(tmp_path, "theirs"), RULER)
    code, out, err = lccp("import", file, "--format", "json")
    assert (code, json.loads(out)["kind"], json.loads(out)["kept"], json.loads(out)["left_out"]) == (
        0,
        "ruler",
        None,
        1,
    )
    code, out, err = lccp("import", file, "--into", run.path)
    assert (code, out) == (2, "")
    assert "checkpoint 'theirs' matches none of" in err
    assert "--map 'theirs=NAME'" in err
    code, out, err = lccp("import", file, "--into", run.path, "--map", "theirs=step-2")
    assert code == 0
    assert f"file summary.csv, kind ruler, rows 2, left_out 1; kept in {run.path} as ruler-step-2-4096" in err
    code, out, err = lccp(
        "import", file, "--into", run.path, "--checkpoint", "step-1", "--name", "mine", "--format", "csv"
    )
    assert (code, out.splitlines()[1]) == (0, "step-1,10,ruler,niah_single_1,4096,score_percent,66.67,3,")
    assert (run.path / "probes" / "mine.parquet").is_file()
    heads = write(tmp_path / "a.csv", "layer,head,score\n0,1,0.5\n")
    for option, value in (("--checkpoint", "x"), ("--length", 4096), ("--map", "a=b")):
        code, _, err = lccp("import", heads, option, value)
        assert (code, f"{option} is for benchmark results" in err, "not for heads-csv" in err) == (2, True, True)
    code, _, err = lccp("import", file, "--map", "theirs=step-1")
    assert (code, "which checkpoints of a run are meant; add --into RUN" in err) == (2, True)
    code, _, err = lccp("import", "lm_eval", file)
    assert (code, "unknown kind 'lm_eval'; known are wu, " in err, "did you mean 'lm-eval'?" in err) == (2, True, True)
    code, _, err = lccp("import", file, "--into", run.path, "--map", "theirs")
    assert (code, "expected THEIRS=OURS, like step100=lccp-20K, or THEIRS= to leave it out" in err) == (2, True)


def test_real_files_of_lm_eval(run):
    toy = read_results(external("results/lm_eval_toy.json"), "lm-eval")[0]
    assert [row[:4] for row in rows(toy.rows)] == [
        ("toy", "toy_mc", None, "acc"), ("toy", "toy_mc", None, "acc_norm"), ("toy", "toy_gen", None, "exact_match"),
        ("toy", None, None, "acc"),
    ]  # fmt: skip
    assert set(toy.rows["n"]) == {3}
    assert toy.rows["stderr"][0] == pytest.approx(1 / 3)
    file = external("results/lm_eval_ruler.json")
    assert guess_kind(file) == "lm-eval"
    frame = import_probes(run.path, "lm-eval", file, mapping={"vo919f45": "step-1"})
    assert sorted(rows(frame)) == [
        ("ruler", task, 4096, "score", 0.0, 3, None) for task in ("niah_multikey_2", "niah_single_1", "ruler_vt")
    ]


def test_a_real_summary_of_ruler():
    file = external("results/ruler_summary.csv")
    assert guess_kind(file) == "ruler"
    frame = read_probes(file, "ruler", checkpoint="x", length=4096)
    assert frame.select("subset", "score", "n").rows() == [
        ("niah_single_1", 66.67, 3),
        ("vt", 60.0, 3),
        ("fwe", 55.56, 3),
    ]
