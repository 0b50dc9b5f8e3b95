"""The probe: every checkpoint asked once, interrupted or not; failures on record; mistakes told before work begins."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest

from lccp_interp.behaviour import probe as probe_module
from lccp_interp.behaviour.mixture import Length, build_mixture, find_tasks
from lccp_interp.behaviour.probe import ProbeStudy, failures, head_run, probe, results
from lccp_interp.behaviour.sft import SftRecipe, fine_tune
from lccp_interp.capture.model import load_model, load_tokenizer
from lccp_interp.dynamics import paired_heads
from lccp_interp.schema import LccpError
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import METRICS
from lccp_interp.store import PROBES_SCHEMA, Run, cases_from_frame
from lccp_interp.sweep import score
from lccp_interp.tasks.items import PromptWriter

STUDY = ProbeStudy(
    tasks=("longbio-standard", "mrcr-2needle"),
    lengths=(Length(256, 320),),
    samples=2,
    train_samples=2,
    sft=SftRecipe(epochs=1, batch_size=2),
    k=2,
)
NAMES = ["pretrain-0", "lccp-1", "lccp-2"]


@pytest.fixture(scope="module")
def scored(trajectory, tmp_path_factory):
    return score(
        trajectory, tmp_path_factory.mktemp("run") / "run", lengths=[64], depths=[50], samples=1, self_check=False
    )


@pytest.fixture
def run(scored, tmp_path) -> Run:
    shutil.copytree(scored.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(scored, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(scored.path, path)
    return probe(path, STUDY), Run.open(path)


def texts(run: Run) -> pl.DataFrame:
    parts = sorted((run.path / "generations").glob("*.parquet"))
    return pl.concat([pl.read_parquet(part) for part in parts]).sort("checkpoint", "item_id", "sample")


def test_every_checkpoint_is_asked_and_its_texts_kept(undisturbed):
    table, run = undisturbed
    assert dict(table.schema) == PROBES_SCHEMA
    assert table["checkpoint"].unique(maintain_order=True).to_list() == NAMES
    assert set(table["benchmark"]) == {"LongBio-style", "MRCR-style"}
    assert set(table["length"]) == {320}
    assert set(table["n"]) == {2}
    assert {"sft greedy", "sft pass@2", "sft best@2"} == set(table["metric"])
    written = texts(run)
    assert written.height == 3 * 4 * 3  # checkpoints x items x (greedy and two samples)
    # The table is what the texts say.
    for row in table.filter(metric="sft greedy").iter_rows(named=True):
        own = written.filter(
            pl.col("sample").is_null(), checkpoint=row["checkpoint"], benchmark=row["benchmark"], subset=row["subset"]
        )
        assert own["score"].mean() == pytest.approx(row["score"])
    study = run.manifest["probe_studies"][0]
    assert (study["name"], study["n_items"], study["n_training_items"]) == ("sft", 4, 4)
    assert study["config"] == STUDY.config()


def test_interrupted_and_resumed_equals_undisturbed(run, undisturbed, monkeypatch):
    table, whole = undisturbed
    original = probe_module.fine_tune
    calls = []

    def die_at_the_second(*args, **kwargs):
        calls.append(args[0].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(probe_module, "fine_tune", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        probe(run, STUDY)
    assert results(Run.open(run.path), "sft")["checkpoint"].unique().to_list() == ["pretrain-0"]
    told = []
    again = probe(run, STUDY, progress=lambda *now: told.append(now))
    assert calls == ["pretrain-0", "lccp-1", "lccp-1", "lccp-2"]
    assert again.equals(table)
    assert texts(run).equals(texts(whole))
    assert told[-1][0] == told[-1][1] > 0
    assert [now[0] for now in told] == sorted(now[0] for now in told)
    # Once more: nothing is loaded.
    assert probe(run, STUDY).equals(table)
    assert len(calls) == 4


def test_the_order_of_checkpoints_does_not_matter(run, undisturbed):
    probe(run, STUDY, checkpoints=["lccp-2"])
    assert probe(run, STUDY).equals(undisturbed[0])


def test_a_diverged_checkpoint_is_on_record_and_the_others_go_on(run, undisturbed, monkeypatch):
    original = probe_module.fine_tune

    def burn(model, items, recipe, **options):
        if model.name == "lccp-1":
            recipe = SftRecipe(epochs=8, learning_rate=50.0, batch_size=1, max_grad_norm=1e9)
        return original(model, items, recipe, **options)

    monkeypatch.setattr(probe_module, "fine_tune", burn)
    table = probe(run, STUDY)
    assert table["checkpoint"].unique(maintain_order=True).to_list() == ["pretrain-0", "lccp-2"]
    assert list(failures(run, "sft")) == ["lccp-1"]
    assert "fine-tuning diverged, its loss went from" in failures(run, "sft")["lccp-1"]
    record = json.loads((run.path / "probes" / "sft-lccp-1.failed.json").read_text())
    assert float(record["loss_nats"]) > 5 or record["loss_nats"] == "nan"
    # It is not tried again unless asked for.
    monkeypatch.setattr(probe_module, "fine_tune", original)
    assert probe(run, STUDY).equals(table)
    assert probe(run, STUDY, retry=True).equals(undisturbed[0])
    assert failures(run, "sft") == {}


def test_without_fine_tuning_and_with_kept_adapters(run):
    table = probe(
        run,
        ProbeStudy(name="base", tasks=("longbio-standard",), lengths=(Length(256, 256),), samples=1, sft=None, k=0),
        checkpoints=["lccp-2"],
    )
    assert table["metric"].to_list() == ["base greedy"]
    lora = ProbeStudy(
        name="lora",
        tasks=("longbio-standard",),
        lengths=(Length(256, 256),),
        samples=1,
        train_samples=1,
        sft=SftRecipe(method="lora", lora_rank=2),
        k=0,
    )
    probe(run, lora, checkpoints=["lccp-2"], keep=True)
    assert (run.path / "sft" / "lora" / "lccp-2" / "adapter_model.safetensors").is_file()
    assert set(Run.open(run.path).probes.collect()["metric"]) == {"base greedy", "lora greedy"}


def test_heads_behind_fine_tuning_stand_beside_those_before(run, undisturbed, monkeypatch):
    probe(run, STUDY, checkpoints=["lccp-2"])
    n_answers = texts(run).height
    told = []
    probe(run, STUDY, checkpoints=["lccp-1", "lccp-2"], heads=True, progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    assert max(now[0] for now in told) == told[-1][1]
    assert texts(run).height == 2 * n_answers
    assert results(Run.open(run.path), "sft").equals(
        undisturbed[0].filter(pl.col("checkpoint").is_in(["lccp-1", "lccp-2"]))
    )
    after = Run.open(head_run(run, "sft"))
    assert after.checkpoints["name"].to_list() == ["lccp-1", "lccp-2"]
    table = paired_heads(run, after)
    assert table["checkpoint"].unique(maintain_order=True).to_list() == ["lccp-1", "lccp-2"]
    assert table.height == 2 * 12
    # Its heads are those of the weights that were kept.
    model = fine_tune(
        load_model(run.checkpoints.filter(name="lccp-1")["path"][0]),
        probe_module._items(PromptWriter(load_tokenizer(run.checkpoints["path"][0])), STUDY)[1],
        STUDY.sft,
    ).model
    case = cases_from_frame(run.cases)[0]
    expected = score_cases(model, [case], {"retrieval": METRICS["retrieval"]})[0].scores["retrieval"]
    held = after.scores.filter(checkpoint="lccp-1", metric="retrieval").collect().sort("layer", "head")["value"]
    assert held.to_list() == expected.flatten().tolist()
    # Nothing is done twice.
    monkeypatch.setattr(probe_module, "fine_tune", lambda *a, **o: pytest.fail("fine-tuned again"))
    probe(run, STUDY, checkpoints=["lccp-1", "lccp-2"], heads=True)
    with pytest.raises(LccpError, match="heads are scored behind fine-tuning"):
        probe(run, ProbeStudy(name="base", sft=None), heads=True)


def test_official_data_is_asked_and_not_trained_on(run, tmp_path):
    rows = [{"index": i, "input": f"Mara enjoys chess {i}.", "outputs": ["chess"], "length": 9} for i in range(3)]
    folder = tmp_path / "4096" / "qa_1"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"name": "official", "lengths": (Length(256, 256),), "samples": 1, "k": 0, "data": (f"ruler:{folder}",)}
    study = ProbeStudy(tasks=(), sft=None, **options)
    table = probe(run, study, checkpoints=["lccp-2"])
    assert table.select("benchmark", "subset", "length", "n").rows() == [("RULER", "qa_1", 4096, 3)]
    assert study.config()["data"].keys() == {"ruler:qa_1"}
    with pytest.raises(LccpError, match="official data is never trained on; name --tasks too"):
        ProbeStudy(tasks=(), **options)
    with pytest.raises(LccpError, match=r"official data 'helmet:x': write ruler:PATH or mrcr:PATH"):
        ProbeStudy(data=("helmet:x",))
    with pytest.raises(LccpError, match=r"there is nothing at .*gone"):
        ProbeStudy(data=(f"mrcr:{tmp_path / 'gone'}",))


def test_mistakes_are_told(run, undisturbed, make_checkpoint, tmp_path):
    with pytest.raises(LccpError, match=r"has no checkpoint 'lccp-9'; it has pretrain-0, lccp-1, lccp-2"):
        probe(run, STUDY, checkpoints=["lccp-9"])
    other = ProbeStudy(**{**vars_of(STUDY), "samples": 3})
    with pytest.raises(
        LccpError, match=r"holds another probe named 'sft': samples differ \(samples: there 2, asked 3\)"
    ):
        probe(undisturbed[1], other)
    with pytest.raises(LccpError, match=r"no sample of .* fits 20 tokens"):
        probe(run, ProbeStudy(**{**vars_of(STUDY), "lengths": (Length(20, 20),)}))
    moved = json.loads((run.path / "run.json").read_text())
    for entry in moved["checkpoints"]:
        entry["path"] = str(tmp_path / "gone" / entry["name"])
    (run.path / "run.json").write_text(json.dumps(moved))
    with pytest.raises(
        LccpError, match=r"checkpoint 'pretrain-0' of .* is no longer at .*; say where .* --checkpoints"
    ):
        probe(Run.open(run.path), STUDY)
    make_checkpoint("pretrain-0", seed=99, root=tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "trajectory.json").write_text(
        json.dumps({"checkpoints": [{"name": "pretrain-0", "path": "pretrain-0", "tokens_seen": 1000}]})
    )
    with pytest.raises(LccpError, match="has other weights than those scored in"):
        probe(Run.open(run.path), STUDY, checkpoints=["pretrain-0"], folders=[tmp_path / "elsewhere"])


def vars_of(study: ProbeStudy) -> dict:
    return {name: getattr(study, name) for name in study.__dataclass_fields__}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("longbo",)}, "unknown task 'longbo': families are longbio, ruler, mrcr; did you mean 'longbio'"),
        ({"tasks": ("mrcr-3needle",)}, "unknown task 'mrcr-3needle': mrcr has 2needle, 4needle, 8needle; did you mean"),
        ({"tasks": ()}, "at least one task and one length"),
        ({"k": -1}, "k must be 0 or more"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"train_samples": 0}, "leave out --sft to train none"),
        ({"name": " "}, "a probe needs a name"),
    ],
)
def test_bad_studies(changes, message):
    with pytest.raises(LccpError, match=message):
        ProbeStudy(**changes)


def test_bands_spread_their_samples(tokenizer):
    writer = PromptWriter(tokenizer)
    items = build_mixture(writer, find_tasks(["longbio-standard"]), [Length(256, 512)], samples=5)
    assert [item.length for item in items] == [512] * 5
    sizes = [len(item.prompt_ids) + item.max_new_tokens for item in items]
    assert all(size <= limit for size, limit in zip(sizes, [256, 320, 384, 448, 512], strict=True))
    assert sizes == sorted(sizes)
    assert len({item.item_id for item in items}) == 5
    with pytest.raises(LccpError, match="a length is a number of tokens or a band"):
        Length.parse("512-256")
    with pytest.raises(LccpError, match="unknown material 'french'; known: auto, english, organism"):
        build_mixture(writer, find_tasks(["longbio"]), [Length(256, 256)], samples=1, material="french")


def test_items_do_not_depend_on_the_company_they_keep(tokenizer):
    writer = PromptWriter(tokenizer)
    alone = build_mixture(writer, find_tasks(["mrcr-2needle"]), [Length(300, 300)], samples=2)
    together = build_mixture(
        PromptWriter(tokenizer),
        find_tasks(["longbio", "mrcr-2needle"]),
        [Length(256, 256), Length(300, 300)],
        samples=3,
    )
    by_id = {item.item_id: item for item in together}
    assert all(by_id[item.item_id] == item for item in alone)


def test_the_command(lccp, run, undisturbed):
    asked = ("--sft", "--tasks", "longbio-standard,mrcr-2needle", "--lengths", "256-320", "--samples", "2")
    options = (*asked, "--train-samples", "2", "--epochs", "1", "--batch-size", "2", "--k", "2")
    code, out, err = lccp("probe", run.path, *options, "--only", "lccp-2", "--format", "json")
    assert code == 0, err
    records = json.loads(out)
    expected = undisturbed[0].filter(checkpoint="lccp-2")
    assert [record["score"] for record in records] == expected["score"].to_list()
    assert all(record["ci_low"] <= record["score"] <= record["ci_high"] for record in records)
    code, out, _ = lccp("probe", run.path, "--corpus", "stories", "--lengths", "96", "--documents", "2")
    assert code == 0
    assert "corpus-ppl" in out
    code, _, err = lccp("probe", run.path, "--sft", "--corpus", "stories")
    assert code == 2
    assert "take the checkpoints as they are; leave out --sft" in err
    # By default the paper's band: from half to all of the longest length, here too short for any item.
    code, _, err = lccp("probe", run.path, "--name", "band")
    assert code == 2
    assert "fits 32 tokens" in err
