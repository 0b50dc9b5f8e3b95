"""Interference: distance and interference exact under every tokenizer, and nothing else differs between cells."""

from __future__ import annotations

import itertools
import re

import polars as pl
import pytest
from external import external
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer
from typer.testing import CliRunner

from lccp_interp.cli import models
from lccp_interp.dynamics.selection import niah_cases
from lccp_interp.schema import LccpError, Needle
from lccp_interp.store import CASES_SCHEMA, TASK_COLUMNS, Run, RunWriter, cases_frame, cases_from_frame
from lccp_interp.sweep import score_grid
from lccp_interp.tasks.haystack import Haystack, read_haystack
from lccp_interp.tasks.interference import InterferenceGrid
from lccp_interp.tasks.niah import NiahGrid
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.prefixes import tokens_run, walk

CODE = Needle("The code of Mara is 4 0 7.", "What is the code of Mara?", "4 0 7")
NEEDLES = (CODE, Needle('She said: "naïve café"!', "What did she say?", 'She said: "naïve café"!'))
LAMP = "The lamp fell. A horse crossed the bridge at night! Who saw it? " * 60
CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}"


def decoded(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def parts(case, n_tail):
    """Tokens before the needle, of the needle, between it and the question, and of the question."""
    ids, end = case.prompt_ids, len(case.prompt_ids) - n_tail
    return ids[: case.needle.start], ids[case.needle.start : case.needle.end], ids[case.needle.end : end], ids[end:]


def check_law(cases, needles, tokenizer, *, n_lead=0, cue="\nQuestion: "):
    """The law: both numbers are exact, counted from the spans and from the question's first token."""
    for case in cases:
        needle = needles[int(case.needle_id[1:])]
        assert case.length == len(case.prompt_ids) + len(case.answer_ids)
        assert case.needle.start == n_lead + case.interference
        # Slow twin for the distance: the question is found as text, and every token in front of it is counted.
        question = case.needle.end + case.distance
        assert decoded(tokenizer, case.prompt_ids[question:]).startswith(cue + needle.question)
        assert decoded(tokenizer, case.prompt_ids[case.needle.start : case.needle.end]).strip() == needle.needle
        assert decoded(tokenizer, case.prompt_ids[case.source.start : case.source.end]).strip() == needle.answer
        assert decoded(tokenizer, case.answer_ids).strip() == needle.answer
        around = case.interference + case.distance
        assert case.depth_fraction == (case.interference / around if around else 0)


@pytest.mark.parametrize("prompt", ["paper", "wu"])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_law_on_real_tokenizers_and_essays(name, prompt):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    grid = InterferenceGrid(
        distances=(0, 2, 100, 1000),
        interferences=(0, 2, 333, 4096),
        samples=2,
        needles=NEEDLES,
        haystack=read_haystack(external("haystack/essays")),
        prompt=prompt,
    )
    cases = grid.build(tokenizer)
    assert len(cases) == grid.n_cases == 4 * 4 * 2 * 2
    assert len({case.case_id for case in cases}) == len(cases)
    cue = "\nQuestion: " if prompt == "paper" else "Based on the content of the book, Question: "
    check_law(cases, NEEDLES, tokenizer, cue=cue)


def test_special_tokens_in_front_count_with_neither(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    cases = InterferenceGrid((0, 50), (0, 50), needles=(CODE,), haystack=LAMP).build(tokenizer)
    assert {case.prompt_ids.index(bos) for case in cases} == {0}
    check_law(cases, (CODE,), tokenizer, n_lead=1)


@given(
    distances=st.lists(st.integers(2, 400), min_size=1, max_size=3, unique=True),
    interferences=st.lists(st.integers(2, 400), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_the_law_in_the_bundled_language(tokenizer, distances, interferences, seed):
    grid = InterferenceGrid(tuple(distances), (0, *interferences), samples=2, seed=seed)
    n_tail = None
    for case in grid.build(tokenizer):
        assert case.needle.start == case.interference
        text = decoded(tokenizer, case.prompt_ids)
        n_tail = len(tokenizer("\nQuestion:" + text.split("\nQuestion:")[1]).input_ids)
        assert len(case.prompt_ids) == case.needle.end + case.distance + n_tail
        assert case.prompt_ids[case.source.start : case.source.end] == case.answer_ids


def test_the_law_on_a_slow_byte_tokenizer():
    tokenizer = ByT5Tokenizer()
    grid = InterferenceGrid((0, 50, 200), (0, 2, 99, 300), needles=NEEDLES, haystack=LAMP)
    check_law(grid.build(tokenizer), NEEDLES, tokenizer)


def test_golden_prompts(tokenizer):
    grid = InterferenceGrid((0, 20), (0, 20), needles=(CODE,), haystack=LAMP)
    tail = "\nQuestion: What is the code of Mara?\nAnswer:"
    before = "The lamp fell. A horse crossed the bridge at nigh"
    after = "\nWho saw it? The lamp fell. A horse crossed the"
    texts = {(c.interference, c.distance): decoded(tokenizer, c.prompt_ids) for c in grid.build(tokenizer)}
    assert texts == {
        (0, 0): f"The code of Mara is 4 0 7.{tail}",
        (0, 20): f"The code of Mara is 4 0 7.{after}{tail}",
        (20, 0): f"{before}\nThe code of Mara is 4 0 7.{tail}",
        (20, 20): f"{before}\nThe code of Mara is 4 0 7.{after}{tail}",
    }


def test_golden_prompt_in_a_chat(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = CHAT
    grid = InterferenceGrid((20,), (20,), needles=(CODE,), haystack=LAMP, chat=True)
    (case,) = grid.build(tokenizer)
    assert decoded(tokenizer, case.prompt_ids) == (
        "<|user|>\nThe lamp fell. A horse crossed the bridge at nigh\nThe code of Mara is 4 0 7.\nWho saw it? "
        "The lamp fell. A horse crossed the\nQuestion: What is the code of Mara?\nAnswer:<|end|>\n<|assistant|>\n"
    )
    n_lead = len(tokenizer("<|user|>\n").input_ids)
    check_law([case], (CODE,), tokenizer, n_lead=n_lead)
    assert grid.config()["chat"] is True


@pytest.mark.parametrize("material", ["bundled", "own"])
def test_cells_differ_in_nothing_but_what_they_are_named_for(tokenizer, material):
    own = {"needles": (CODE,), "haystack": LAMP} if material == "own" else {}
    grid = InterferenceGrid((30, 90), (0, 40, 200), samples=2, **own)
    by_cell = {(c.sample, c.interference, c.distance): c for c in grid.build(tokenizer)}
    for sample in range(2):
        n_tail = len(by_cell[sample, 0, 30].prompt_ids) - by_cell[sample, 0, 30].needle.end - 30
        split = {key[1:]: parts(case, n_tail) for key, case in by_cell.items() if key[0] == sample}
        for (interference, distance), (before, needle, after, tail) in split.items():
            longest_before, any_needle, longest_after, any_tail = split[200, 90]
            assert after == longest_after[:distance]
            assert before[:-1] == longest_before[: max(interference - 1, 0)]
            assert tail == any_tail
            if interference:
                assert needle == any_needle
    firsts = {by_cell[sample, 200, 90].prompt_ids[:30] for sample in range(2)}
    assert len(firsts) == 2


def test_the_text_after_is_never_the_text_before(tokenizer):
    """Numbered sentences: after the needle come only numbers that no cell has before it."""
    text = " ".join(f"Number {number:04d} came." for number in range(400))
    for longest in (2, 50, 51, 52, 53, 300):
        cases = InterferenceGrid((200,), (0, longest), needles=(CODE,), haystack=text, samples=3).build(tokenizer)
        for short, long in zip(cases[::2], cases[1::2], strict=True):
            before = decoded(tokenizer, long.prompt_ids[: long.needle.start])
            after = decoded(tokenizer, long.prompt_ids[long.needle.end :]).split("\nQuestion")[0]
            assert decoded(tokenizer, short.prompt_ids[short.needle.end :]).startswith(after)
            whole = [word for word in after.split() if len(word) == 4 and word.isdigit()]
            assert whole
            assert not [number for number in whole if number in before]


def test_a_sentence_after_is_the_first_whole_one(tokenizer):
    """Slow twin: read every count of tokens and see which sentences they touch."""
    haystack = Haystack(LAMP, PieceEncoder(tokenizer))
    lengths = [len(ids) for ids in haystack._middle]
    for start, n_tokens in itertools.product((0, 1, 5), range(0, 90, 7)):
        index, left = start, n_tokens
        while left > 0:
            left -= lengths[index] if index > start else len(haystack._opening(start, True))
            index += 1
        assert haystack.sentence_after(start, n_tokens) == index


def test_there_is_no_other_needle_in_the_bundled_context(tokenizer):
    (case,) = InterferenceGrid((1500,), (1500,), seed=3).build(tokenizer)
    context = decoded(tokenizer, case.prompt_ids[: case.needle.start] + case.prompt_ids[case.needle.end :])
    context = context.split("\nQuestion:")[0]
    assert not [word for word in ("motto", "password", "code", "grew", "born", "'s ", "majored") if word in context]
    (usual,) = NiahGrid(lengths=(3000,), depths=(50,), seed=3).build(tokenizer)
    assert "code" in decoded(tokenizer, usual.prompt_ids)


def test_cells_share_their_prefixes(tokenizer):
    cases = InterferenceGrid((100, 200, 400), (0, 200, 400, 800), needles=(CODE,), haystack=LAMP).build(tokenizer)
    visits = walk(cases)
    # Text before is read once; behind each needle the longest text, and of every cell its question and answer.
    tail = len(cases[0].prompt_ids) - cases[0].needle.end - 100 + len(cases[0].answer_ids)
    at_most = 800 + 4 * (len(cases[0].needle) + 400) + len(cases) * (tail + 1)
    assert tokens_run(visits) <= at_most < sum(visit.fed for visit in visits) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": ()}, "has no distances; give tokens, like --distances 0,256,1024"),
        ({"interferences": ()}, "has no interferences"),
        ({"distances": (5, 5)}, r"distances \(5, 5\) name a value twice"),
        ({"interferences": (-1,)}, "interferences are tokens, 0 or more, got -1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"needles": ()}, "list of needles is empty"),
        ({"prompt": "nowhere"}, "unknown prompt 'nowhere'"),
    ],
)
def test_grid_mistakes(change, message):
    with pytest.raises(LccpError, match=message):
        InterferenceGrid(**{"distances": (100,), "interferences": (100,), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": (1,)}, r"distance 1 has no room for text beside the line break \(1 tokens\).*at least 2"),
        ({"interferences": (1,)}, "interference 1 has no room for text"),
        ({"haystack": LAMP[:200]}, r"the haystack has \d+ tokens, \d+ are needed; give a longer text"),
        ({"haystack": LAMP + CODE.needle}, "the haystack holds needles itself: n0"),
        ({"chat": True}, "has no chat template"),
    ],
)
def test_what_cannot_be_built(tokenizer, change, message):
    options = {"distances": (100,), "interferences": (100,), "needles": (CODE,), "haystack": LAMP, **change}
    with pytest.raises(LccpError, match=message):
        InterferenceGrid(**options).build(tokenizer)


def test_equal_grids_have_equal_configs():
    grid = InterferenceGrid((100,), (0, 50), needles=(CODE,), haystack=LAMP)
    assert grid.config() == InterferenceGrid((100,), (0, 50), needles=(CODE,), haystack=str(LAMP)).config()
    changes = [
        {"distances": (99,)}, {"interferences": (0,)}, {"needles": NEEDLES}, {"haystack": "b"}, {"prompt": "wu"},
        {"seed": 1}, {"samples": 2}, {"chat": True},
    ]  # fmt: skip
    options = {"distances": (100,), "interferences": (0, 50), "needles": (CODE,), "haystack": LAMP}
    configs = [grid.config(), *(InterferenceGrid(**{**options, **change}).config() for change in changes)]
    assert all(one != other for one, other in itertools.combinations(configs, 2))


def test_a_run_holds_the_two_columns_and_its_heads_can_be_read(trajectory, tmp_path):
    grid = InterferenceGrid((40, 80), (0, 60), samples=2)
    run = score_grid(trajectory, tmp_path / "run", grid, metrics=["retrieval"])
    assert run.config["task"] == "interference"
    outcomes = run.outcomes.collect().join(run.cases, on="case_id")
    cells = outcomes.group_by("checkpoint", "distance", "interference").agg(pl.len())
    assert cells.height == 3 * 4
    assert cells["len"].to_list() == [2] * 12
    assert run.scores.collect().height == 3 * 8 * 2 * 12
    with pytest.raises(LccpError, match=r"has no cases of task 'niah' \(it has: interference\)"):
        niah_cases(run)


def test_cases_survive_the_table_with_and_without_the_columns(tokenizer, tmp_path):
    cases = InterferenceGrid((40,), (0, 60)).build(tokenizer)
    assert cases_from_frame(cases_frame(cases)) == cases
    others = NiahGrid(lengths=(200,), depths=(50,)).build(tokenizer)
    frame = cases_frame(others)
    assert frame.select(TASK_COLUMNS).null_count().row(0) == (1, 1)
    assert cases_from_frame(frame.drop(TASK_COLUMNS)) == others


def test_a_run_made_before_the_columns_opens_and_resumes(tokenizer, tmp_path):
    cases = NiahGrid(lengths=(200,), depths=(50,)).build(tokenizer)
    RunWriter(tmp_path / "run", {"task": "niah"}, cases)
    table = tmp_path / "run" / "cases.parquet"
    frame = pl.read_parquet(table)
    frame.drop(TASK_COLUMNS).write_parquet(table)
    assert Run.open(tmp_path / "run").cases.equals(frame)
    assert dict(Run.open(tmp_path / "run").cases.schema) == CASES_SCHEMA
    RunWriter(tmp_path / "run", {"task": "niah"}, cases)


def lccp(*arguments):
    result = CliRunner().invoke(models.app, ["score", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_scores_a_grid(checkpoint, tmp_path):
    out = tmp_path / "run"
    options = ["--task", "interference", "--distances", "40,80", "--interferences", "0,60", "--samples", "1"]
    code, said = lccp(checkpoint, *options, "--out", out)
    assert (code, said) == (0, f"{out}: 1 checkpoints x 4 cases\n")
    run = Run.open(out)
    assert sorted(run.cases.select(TASK_COLUMNS).rows()) == [(40, 0), (40, 60), (80, 0), (80, 60)]
    assert run.config["samples"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task", "interference", "--lengths", "100"],
            r"--lengths belongs to --task niah.*takes --distances and --int",
        ),
        (
            ["--distances", "100"],
            "--distances belongs to --task interference; --task niah takes --lengths and --depths",
        ),
        (["--task", "haystack"], "unknown task 'haystack'; known: niah, interference"),
        (["--task", "interference", "--distances", "far"], "'far' is no number of tokens"),
        (["--task", "interference", "--chat"], "has no chat template; leave out --chat"),
        (["--prompt", "book"], "unknown prompt 'book'; give paper or wu, or a template"),
    ],
)
def test_mistaken_options_get_one_line(checkpoint, tmp_path, options, message):
    code, said = lccp(checkpoint, *options, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(message, said)
    assert said.count("\n") == 1


def test_a_named_prompt_by_command(checkpoint, tmp_path):
    code, _ = lccp(
        checkpoint, "--lengths", "128", "--depths", "50", "--samples", "1", "--prompt", "wu", "--out", tmp_path / "run"
    )
    assert code == 0
    assert Run.open(tmp_path / "run").config["needle_place"] == "between sentences"
