"""Damaged runs and every command over checkpoints: one line that names what is wrong, or a result and what it lacks.

`BAD` is the table: how a run is damaged, and what each command makes of it. Standard output is JSON or nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from synthetic import write_run

from lccp_interp.cli import main
from lccp_interp.store import PROBES_SCHEMA, Run

COMMANDS = {
    "heads": "heads",
    "compare": "compare",
    "saturation": "saturation --metric loss_nats,n_retrieval_heads,probe:RULER:acc",
    "correlate": "correlate",
    "budget": "budget --measures loss_nats,n_retrieval_heads",
}
MIDDLE = "lccp-0.5M"
PART = f"{MIDDLE}.0000.parquet"


def write_probes(path: Path, score: Callable[[int], float], change: Callable[[dict[str, Any]], Any] = dict) -> None:
    rows = [
        change({"checkpoint": name, "tokens_seen": tokens, "benchmark": "RULER", "metric": "acc", "score": score(i)})
        for i, (name, tokens) in enumerate(Run.open(path).checkpoints.select("name", "tokens_seen").rows())
    ]
    (path / "probes").mkdir(exist_ok=True)
    pl.DataFrame([row for row in rows if row], schema=PROBES_SCHEMA).write_parquet(path / "probes" / "ruler.parquet")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without a fault, with probe results; do not change it."""
    path = tmp_path_factory.mktemp("whole") / "run"
    write_run(path, lengths=(256,), n_needles=2, n_shards=1)
    write_probes(path, lambda i: 50.0 + 3 * i + i % 3)
    return path


# Damages


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads((path / "run.json").read_text())
        change(content)
        (path / "run.json").write_text(json.dumps(content))

    return damage


def entry(number: int, **fields: Any) -> Callable[[Path], None]:
    return manifest(lambda content: content["checkpoints"][number].update(fields))


def parts(table: str, change: Callable[[pl.DataFrame], pl.DataFrame], of: str = "") -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        for part in (path / table).glob(f"{of}*.parquet"):
            change(pl.read_parquet(part)).write_parquet(part)

    return damage


def scores(value: float, of: str = "", where: pl.Expr | None = None) -> Callable[[Path], None]:
    chosen = pl.lit(True) if where is None else where
    new = pl.when(chosen).then(pl.lit(value, pl.Float32)).otherwise(pl.col("value"))
    return parts("scores", lambda frame: frame.with_columns(value=new), of)


def losses(value: float, of: str = "") -> Callable[[Path], None]:
    return parts(
        "outcomes",
        lambda frame: frame.with_columns(
            answer_loss_nats=pl.Series([[value] * 3] * frame.height, dtype=pl.List(pl.Float32)),
            answer_ppl=pl.lit(value),
        ),
        of,
    )


def keep_only(*names: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest(lambda c: c.update(checkpoints=[e for e in c["checkpoints"] if e["name"] in names]))(path)
        for part in path.glob("[os]*/*.parquet"):
            if part.name.removesuffix(".0000.parquet") not in names:
                part.unlink()
        shutil.rmtree(path / "probes")

    return damage


def probes(*, score: Callable[[int], float] = lambda i: 50.0 + 3 * i + i % 3, change: Any = dict) -> Any:
    return lambda path: write_probes(path, score, change)


def cut(table: str) -> Callable[[Path], None]:
    return lambda path: (path / table / PART).write_bytes((path / table / PART).read_bytes()[:-99])


def scramble(path: Path) -> None:
    """Bytes inside a part change; it still begins and ends as a Parquet file."""
    content = bytearray((path / "scores" / PART).read_bytes())
    content[4:300] = bytes(296)
    (path / "scores" / PART).write_bytes(bytes(content))


def text(content: str) -> Callable[[Path], None]:
    return lambda path: (path / "run.json").write_text(content) and None


# The table


@dataclass(frozen=True)
class Said:
    """What a command makes of a damaged run: its exit code and what must stand on standard error ("" for silence)."""

    code: int
    message: str = ""


def refused(message: str, *commands: str) -> dict[str, Said]:
    return {command: Said(2, message) for command in commands or COMMANDS}


def told(message: str, *commands: str) -> dict[str, Said]:
    return {command: Said(0, message) for command in commands or COMMANDS}


QUIET = told("")
NO_PROBES = told("holds no probe results: .* import probe results with", "correlate")
TWINS = "checkpoints lccp-0.3M, lccp-0.4M of .* hold identical weights: they count as 2 points and are one"
SCORES_LEFT_OUT = r"scores holds 320 rows of checkpoints that run.json does not have \(lccp-0.3M\): left out; enter"
OUTCOMES_LEFT_OUT = r"outcomes holds 10 rows of checkpoints that run.json does not have \(lccp-0.3M\): left out; enter"

BAD: dict[str, tuple[Callable[[Path], object], dict[str, Said]]] = {
    "nothing": (lambda path: None, QUIET),
    "one checkpoint": (
        keep_only("lccp-1.2M"),
        told("", "heads")
        | refused("has one scored checkpoint, 'lccp-1.2M'; compare it with another run, imported:NAME or", "compare")
        | told(r"cannot be told for 2 of 2 curves: loss_nats .*\(n = 1\).*; score more checkpoints", "saturation")
        | refused("no correlation is defined .*1 checkpoints, needs 4.*; score or import more checkpoints", "correlate")
        | refused("has 1 scored checkpoints; a curve needs at least 4 to be compared: score more", "budget"),
    ),
    "three checkpoints": (
        keep_only("lccp-1.0M", "lccp-1.1M", "lccp-1.2M"),
        told("", "heads", "compare")
        | told(r"cannot be told for 2 of 2 curves: .*\(n = 3\)", "saturation")
        | refused("no correlation is defined .*3 checkpoints, needs 4", "correlate")
        | refused("has 3 scored checkpoints; a curve needs at least 4", "budget"),
    ),
    "token count twice": (
        entry(7, tokens_seen=3_900_000),
        refused("run.json: checkpoints 'lccp-0.3M' and 'lccp-0.4M' have the same tokens_seen, 3900000; give each its"),
    ),
    "name twice": (entry(7, name="lccp-0.3M"), refused("run.json: two checkpoints have the name 'lccp-0.3M'; give")),
    "no order": (manifest(lambda content: content["checkpoints"].reverse()), QUIET),
    "twins": (
        entry(7, hash=f"{6:064x}"),
        told("", "heads", "budget") | told(TWINS, "compare", "saturation", "correlate"),
    ),
    "no stage": (manifest(lambda c: [e.update(stage=None) for e in c["checkpoints"]]), QUIET),
    "no tokens": (
        manifest(lambda content: content["checkpoints"][2].pop("tokens_seen")),
        refused('checkpoint 3 of 16 has name "pretrain-2.5M" and tokens_seen null, expected a text and a whole number'),
    ),
    "negative tokens": (entry(0, tokens_seen=-5), refused("checkpoint 1 of 16 .* tokens_seen -5, expected")),
    "stage a list": (entry(0, stage=["lccp"]), refused("a checkpoint has a field of another type than expected")),
    "names for entries": (
        manifest(lambda content: content.update(checkpoints=["a"])),
        refused('checkpoint 1 of 1 has name "a" and tokens_seen null'),
    ),
    "no json": (text("schema_version: 1"), refused(r"run.json cannot be read \(Expecting value.*\); restore it, or")),
    "half a json": (text('{"schema_version": 1, "conf'), refused(r"run.json cannot be read \(Unterminated")),
    "json of another kind": (text("[1]"), refused(r"run.json cannot be read \(it is no object\); restore it, or")),
    "json without config": (text('{"schema_version": 1}'), refused(r"run.json cannot be read \(it has no 'config'\)")),
    "newer": (
        manifest(lambda content: content.update(schema_version=99)),
        refused("has schema version 99, this lccp_interp reads up to 1; upgrade lccp_interp"),
    ),
    "no scores": (
        lambda path: shutil.rmtree(path / "scores"),
        refused("holds no finished scores yet; finish it with the command that began it"),
    ),
    "empty scores": (
        lambda path: [part.unlink() for part in (path / "scores").iterdir()],
        refused("holds no finished scores yet; finish it with the command that began it"),
    ),
    "torn scores": (cut("scores"), refused(f"scores/{PART} is not a whole Parquet file; run the scoring")),
    "torn outcomes": (cut("outcomes"), refused(f"outcomes/{PART} is not a whole Parquet file; run the scoring")),
    "scrambled scores": (scramble, refused(rf"scores/{PART} cannot be read \(.*\); run the scoring command again")),
    "no value column": (
        parts("scores", lambda frame: frame.drop("value"), of=MIDDLE),
        refused(f"scores/{PART} has no column value, it has checkpoint, .*; run the scoring command again after"),
    ),
    "no perplexity column": (
        parts("outcomes", lambda frame: frame.drop("answer_ppl")),
        refused(r"outcomes/.*\.parquet has no column answer_ppl, it has .*; run the scoring command again after"),
    ),
    "no length column": (
        lambda path: pl.read_parquet(path / "cases.parquet").drop("length").write_parquet(path / "cases.parquet"),
        refused("cases.parquet has no column length, it has .*; restore it, or score into a new folder"),
    ),
    "layers as text": (
        parts("scores", lambda frame: frame.cast({"layer": pl.String}), of=MIDDLE),
        refused(f"scores/{PART} has the column layer as String, .* as Int32; run the scoring command again after"),
    ),
    "checkpoint not in run.json": (
        lambda path: (
            manifest(lambda content: content["checkpoints"].pop(6))(path),
            write_probes(path, lambda i: 50.0 + 3 * i + i % 3),
        ),
        told(SCORES_LEFT_OUT, "heads", "compare")
        | told(f"{OUTCOMES_LEFT_OUT}.*\n.*{SCORES_LEFT_OUT}", "saturation", "correlate", "budget"),
    ),
    "all checkpoints not in run.json": (
        manifest(lambda c: [e.update(name=f"x{e['name']}") for e in c["checkpoints"]]),
        refused("holds only 5120 rows of checkpoints that run.json does not have .* and 8 more", "heads", "compare")
        | refused("outcomes holds only 160 rows of checkpoints that run.json", "saturation", "correlate", "budget"),
    ),
    "scores without outcomes": (
        lambda path: (path / "outcomes" / PART).unlink(),
        told("", "heads", "compare", "saturation")
        | refused("checkpoints do not match: niah_score of the cheap metrics lacks lccp-0.5M of", "correlate")
        | told("lccp-0.5M of .* hold head scores but no outcomes: left out; finish scoring them", "budget"),
    ),
    "outcomes without scores": (
        lambda path: (path / "scores" / PART).unlink(),
        told("", "heads", "compare", "saturation", "budget")
        | refused("checkpoints do not match: n_retrieval_heads of the cheap metrics lacks lccp-0.5M of", "correlate"),
    ),
    "scores of some heads NaN": (
        scores(float("nan"), where=(pl.col("layer") == 3) & (pl.col("head") < 3)),
        QUIET | told(r"48 of 512 scores are undefined \(NaN, or no case counts\): listed last", "heads"),
    ),
    "scores of a checkpoint NaN": (
        scores(float("nan"), of=MIDDLE),
        QUIET | told("32 of 512 scores are undefined", "heads"),
    ),
    "scores of a checkpoint infinite": (
        scores(float("inf"), of=MIDDLE),
        QUIET | told("32 of 512 scores are undefined", "heads"),
    ),
    "all scores NaN": (
        scores(float("nan")),
        refused("all 512 scores of retrieval are undefined .*; look at the outcomes, or try another", "heads")
        | refused("nothing to compare: at no checkpoint is a head of retrieval defined both there and in", "compare")
        | told("", "saturation", "correlate", "budget"),
    ),
    "outcomes of a checkpoint NaN": (losses(float("nan"), of=MIDDLE), QUIET),
    "outcomes of a checkpoint infinite": (losses(float("inf"), of=MIDDLE), QUIET),
    "all losses NaN": (losses(float("nan")), QUIET),
    "no variance": (
        lambda path: (
            parts("outcomes", lambda frame: frame.with_columns(greedy_exact=True))(path),
            scores(0.0)(path),
            write_probes(path, lambda i: 50.0),
        ),
        told("", "heads", "compare", "saturation", "budget")
        | refused("no correlation is defined .*no variance.*; score or import more checkpoints", "correlate"),
    ),
    "probes of unknown checkpoints": (
        probes(change=lambda row: row | ({"checkpoint": "step-9"} if row["checkpoint"] == MIDDLE else {})),
        told("", "heads", "compare", "budget")
        | refused(
            r"probes has scores of step-9 \(1 rows\), which the run .* does not have; it has pretrain-0.5M, .*; import "
            "them anew with --map THEIRS=OURS",
            "saturation",
            "correlate",
        ),
    ),
    "probes of some checkpoints": (
        probes(change=lambda row: row if row["checkpoint"] < MIDDLE else None),
        told("", "heads", "compare", "budget")
        | told(r"cannot be told for 1 of 3 curves: probe:RULER:acc \(n = 4\)", "saturation")
        | refused("checkpoints do not match: .* and 8 more; probe results have .* with --common", "correlate"),
    ),
    "probes with other tokens": (
        probes(change=lambda row: row | {"tokens_seen": row["tokens_seen"] + 5}),
        told("", "heads", "compare", "budget")
        | refused(
            r"probes has pretrain-0.5M at 500005 tokens_seen, .*run.json at 500000 \(and 15 more checkpoints alike\)",
            "saturation",
            "correlate",
        ),
    ),
    "probes NaN": (probes(score=lambda i: float("nan") if i == 5 else i), QUIET),
    "probes all NaN": (
        probes(score=lambda i: float("nan")),
        told("", "heads", "compare", "saturation", "budget")
        | refused("no correlation is defined .*16 of 16 checkpoints undefined", "correlate"),
    ),
}  # fmt: skip


def lccp(arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lccp", *arguments.split()])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as ended:
            main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def everything(value: Any) -> list[Any]:
    """All leaves of parsed JSON."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in everything(item)]
    return [value]


@pytest.mark.parametrize("damage", BAD)
def test_a_damaged_run_is_told_in_one_line_or_read_as_far_as_it_goes(whole, damage, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "run")
    BAD[damage][0](tmp_path / "run")
    expected = (NO_PROBES if not (tmp_path / "run" / "probes").exists() else {}) | BAD[damage][1]
    for command, options in COMMANDS.items():
        said = expected[command]
        arguments = options.replace(command, f"{command} {tmp_path / 'run'}", 1)
        if not (tmp_path / "run" / "probes").exists():
            arguments = arguments.replace(",probe:RULER:acc", "")
        code, out, err = lccp(f"{arguments} --format json", monkeypatch, capsys)
        assert (code, err) == (said.code, err), f"{command}: {err}"
        assert re.search(said.message, err) if said.message else err == "", f"{command}: {err}"
        assert max(Counter(err.splitlines()).values(), default=1) == 1, f"{command} repeats itself: {err}"
        assert max(map(len, err.splitlines()), default=0) < 700 + 2 * len(str(tmp_path))
        if code == 0:
            assert json.loads(out, parse_constant=pytest.fail)
        else:
            assert out == ""
            assert err.splitlines()[-1].startswith("lccp: ")


def test_undefined_numbers_are_null_in_json_and_empty_in_csv(whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "run")
    scores(float("nan"), of=MIDDLE)(tmp_path / "run")
    records = json.loads(lccp(f"heads {tmp_path / 'run'} --format json", monkeypatch, capsys)[1])
    undefined = [record for record in records if record["checkpoint"] == MIDDLE]
    assert len(undefined) == 32
    assert {(r["score"], r["ci_low"], r["n"], r["retrieves"]) for r in undefined} == {(None, None, 0, False)}
    assert records[-32:] == undefined
    lines = lccp(f"heads {tmp_path / 'run'} --format csv", monkeypatch, capsys)[1].splitlines()
    header = lines[0].split(",")
    assert lines[-1].split(",")[header.index("score")] == ""
    assert not any(re.search(r"\b(nan|inf)\b", line, re.IGNORECASE) for line in lines)


def test_an_undefined_checkpoint_is_named_in_the_reason(whole, tmp_path, monkeypatch, capsys):
    for value in (float("nan"), float("inf")):
        shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        losses(value, of=MIDDLE)(tmp_path / "run")
        out = lccp(f"saturation {tmp_path / 'run'} --metric loss_nats --format json", monkeypatch, capsys)[1]
        assert f"undefined or not scored at {MIDDLE}" in json.loads(out)[0]["reason"]
        pairs = json.loads(lccp(f"correlate {tmp_path / 'run'} --format json", monkeypatch, capsys)[1])
        of_ppl = [pair for pair in pairs if pair["cheap"] == "answer_ppl" and pair["transform"] == "levels"]
        assert {(pair["n"], pair["reason"]) for pair in of_ppl} == {(15, "1 of 16 checkpoints undefined or missing")}


@pytest.mark.parametrize("damage", ["token count twice", "torn scores", "all checkpoints not in run.json", "no json"])
def test_report_and_figures_refuse_what_the_commands_refuse(whole, damage, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "run")
    BAD[damage][0](tmp_path / "run")
    for command in ("report", "figures"):
        code, out, err = lccp(f"{command} {tmp_path / 'run'}", monkeypatch, capsys)
        assert (code, out) == (2, "")
        # Whichever table they come upon first.
        assert any(re.search(BAD[damage][1][by].message, err) for by in ("heads", "saturation"))
    assert not (tmp_path / "run" / "report.html").exists()


def test_retrieval_heads_are_marked_and_chosen_by_threshold(whole, monkeypatch, capsys):
    def heads(options: str) -> list[dict[str, Any]]:
        return json.loads(lccp(f"heads {whole} --checkpoint last --format json {options}", monkeypatch, capsys)[1])

    records = heads("")
    assert [r["retrieves"] for r in records] == [r["score"] > 0.1 for r in records]
    assert heads("--retrieval-only") == [r for r in records if r["score"] > 0.1]
    assert {r["score"] > 0.4 for r in heads("--retrieval-only --threshold 0.4 --rule threshold")} == {True}
    code, out, err = lccp(f"heads {whole} --retrieval-only --threshold 5", monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "no head is a retrieval head (retrieval above 5); lower --threshold" in err
    for command in ("heads", "compare"):
        assert "unknown rule 'above'" in lccp(f"{command} {whole} --rule above", monkeypatch, capsys)[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_modes_are_chosen_alike_everywhere(whole, command, monkeypatch, capsys):
    arguments = COMMANDS[command].replace(command, f"{command} {whole} --mode generate", 1)
    code, out, err = lccp(arguments, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "unknown mode 'generate'" in err
    assert "known are teacher_forced" in err
