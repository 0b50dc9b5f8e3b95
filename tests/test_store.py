"""The run folder: atomic parts, refusal to mix studies, order and sharding that do not matter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lccp_interp.schema import Case, CaseResult, Checkpoint, LccpError, Span
from lccp_interp.store import (
    PROBES_SCHEMA,
    SCORES_SCHEMA,
    TABLES,
    Run,
    RunWriter,
    append_probes,
    cases_frame,
    cases_from_frame,
    part_name,
    replacing,
    result_frames,
)

CONFIG = {"task": "niah", "lengths": [8], "seed": 0}


def make_cases(n=4):
    return [
        Case(f"c{i}", "niah", 8, 0.5, f"n{i}", "h", 0, 0, (1, 2, 3, 4, 5, 6), (2, 3), Span(1, 4), Span(1, 3))
        for i in range(n)
    ]


def make_checkpoint(name="a", tokens=100, digest="00"):
    return Checkpoint(name=name, path=Path(name), tokens_seen=tokens, hash=digest)


def make_frames(checkpoint, cases, value=0.5):
    results = [
        CaseResult(
            case_id=case.case_id,
            layers=(0, 2),
            scores={"retrieval": np.full((2, 3), value, dtype=np.float32)},
            answer_loss_nats=np.array([0.5, 1.5], dtype=np.float32),
            greedy_ids=(2, 9),
        )
        for case in cases
    ]
    return result_frames(checkpoint, "teacher_forced", results, {c.case_id: c.answer_ids for c in cases})


def fill(path, *, order=(0, 1)):
    cases = make_cases()
    writer = RunWriter(path, CONFIG, cases)
    checkpoint = make_checkpoint()
    writer.add_checkpoints([checkpoint])
    for shard in order:
        scores, outcomes = make_frames(checkpoint, cases[2 * shard : 2 * shard + 2], value=shard)
        writer.append("a", shard, scores=scores, outcomes=outcomes)
    return writer


def test_tables_hold_what_was_put_in(tmp_path):
    fill(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    scores, outcomes = run.scores.collect(), run.outcomes.collect()
    assert dict(scores.schema) == SCORES_SCHEMA
    assert scores.height == 4 * 2 * 3
    assert set(scores["layer"]) == {0, 2}
    assert scores.filter(case_id="c3", layer=2, head=1)["value"].to_list() == [1.0]
    first = outcomes.row(0, named=True)
    assert first["answer_ppl"] == pytest.approx(np.exp(1.0))
    assert (first["greedy_exact"], first["token_accuracy"], first["rouge1_recall"]) == (False, 0.5, None)
    assert run.checkpoints["tokens_seen"].to_list() == [100]
    assert cases_from_frame(run.cases) == make_cases()


@pytest.mark.parametrize(
    ("written", "exact", "accuracy"),
    [((2, 3), True, 1.0), ((2, 3, 10), True, 1.0), ((2,), False, 0.5), ((2, 9, 3), False, 0.5), ((10,), False, 0.0)],
)
def test_what_a_model_wrote_is_right_if_it_begins_with_the_answer(written, exact, accuracy):
    result = CaseResult(
        case_id="c0",
        layers=(0,),
        scores={"wu": np.full((1, 2), np.nan, dtype=np.float32)},
        answer_loss_nats=np.array([0.5, 1.5], dtype=np.float32),
        greedy_ids=written,
        rouge1_recall=0.25,
        generated="blue heron",
    )
    scores, outcomes = result_frames(make_checkpoint(), "generate", [result], {"c0": (2, 3)})
    assert scores["mode"].to_list() == ["generate"] * 2
    assert scores["value"].is_nan().all()
    row = outcomes.row(0, named=True)
    assert (row["greedy_exact"], row["token_accuracy"]) == (exact, accuracy)
    assert (row["rouge1_recall"], row["generated"], row["mode"]) == (0.25, "blue heron", "generate")


def test_teacher_forced_there_is_a_token_for_each_of_the_answer():
    result = CaseResult("c0", (0,), {"wu": np.zeros((1, 1), np.float32)}, np.zeros(2, np.float32), (2,))
    with pytest.raises(ValueError, match="longer"):
        result_frames(make_checkpoint(), "teacher_forced", [result], {"c0": (2, 3)})


def test_the_order_of_writing_does_not_matter(tmp_path):
    fill(tmp_path / "one", order=(0, 1))
    fill(tmp_path / "two", order=(1, 0))
    for table in ("scores", "outcomes"):
        one, two = (getattr(Run.open(tmp_path / name), table).collect() for name in ("one", "two"))
        assert one.equals(two)


def test_the_manifest_says_how_the_run_came_to_be(tmp_path):
    fill(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["schema_version"] == 1
    assert len(manifest["config_hash"]) == 64
    assert manifest["config"] == CONFIG
    assert {"torch", "transformers", "polars"} <= set(manifest["versions"])
    assert {"created", "python", "git_commit"} <= set(manifest)


def test_reopening_resumes_and_cleans_orphans(tmp_path):
    writer = fill(tmp_path / "run", order=(0,))
    orphan = tmp_path / "run" / "scores" / ".a.0001.parquet.1.tmp"
    orphan.write_bytes(b"half")
    young = orphan.with_name(".a.0001.parquet.2.tmp")
    young.write_bytes(b"half")
    os.utime(orphan, (0, 0))
    again = RunWriter(tmp_path / "run", CONFIG, make_cases())
    assert again.is_done("a", 0)
    assert not again.is_done("a", 1)
    assert not orphan.exists()
    assert young.exists()  # its writer may still be at work
    assert again.manifest == writer.manifest


def test_branch_and_source_of_checkpoints_are_null_where_a_run_has_none(tmp_path):
    fill(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    for key in ("branch", "source"):
        manifest["checkpoints"][0].pop(key, None)
    more = {"name": "b", "path": "b", "tokens_seen": 7, "branch": "main", "source": "org/model@step7"}
    manifest["checkpoints"].append(more)
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    found = Run.open(tmp_path / "run").checkpoints.select("name", "branch", "source").rows()
    assert found == [("b", "main", "org/model@step7"), ("a", None, None)]


def test_a_unit_is_done_only_with_all_its_tables(tmp_path):
    writer = fill(tmp_path / "run", order=(0,))
    (tmp_path / "run" / "scores" / part_name("a", 0)).unlink()
    assert not writer.is_done("a", 0)


def test_another_study_is_refused_by_the_keys_that_differ(tmp_path):
    fill(tmp_path / "run")
    with pytest.raises(
        LccpError, match=r"holds another study: lengths, seed differ \(lengths: there \[8\], asked \[9\]\)"
    ):
        RunWriter(tmp_path / "run", {"task": "niah", "lengths": [9], "seed": 1}, make_cases())
    with pytest.raises(LccpError, match="holds other cases under the same options"):
        RunWriter(tmp_path / "run", CONFIG, make_cases(3))


def test_a_checkpoint_with_other_weights_is_refused(tmp_path):
    writer = fill(tmp_path / "run")
    with pytest.raises(LccpError, match=r"checkpoint 'a' was scored .* with other weights, config or tokens"):
        writer.add_checkpoints([make_checkpoint(digest="ff")])
    with pytest.raises(LccpError, match=r"'b' has 100 tokens seen, as 'a' in .* has; tell them apart"):
        writer.add_checkpoints([make_checkpoint("b", 100)])
    writer.add_checkpoints([make_checkpoint("b", 50)])
    assert Run.open(tmp_path / "run").checkpoints["name"].to_list() == ["b", "a"]


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(LccpError, match="holds files but no run"):
        RunWriter(tmp_path, CONFIG, make_cases())
    (tmp_path / "file").write_text("")
    with pytest.raises(LccpError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
        RunWriter(tmp_path / "file", CONFIG, make_cases())


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(LccpError, match=r"no run at .*lccp score CHECKPOINT... --out"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(LccpError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 1, "config": []}')
    with pytest.raises(LccpError, match="cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(LccpError, match="schema version 99, this lccp_interp reads up to 1"):
        Run.open(tmp_path)
    RunWriter(tmp_path / "empty", CONFIG, make_cases())
    with pytest.raises(LccpError, match="holds no finished scores yet"):
        _ = Run.open(tmp_path / "empty").scores


def test_a_torn_part_is_named(tmp_path):
    fill(tmp_path / "run")
    part = tmp_path / "run" / "scores" / part_name("a", 0)
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(LccpError, match=r"a\.0000\.parquet is not a whole Parquet file; run the scoring command again"):
        Run.open(tmp_path / "run").scores.collect()


def test_a_torn_part_is_done_again(tmp_path):
    writer = fill(tmp_path / "run")
    (tmp_path / "run" / "scores" / part_name("a", 0)).write_bytes(b"")
    assert not writer.is_done("a", 0)


def test_two_writers_add_to_one_run(tmp_path):
    first = fill(tmp_path / "run")
    second = RunWriter(tmp_path / "run", CONFIG, make_cases())
    first.add_checkpoints([make_checkpoint("b", 200)])
    second.add_checkpoints([make_checkpoint("c", 300)])
    assert Run.open(tmp_path / "run").checkpoints["name"].to_list() == ["a", "b", "c"]


def test_without_its_manifest_a_folder_is_no_run(tmp_path):
    fill(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(LccpError, match=r"holds files but no run\.json"):
        RunWriter(tmp_path / "run", {**CONFIG, "seed": 1}, make_cases())


def test_killed_before_the_cases_were_written(tmp_path):
    fill(tmp_path / "run")
    (tmp_path / "run" / "cases.parquet").unlink()
    RunWriter(tmp_path / "run", CONFIG, make_cases())
    assert cases_from_frame(Run.open(tmp_path / "run").cases) == make_cases()


def test_empty_tables_are_never_written(tmp_path):
    writer = fill(tmp_path / "run")
    empty = {name: pl.DataFrame(schema=schema) for name, schema in TABLES.items()}
    with pytest.raises(ValueError, match="0 rows"):
        writer.append("a", 7, **empty)


def test_replacing_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")

    def fail_halfway():
        with replacing(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(LccpError, match=r"cannot write .*x: Is a directory"), replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")


def test_part_names_never_leave_the_folder():
    assert part_name("../../etc/passwd", 0).count("/") == 0
    assert part_name("a b", 0) != part_name("a_b", 0)
    assert not part_name(".hidden", 1).startswith(".")
    assert len(part_name("x" * 300, 1)) < 120


def test_cases_survive_the_table():
    assert cases_from_frame(cases_frame(make_cases())) == make_cases()


def probe(checkpoint="a", tokens=100, subset="qa_1", length=4096, score=61.5, **other):
    row = {"benchmark": "ruler", "metric": "accuracy", "n": 500, "stderr": None} | other
    row |= {"checkpoint": checkpoint, "tokens_seen": tokens, "subset": subset, "length": length, "score": score}
    return pl.DataFrame([row], schema=PROBES_SCHEMA)


def test_probes_are_parts_of_a_run_whatever_its_study(tmp_path):
    fill(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert Run.open(tmp_path / "run").probes.collect().equals(pl.DataFrame(schema=PROBES_SCHEMA))
    first = append_probes(tmp_path / "run", "ruler", probe())
    append_probes(
        tmp_path / "run", "long/bio", probe(subset=None, length=None, score=float("nan"), benchmark="longbio")
    )
    probes = Run.open(tmp_path / "run").probes
    assert dict(probes.collect_schema()) == PROBES_SCHEMA
    assert sorted(probes.collect()["benchmark"]) == ["longbio", "ruler"]
    assert first == tmp_path / "run" / "probes" / "ruler.parquet"
    assert {path.parent for path in (tmp_path / "run" / "probes").iterdir()} == {first.parent}
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_part_of_probes_never_changes(tmp_path):
    fill(tmp_path / "run")
    part = append_probes(tmp_path / "run", "ruler", probe(score=float("nan")))
    written = part.stat().st_mtime_ns
    append_probes(tmp_path / "run", "ruler", probe(score=float("nan")))
    assert part.stat().st_mtime_ns == written
    with pytest.raises(LccpError, match=r"ruler\.parquet is there with other results; .* choose another name"):
        append_probes(tmp_path / "run", "ruler", probe())


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (probe("b"), r"has no checkpoint 'b'; it has a$"),
        (probe(tokens=7), r"checkpoint 'a' has 7 tokens, in .*run 100; mend"),
        (probe(score=None), r"row 1 has no score; give one \(an undefined score is NaN\)"),
        (pl.concat([probe("a"), probe(benchmark=None)]), "row 2 has no benchmark"),
        (pl.concat([probe(length=None)] * 2), r"checkpoint a, benchmark ruler, subset qa_1, metric accuracy is twice"),
        (probe(subset=None, length=None), r"benchmark ruler, metric accuracy is already in .*probes \(1 such rows\)"),
    ],
)
def test_probes_that_do_not_fit_the_run_are_refused(tmp_path, frame, message):
    fill(tmp_path / "run")
    append_probes(tmp_path / "run", "old", probe(subset=None, length=None))
    with pytest.raises(LccpError, match=message):
        append_probes(tmp_path / "run", "new", frame)
    assert [path.name for path in (tmp_path / "run" / "probes").iterdir()] == ["old.parquet"]


def test_probes_of_another_shape_are_a_programming_error(tmp_path):
    fill(tmp_path / "run")
    for frame in (probe().drop("stderr"), probe().clear()):
        with pytest.raises(ValueError, match="probes 'x'"):
            append_probes(tmp_path / "run", "x", frame)


def test_a_torn_part_of_probes_is_named_and_may_be_added_again(tmp_path):
    fill(tmp_path / "run")
    part = append_probes(tmp_path / "run", "ruler", probe())
    part.write_bytes(b"PAR1")
    with pytest.raises(LccpError, match=r"ruler\.parquet is not a whole Parquet file; delete it and add"):
        _ = Run.open(tmp_path / "run").probes
