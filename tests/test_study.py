"""Studies: the file and its mistakes, stages that do only what is missing, what may change, and how far a run is."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from lccp_interp.interventions.causal import ablate_heads
from lccp_interp.schema import Checkpoint, LccpError
from lccp_interp.store import Run, driving
from lccp_interp.study import check_study, planned_stages, read_study, run_status, run_study, stages
from lccp_interp.study.stages import chosen_names
from lccp_interp.study.template import TEMPLATE
from lccp_interp.sweep import Access

SMALL = """\
out: run
checkpoints: {folder}
tasks:
  - task: niah
    lengths: [64, 128]
    depths: [0, 100]
    samples: 2
metrics: [retrieval]
figures: false
report: false
"""


def written(tmp_path, text, name="study.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def told(tmp_path, text) -> list[str]:
    path = written(tmp_path, text)
    with pytest.raises(LccpError) as caught:
        read_study(path)
    return [line.replace(str(path), "FILE") for line in str(caught.value).splitlines()]


def silent(study, **options):
    return run_study(study, bar=lambda name: contextlib.nullcontext(lambda done, total, message: None), **options)


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_defaults_are_those_of_the_calls():
    from lccp_interp.behaviour.probe import ProbeStudy
    from lccp_interp.behaviour.sft import SftRecipe
    from lccp_interp.study import form
    from lccp_interp.sweep import DEFAULT_METRICS, Execution

    study = check_study({"out": "a", "checkpoints": "b", "tasks": [{"task": "niah"}]})
    assert tuple(study.metrics) == DEFAULT_METRICS
    own, theirs = study.execution, Execution()
    for name in type(own).model_fields:
        assert getattr(own, name) == getattr(theirs, name), name
    probe, asked = form.AskProbe(probe="ask", lengths=["512-1024"]), ProbeStudy()
    assert probe.own_name == asked.name
    assert [str(length) for length in asked.lengths] == probe.lengths
    for name in ("samples", "train_samples", "k", "temperature", "chat", "material"):
        assert getattr(probe, name) == getattr(asked, name), name
    for name, field in form.Sft.model_fields.items():
        assert field.default == getattr(SftRecipe(), name), name


def test_the_template_is_a_study_and_so_is_what_it_comments_out(tmp_path):
    study = read_study(written(tmp_path, TEMPLATE))
    assert study.checkpoints.sources == ["bundled"]
    assert study.out == str(tmp_path / "runs" / "study")
    assert study.folder(0) == ""
    lines = []
    for line in TEMPLATE.splitlines()[3:]:
        body = line.lstrip(" ")
        # A comment that is a setting: "# key: value" or "# - key: value", not one that goes on in words.
        setting = body.removeprefix("# ")
        is_setting = (
            body.startswith("# ") and setting.lstrip("- ").partition(":")[0].strip("- ").replace("_", "").isalpha()
        )
        if is_setting and ":" in setting:
            line = line[: len(line) - len(body)] + setting
        lines.append(line.replace("probes: []", "probes:").replace("ablations: []", "ablations:"))
    full = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    study = read_study(written(tmp_path, full, "full.yaml"))
    assert [task.task for task in study.tasks] == ["niah", "interference", "longbio"]
    assert [probe.probe for probe in study.probes] == ["ask", "corpus", "lm-eval"]
    assert study.ablations[0].k == [1, 2, 4]
    assert study.execution.workers == 4
    assert study.checkpoints.tokens == {"step-100": 1_200_000_000}
    assert study.tasks[0].needles == str(tmp_path / "needles.jsonl")


def test_mistakes_are_told_all_at_once_with_their_lines(tmp_path):
    text = """\
out: run
checkpoints: ckpts
tasks:
  - task: niah
    lenghts: [64]
    depths: [0, 150]
  - task: nih
mode: teacher-forced
metrics: []
probes:
  - probe: ask
    lengths: [much]
    sft: {method: qlora}
execution:
  workers: 0
  executor: rey
"""
    assert told(tmp_path, text) == [
        "FILE:5: tasks[1].lenghts: unknown key; did you mean 'lengths'? known: name, checkpoints, samples, metrics, "
        "needles, haystack, prompt, chat, task, lengths, depths",
        "FILE:6: tasks[1].depths[2]: got 150; input should be less than or equal to 100",
        "FILE:7: tasks[2]: got 'nih'; task is one of 'niah', 'interference', 'longbio'",
        "FILE:8: mode: got 'teacher-forced'; allowed: 'teacher_forced' or 'generate'",
        "FILE:9: metrics: got []; list should have at least 1 item after validation, not 0",
        "FILE:12: probes[1].lengths[1]: 'much' is no number of tokens; write it like 4096, 1.2M or 20B",
        "FILE:13: probes[1].sft.method: got 'qlora'; allowed: 'auto', 'full' or 'lora'",
        "FILE:15: execution.workers: got 0; input should be greater than or equal to 1",
        "FILE:16: execution.executor: got 'rey'; allowed: 'here', 'pool', 'ray' or 'slurm'",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("out: a\nout: b\n", "FILE:2: 'out' stands twice, first in line 1; keep one"),
        ("out: [a\n", "FILE:2: no YAML: expected ',' or ']', but got '<stream end>'; mend the line"),
        ("- a\n", "FILE holds no study: expected keys like out, checkpoints, tasks (`lccp init` writes one)"),
        ("out: a\ntasks: [{task: niah}]\n", "FILE: checkpoints: is missing; give it"),
        ("out: a\ncheckpoints: b\ntasks: [{lengths: [64]}]\n",
         "FILE:3: tasks[1]: it has no 'task'; task is one of 'niah', 'interference', 'longbio'"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}, {task: longbio}, {task: longbio}]\n",
         "FILE: two tasks are called 'longbio'; give one of them a name of its own"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah, lengths: [64, 1K]}]\nfigures: {length: 1024}\n",
         "FILE: figures: length 1024 is not among those of the first task: 64, 1000"),
        ("out: a\ncheckpoints: b\ntasks: [{task: interference}]\nablations: [{length: 64}]\n",
         "FILE: ablations: length 64 is not among those of the first task: none"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah, name: ../up}]\n",
         "FILE:3: tasks[1].name: got '../up'; string should match pattern"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nexecution: {executor: ray, ray_address: evil:1}\n",
         "FILE:4: execution.ray_address: unknown key"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nexecution: {trust_remote_code: true}\n",
         "FILE:4: execution.trust_remote_code: unknown key; known: device"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nexecution: {executor: slurm, slurm: {setup: [rm -rf x]}}\n",
         "FILE:4: execution.slurm.setup: got 'setup'; allowed: 'cluster'"),
        ('out: a\ncheckpoints: b\ntasks: [{task: niah}]\nexecution: {executor: slurm, slurm: {gres: "a\\nrm x"}}\n',
         "FILE:4: execution.slurm.gres: got 'a\\nrm x'; string should match pattern"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nprobes: [{probe: ask, lengths: [64], tasks: [longbi]}]\n",
         "FILE:4: probes[1].tasks: unknown task 'longbi': families are longbio, ruler, mrcr; did you mean 'longbio'?"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nprobes: [{probe: ask, lengths: [9], sft: false, keep: on}]\n",
         "FILE:4: probes[1]: heads and keep are about what fine-tuning made; take sft: true, or leave them out"),
        ("out: a\n? [b]\n: c\n", "FILE:2: a key has to be a plain text; mend the line"),
        ("out: a\ncheckpoints: b\ntasks: [{task: niah}]\nmetrics: [!!python/name:os.system ]\n",
         "FILE:4: no YAML: could not determine a constructor for the tag"),
    ],
)  # fmt: skip
def test_each_mistake_by_itself(tmp_path, text, words):
    assert told(tmp_path, text)[0].startswith(words)


def test_a_harness_takes_no_tasks_from_a_study_file(tmp_path):
    text = "out: a\ncheckpoints: b\ntasks: [{task: niah}]\nprobes:\n  - probe: lm-eval\n    tasks: [mine]\n"
    read_study(written(tmp_path, text))
    assert told(tmp_path, text + "    include_path: tasks/\n") == [
        "FILE:7: probes[1].include_path: unknown key; known: probe, checkpoints, tasks, num_fewshot, limit, batch_size"
    ]


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(LccpError, match=r"study file .*none\.yaml: No such file.*`lccp init .*none\.yaml`"):
        read_study(tmp_path / "none.yaml")


def test_paths_begin_at_the_file_and_repositories_stay(tmp_path):
    (tmp_path / "ckpts" / "step-1").mkdir(parents=True)
    text = """\
out: run
checkpoints: {sources: [ckpts, "ckpts/step-*", org/model@step*, ~/x, bundled2]}
tasks: [{task: niah, needles: n.jsonl, haystack: /essays}]
probes: [{probe: corpus, corpora: [books, stories]}, {probe: ask, lengths: [64], data: ["ruler:r.jsonl"], tasks: []}]
"""
    study = read_study(written(tmp_path, text))
    assert study.checkpoints.sources == [
        str(tmp_path / "ckpts"), str(tmp_path / "ckpts/step-*"), "org/model@step*", str(Path.home() / "x"),
        str(tmp_path / "bundled2"),
    ]  # fmt: skip
    assert (study.tasks[0].needles, study.tasks[0].haystack) == (str(tmp_path / "n.jsonl"), "/essays")
    assert study.probes[0].corpora == [str(tmp_path / "books"), "stories"]
    assert study.probes[1].data == [f"ruler:{tmp_path / 'r.jsonl'}"]
    assert read_study(tmp_path / "study.yaml", out="elsewhere").out == str(Path("elsewhere").absolute())


def test_a_stage_takes_checkpoints_from_the_base_on():
    six = [Checkpoint(str(i), Path(), i, "pretrain" if i < 2 else "lccp") for i in range(6)]
    assert chosen_names(six, "all") == ["1", "2", "3", "4", "5"]
    assert chosen_names(six, "ends") == ["1", "5"]
    assert chosen_names(six, "last") == ["5"]
    assert chosen_names(six, 3) == ["1", "3", "5"]
    assert chosen_names(six, 9) == ["1", "2", "3", "4", "5"]
    assert chosen_names(six, ["0", "4"]) == ["0", "4"]
    with pytest.raises(LccpError, match=r"no checkpoint '7'; the study has 0, 1, 2, 3, 4, 5"):
        chosen_names(six, ["7"])


def test_run_again_does_nothing_and_a_missing_part_alone_is_redone(trajectory, tmp_path):
    study = read_study(written(tmp_path, SMALL.format(folder=trajectory)))
    run = silent(study)
    before = stamps(run.path)
    assert len(before) == 1 + 2 * 3
    silent(study)
    assert stamps(run.path) == before
    lost = run.path / "scores" / "lccp-1.0000.parquet"
    content = lost.read_bytes()
    lost.unlink()
    assert run_status(run.path)["tasks"][0]["units_done"] == 2
    silent(study)
    changed = {name for name, stamp in stamps(run.path).items() if before[name] != stamp}
    assert changed == {"scores/lccp-1.0000.parquet", "outcomes/lccp-1.0000.parquet"}
    assert lost.read_bytes() == content


def test_a_changed_study_says_what_changed_and_is_refused(trajectory, tmp_path):
    text = SMALL.format(folder=trajectory)
    silent(read_study(written(tmp_path, text)))
    before = stamps(tmp_path / "run")
    for old, new, words in (
        ("samples: 2", "samples: 3", "tasks.first.samples was 2 and is now 3"),
        ("[retrieval]", "[retrieval, copy]", 'metrics was ["retrieval"] and is now ["retrieval", "copy"]'),
        ("task: niah", "task: longbio", 'tasks.first.task was "niah" and is now "longbio"'),
    ):
        with pytest.raises(LccpError) as caught:
            silent(read_study(written(tmp_path, text.replace(old, new))))
        assert words in str(caught.value)
        assert "holds another study, so that results would mix" in str(caught.value)
        assert str(caught.value).endswith("choose another out, or take the change back")
    assert stamps(tmp_path / "run") == before
    # What is added, or is only about how the work is done, goes on.
    more = text + "execution: {chunk_tokens: 64, sharing: off}\n"
    more = more.replace(
        "metrics:", "  - {task: longbio, lengths: [320], depths: [50], samples: 1, checkpoints: last}\nmetrics:"
    )
    silent(read_study(written(tmp_path, more)))
    assert Run.open(tmp_path / "run" / "longbio").checkpoints["name"].to_list() == ["lccp-2"]
    after = stamps(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    kept = json.loads((tmp_path / "run" / "study.json").read_text())
    assert [task["task"] for task in kept["study"]["tasks"]] == ["niah", "longbio"]
    assert kept["begun"] <= kept["changed"]


def test_a_folder_of_other_files_is_left_alone(trajectory, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    with pytest.raises(LccpError, match=r"holds files but no run\.json"):
        silent(read_study(written(tmp_path, SMALL.format(folder=trajectory))))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_every_kind_of_stage_is_planned_in_order(trajectory, tmp_path, monkeypatch):
    text = (
        SMALL.format(folder=trajectory).replace("figures: false", "figures: true")
        + """\
probes:
  - {probe: corpus, corpora: [stories], checkpoints: last}
  - {probe: ask, tasks: [longbio-standard], lengths: [320], checkpoints: ends, heads: last}
  - {probe: ask, sft: false, tasks: [longbio-standard], lengths: [320]}
  - {probe: lm-eval, tasks: [niah_single_1]}
ablations: [{k: [1]}]
"""
    )
    there = {"trl": True, "lm_eval": True}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: (object() if there[name] else None) if name in there else find_spec(name, *more),
    )
    found = planned_stages(read_study(written(tmp_path, text)))
    assert [name for name, _ in found] == [
        "scoring", "reading", "probing", "heads after", "probing", "lm-eval", "removing heads", "figures",
    ]  # fmt: skip
    assert found[0][1] == "niah: 3 checkpoints, 2 samples"
    assert found[2][1] == "longbio-standard on 2 checkpoints after light fine-tuning"
    assert not (tmp_path / "run").exists()
    for package, extra in (("trl", "train"), ("lm_eval", "eval")):
        there[package] = False
        with pytest.raises(LccpError, match=rf"needs the package {package}; install lccp_interp\[{extra}\]"):
            planned_stages(read_study(tmp_path / "study.yaml"))
        there[package] = True


def test_without_lengths_and_depths_there_is_nothing_to_draw(trajectory, tmp_path):
    text = f"out: run\ncheckpoints: {trajectory}\nmetrics: [retrieval]\n"
    text += "tasks: [{task: interference, distances: [16], interferences: [0, 16], samples: 1}]\n"
    notes = []
    run = silent(read_study(written(tmp_path, text)), note=notes.append)
    assert notes == ["without figures and report: they are of a first task niah, here it is interference"]
    assert run.scores.collect()["checkpoint"].n_unique() == 3


def test_run_init_and_status_on_the_command_line(lccp, trajectory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lccp("init")[:2] == (0, "study.yaml: edit it, then lccp run study.yaml\n")
    code, _, err = lccp("init")
    assert (code, err) == (
        2, "lccp: study.yaml is there already; choose another name, or write over it with --force\n",
    )  # fmt: skip
    path = written(tmp_path, SMALL.format(folder=trajectory))
    code, out, _ = lccp("run", path, "--dry-run", "--format", "json")
    assert json.loads(out) == [{"stage": "scoring", "does": "niah: 3 checkpoints, 2 samples"}]
    code, out, _ = lccp("run", path)
    assert code == 0
    assert f"{tmp_path / 'run'}: 100% scored, nobody is at work" in out
    assert "3 of 3" in out
    code, out, _ = lccp("status", tmp_path / "run", "--format", "json")
    found = json.loads(out)
    assert (found["done"], found["driver"], found["eta_s"]) == (1.0, None, None)
    assert found["tasks"][0] == {
        "task": "niah", "folder": "", "units": 3, "units_done": 3, "tokens": 2304, "tokens_done": 2304,
        "checkpoints": [
            {"name": name, "tokens_seen": tokens, "units": 1, "units_done": 1}
            for name, tokens in Run.open(tmp_path / "run").checkpoints.select("name", "tokens_seen").iter_rows()
        ],
    }  # fmt: skip
    assert found["log"]
    code, out, _ = lccp("status", tmp_path / "run", "--format", "csv")
    assert out.splitlines()[0] == "task,folder,name,tokens_seen,units,units_done"
    code, _, err = lccp("status", tmp_path / "none")
    assert code == 2
    assert "no run at" in err


def test_status_while_somebody_is_at_work(trajectory, tmp_path):
    run = silent(read_study(written(tmp_path, SMALL.format(folder=trajectory))))
    (run.path / "scores" / "lccp-2.0000.parquet").unlink()
    with driving(run.path):
        found = run_status(run.path)
    assert found["driver"]["pid"]
    # Two units of three were just done; so the third may take about half of what they took.
    assert 0 < found["eta_s"] < 600
    assert found["done"] == pytest.approx(2 / 3)
    assert run_status(run.path)["driver"] is None


def test_a_study_that_could_not_begin_may_be_mended(lccp, trajectory, tmp_path):
    """What was asked and never done binds nobody, wherever it was mistaken."""
    text = SMALL.format(folder=trajectory)
    with pytest.raises(LccpError, match=r"unknown metric 'retreival'.*did you mean 'retrieval'"):
        silent(read_study(written(tmp_path, text.replace("[retrieval]", "[retreival]"))))
    assert not (tmp_path / "run").exists()
    with pytest.raises(LccpError):
        silent(read_study(written(tmp_path, text.replace("[64, 128]", "[2, 128]"))))  # found out by the first task
    later = text.replace("metrics:", "  - {task: longbio, lengths: [8], depths: [50], samples: 1}\nmetrics:")
    with pytest.raises(LccpError):
        silent(read_study(written(tmp_path, later)))  # found out by the second task, when the first is done
    assert Run.open(tmp_path / "run").scores.collect().height
    assert run_status(tmp_path / "run")["not_begun"] == ["longbio"]
    assert "not begun yet: longbio" in lccp("status", tmp_path / "run")[1]
    mended = silent(read_study(written(tmp_path, later.replace("[8]", "[320]"))))
    assert Run.open(mended.path / "longbio").scores.collect().height
    assert run_status(mended.path)["not_begun"] == []
    with pytest.raises(LccpError, match=r"tasks.longbio.lengths was \[320\] and is now \[8\]"):
        silent(read_study(written(tmp_path, later)))


def test_what_cannot_be_asked_is_refused_before_anything_is_begun(trajectory, tmp_path):
    text = SMALL.format(folder=trajectory)
    second = "  - {task: longbio, metrics: [coppy]}\nmetrics:"
    for changed, words in (
        (text.replace("metrics:", second), "unknown metric 'coppy'"),
        (text.replace("samples: 2", "samples: 2\n    needles: none.jsonl"), "none.jsonl"),
        (text + "execution: {workers: 4}\n", "workers is an option of executor pool or ray or slurm"),
    ):
        study = read_study(written(tmp_path, changed))
        for start in (silent, planned_stages):
            with pytest.raises(LccpError, match=words):
                start(study)
    assert not (tmp_path / "run").exists()


def test_needles_and_texts_of_ones_own(trajectory, tmp_path):
    needle = {"needle": "The code of Mara is 4 0 7.", "question": "What is the code of Mara?", "answer": "4 0 7."}
    (tmp_path / "needles.jsonl").write_text(json.dumps(needle) + "\n")
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "one.txt").write_text("Nothing happens here, and then it happens again. " * 80)
    texts = "samples: 2\n    needles: needles.jsonl\n    haystack: essays"
    run = silent(read_study(written(tmp_path, SMALL.format(folder=trajectory).replace("samples: 2", texts))))
    assert run.cases["length"].unique().to_list() == [64, 128]


def test_another_study_that_was_begun_meanwhile_is_not_mixed_in(trajectory, tmp_path, monkeypatch):
    text = SMALL.format(folder=trajectory)
    found = stages.study_checkpoints

    def meanwhile(study, **trust):
        monkeypatch.setattr(stages, "study_checkpoints", found)
        silent(read_study(written(tmp_path, text.replace("samples: 2", "samples: 1"), "other.yaml")))
        return found(study, **trust)

    monkeypatch.setattr(stages, "study_checkpoints", meanwhile)
    with pytest.raises(LccpError, match=r"tasks\.first\.samples was 1 and is now 2"):
        silent(read_study(written(tmp_path, text)))


def test_pickles_are_asked_again_only_if_they_are_allowed(trajectory, tmp_path):
    """In every stage, and for what is only planned."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(trajectory, folder)
    for weights in folder.glob("*/model.safetensors"):
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    text = SMALL.format(folder=folder) + "ablations: [{k: [1], n_cases: 2, n_draws: 1}]\n"
    study = read_study(written(tmp_path, text))
    for start in (silent, planned_stages):
        with pytest.raises(LccpError, match="--allow-pickle"):
            start(study)
    assert [name for name, _ in planned_stages(study, allow_pickle=True)] == ["scoring", "removing heads"]
    run = silent(study, allow_pickle=True)
    assert run_status(run.path)["ablations"]
    moved = folder.rename(tmp_path / "moved")
    again = {"k": [1], "n_cases": 1, "n_draws": 1, "folders": [moved]}
    with pytest.raises(LccpError, match="--allow-pickle"):
        ablate_heads(run.path, **again)
    assert ablate_heads(run.path, **again, access=Access(allow_pickle=True)).height


def test_names_that_a_run_needs_itself_are_refused(tmp_path):
    text = SMALL.format(folder="b").replace("metrics:", "  - {task: longbio, name: scores}\nmetrics:")
    assert told(tmp_path, text) == [
        "FILE: a task is called 'scores', as something else in a run folder is; give it another name"
    ]


def test_a_heading_without_anything_asks_for_what_is_usual(tmp_path):
    text = SMALL.format(folder="b") + "execution:\nprobes:\n"
    study = read_study(written(tmp_path, text))
    assert (study.execution.executor, study.probes) == ("here", [])
    assert told(tmp_path, text + "probbes:\n")[0].startswith("FILE:13: probbes: unknown key; did you mean 'probes'?")
    assert told(tmp_path, text.replace("out: run", "out:"))[0] == "FILE:1: out: is missing; give it"
