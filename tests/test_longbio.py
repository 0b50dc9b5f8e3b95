"""Biographies: a reader of the bare text finds the answers, spans and lengths are exact, splits share nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import pytest
from external import external
from transformers import AutoTokenizer

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.scoring.graders import GRADERS
from lccp_interp.store import Run
from lccp_interp.sweep import score_grid
from lccp_interp.tasks.biographies import FORMS, SPLITS, Cast, book, spellings
from lccp_interp.tasks.items import MATERIALS, PromptWriter
from lccp_interp.tasks.longbio import ANSWERS, LongBioGrid, build_items, recast

GOLDEN = Path(__file__).parent / "golden" / "longbio.txt"
# The organism's tokenizer spells English in bytes: a token is a character.
LENGTH = {"organism": 400, "english": 1400}


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def writer(tokenizer):
    return PromptWriter(tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# The slow twin: a reader who knows the wordings and nothing of how a prompt was made
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(name|other|value|role)\}", template)
    text = "".join(re.escape(p) if n % 2 == 0 else rf"(?P<{p}>[\w' ]+?)" for n, p in enumerate(parts))
    return re.compile(text)


class Reader:
    """Reads biographies line by line into (name, topic) -> values, and answers a question out of that."""

    def __init__(self, told_in, text):
        self.book = told_in
        self.names = set(told_in.names)
        self.facts: dict[tuple[str, str], list[str]] = {}
        self.links: dict[tuple[str, str], str] = {}
        self.lines_of: dict[str, set[int]] = {}
        context, self.question = text.removesuffix("\nAnswer:").rsplit("\nQuestion: ", 1)
        for number, line in enumerate(context.split("\n")):
            self._read(number, line)

    def _read(self, number, line):
        words = re.findall(r"[A-Z][a-z]+", line)
        names = self.names & {*words, *(f"{first} {last}" for first, last in itertools.pairwise(words))}
        for name in names:
            self.lines_of.setdefault(name, set()).add(number)
        owner = next(iter(names)) if len(names) == 1 else None
        for sentence in re.findall(r"[^.]+\.", line):
            for topic in self.book.topics.values():
                for template in {topic.standard, *topic.paraphrase, topic.pronoun}:
                    found = pattern(template).fullmatch(sentence.strip())
                    if found and self._is_value(topic, found["value"]):
                        who = found.groupdict().get("name", owner)
                        self.facts.setdefault((who, topic.key), []).append(found["value"])
                if (found := pattern(topic.same).fullmatch(sentence.strip())) and found["other"] in self.names:
                    self.links[found["name"], topic.key] = found["other"]

    def _is_value(self, topic, text):
        if topic.values:
            return text in topic.values
        if not re.fullmatch(r"\d+ [A-Z][a-z]+ \d{4}", text):
            return False
        day, month, year = text.split()
        first, last = self.book.years
        return int(day) in self.book.days and month in language.MONTHS and first <= int(year) <= last

    def value(self, name, topic):
        values = self.facts.get((self.links.get((name, topic), name), topic), [])
        assert len(values) <= 1, f"{name} has two values of {topic}"
        return values[0] if values else None

    def answer(self) -> str:
        if found := pattern(self.book.calculation).fullmatch(self.question):
            years = {who: int(self.value(who, self.book.birth)[-4:]) for who in (found["name"], found["other"])}
            if self.book.material == "organism":
                return min(years, key=years.get)
            return str(max(years.values()) - min(years.values()))
        for topic in self.book.topics.values():
            if found := pattern(topic.question).fullmatch(self.question):
                return self.value(found["name"], topic.key) or self.book.not_stated
        raise AssertionError(self.question)


@pytest.mark.parametrize(("material", "split"), itertools.product(MATERIALS, SPLITS))
def test_a_reader_of_the_text_finds_the_answer(writer, tokenizer, material, split):
    told_in = book(material, split)
    lengths = [LENGTH[material], 2 * LENGTH[material]]
    for item in build_items(writer, lengths=lengths, samples=3, seed=4, material=material, split=split):
        text = text_of(tokenizer, item.prompt_ids)
        reader = Reader(told_in, text)
        answer = reader.answer()
        assert item.target == f" {answer}"
        assert item.references[0] == answer
        assert (answer == told_in.not_stated) is (item.subset == "not_stated")
        # Nobody has two biographies; only a link names somebody else in one.
        assert text.startswith(told_in.instruction + "\n")
        linked = set(reader.links.values())
        assert (len(linked) == 1) is (item.subset == "multi_hop")
        for name, lines in reader.lines_of.items():
            assert len(lines) == 1 + (name in linked), name
        if item.subset == "pronoun":
            context = text.rsplit("\nQuestion: ", 1)[0]
            assert all(context.count(name) == 1 for name in reader.lines_of)
        assert len(reader.lines_of) >= 2, "at least one distractor"


@pytest.mark.parametrize("material", MATERIALS)
def test_graders_know_right_from_wrong(writer, material):
    for item in build_items(writer, lengths=[LENGTH[material]], samples=3, material=material):
        grade = GRADERS[item.grader]
        assert grade(f"{item.target}.", item.references) == 1.0
        assert grade(" I do not know", item.references) == 0.0


def test_dates_are_accepted_in_two_spellings(writer):
    assert spellings("14 May 1960") == ("14 May 1960", "May 14, 1960")
    items = build_items(writer, subsets=["standard"], lengths=[1400], samples=30)
    dates = [item for item in items if len(item.references) == 2]
    assert dates
    for item in dates:
        day, month, year = item.references[0].split()
        assert item.references[1] == f"{month} {day}, {year}"
        assert GRADERS[item.grader](f" That was {month.lower()} {day}, {year}", item.references) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Spans, lengths, places
# ---------------------------------------------------------------------------------------------------------------------


def check_evidence(tokenizer, told_in, item):
    told = [text_of(tokenizer, item.prompt_ids[span.start : span.end]).strip() for span in item.evidence]
    text = text_of(tokenizer, item.prompt_ids)
    assert all(text.count(sentence) == 1 or item.subset == "pronoun" for sentence in told)
    assert all(earlier.end <= later.start for earlier, later in itertools.pairwise(item.evidence))
    if item.subset == "not_stated":
        assert told == []
    elif item.subset == "calculation":
        births = [pattern(told_in.topics[told_in.birth].standard).fullmatch(sentence) for sentence in told]
        assert len(births) == 2
        assert all(birth["name"] in text.rsplit("Question:")[1] for birth in births)
    elif item.subset == "multi_hop":
        (link,) = [s for s in told if item.references[0] not in s]
        (fact,) = [s for s in told if item.references[0] in s]
        assert any(pattern(t.same).fullmatch(link) for t in told_in.topics.values())
        assert any(pattern(t.standard).fullmatch(fact) for t in told_in.topics.values())
    elif item.subset == "pronoun":
        assert pattern(told_in.introduction).fullmatch(told[0])["name"] in text.rsplit("Question:")[1]
        assert item.references[0] in told[1]
        # Both stand in one biography.
        assert "\n" not in text_of(tokenizer, item.prompt_ids[item.evidence[0].end : item.evidence[1].end])
    else:
        assert len(told) == 1
        assert item.references[0] in told[0]


@pytest.mark.parametrize(("material", "split"), itertools.product(MATERIALS, SPLITS))
def test_evidence_is_what_the_answer_needs(writer, tokenizer, material, split):
    for item in build_items(writer, lengths=[LENGTH[material] + 99], samples=3, material=material, split=split):
        check_evidence(tokenizer, book(material, split), item)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_evidence_under_real_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    for item in build_items(PromptWriter(tokenizer), lengths=[700, 2048], samples=2):
        check_evidence(tokenizer, book("english"), item)
        assert len(item.prompt_ids) + item.max_new_tokens <= item.length


@pytest.mark.parametrize("material", MATERIALS)
def test_prompts_are_as_long_as_fits(writer, tokenizer, material):
    longest_line = 0
    items = build_items(
        writer, lengths=range(LENGTH[material], LENGTH[material] + 400, 57), samples=1, material=material
    )
    for item in items:
        lines = text_of(tokenizer, item.prompt_ids).split("\n")
        longest_line = max(longest_line, *(len(tokenizer("\n" + line)["input_ids"]) for line in lines[1:-2]))
        assert len(item.prompt_ids) + item.max_new_tokens <= item.length
    for item in items:
        assert item.length - item.max_new_tokens - len(item.prompt_ids) <= longest_line + 20


def test_what_is_asked_for_stands_everywhere(writer):
    for subset in ("standard", "multi_hop"):
        items = build_items(writer, subsets=[subset], lengths=[1500], samples=32, material="organism")
        for which in range(len(items[0].evidence)):
            places = [item.evidence[which].start / len(item.prompt_ids) for item in items]
            if subset == "standard":
                quarters = [sum(q / 4 <= place < (q + 1) / 4 for place in places) for q in range(4)]
                assert min(quarters) >= 5
            assert len(set(places)) > 16
    # The two biographies of a question come in either order.
    first = [item.evidence[0] for item in items]
    texts = [text_of(writer.tokenizer, i.prompt_ids[s.start : s.end]) for i, s in zip(items, first, strict=True)]
    links = [any(pattern(t.same).fullmatch(text.strip()) for t in book("organism").topics.values()) for text in texts]
    assert 8 <= sum(links) <= 24


@pytest.mark.parametrize("material", MATERIALS)
def test_items_depend_on_nothing_but_themselves(writer, material):
    options = {"material": material, "seed": 3}
    length = LENGTH[material]
    alone = build_items(writer, subsets=["pronoun"], lengths=[length], samples=2, **options)
    among = build_items(writer, lengths=[length + 100, length], samples=4, **options)
    assert alone == [i for i in among if i.subset == "pronoun" and i.length == length][:2]
    other = build_items(writer, subsets=["pronoun"], lengths=[length], samples=2, material=material, seed=4)
    assert {i.prompt_ids for i in alone}.isdisjoint(i.prompt_ids for i in other)
    assert len({item.item_id for item in among}) == len(among) == len({item.prompt_ids for item in among})


# ---------------------------------------------------------------------------------------------------------------------
# Books
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("material", MATERIALS)
def test_splits_share_no_name_value_or_wording(material):
    one, other = (book(material, split) for split in SPLITS)
    words = [{word for name in b.names for word in name.split()} for b in (one, other)]
    assert words[0].isdisjoint(words[1])
    assert set(one.days).isdisjoint(other.days)
    assert one.templates().isdisjoint(other.templates())
    assert set(one.roles).isdisjoint(other.roles) or one.roles == other.roles == ("",)
    for key in one.topics:
        assert set(one.topics[key].values).isdisjoint(other.topics[key].values)
        assert bool(one.topics[key].values) is bool(other.topics[key].values) is (key != one.birth)


@pytest.mark.parametrize(("material", "split"), itertools.product(MATERIALS, SPLITS))
def test_nothing_is_part_of_another(material, split):
    """Else a grader that looks for a text inside another would take one value for another."""
    told_in = book(material, split)
    for topic in told_in.topics.values():
        for one, other in itertools.permutations(topic.values, 2):
            assert one.lower() not in other.lower()
    assert len(set(told_in.names)) == len(told_in.names)
    in_order = sorted(told_in.names)
    assert not any(later.startswith(earlier) for earlier, later in itertools.pairwise(in_order))
    # A blank stands before the value, as behind the answer cue; the value stands in the sentence once.
    for topic in told_in.topics.values():
        for template in (topic.standard, *topic.paraphrase, topic.pronoun):
            assert template.count(" {value}") == template.count("{value}") == 1
            assert ("{name}" in template) is (template != topic.pronoun)
        assert topic.question.count("{name}") == 1


def test_the_bundled_language_has_every_word(tokenizer):
    known = {piece.strip() for piece in language.PIECES}
    for split in SPLITS:
        told_in = book("organism", split)
        for form in FORMS:
            cast = Cast(told_in, form, seed=1)
            told = [*(cast.line(j) for j in range(200)), told_in.instruction]
            told += [cast.tell(0, topic, same_as=1).text for topic in told_in.topics]
            told += [t.question.format(name=cast.name(0)) for t in told_in.topics.values()]
            told += [told_in.calculation.format(name=cast.name(0), other=cast.name(1)), told_in.not_stated]
            words = {word for text in told for word in re.findall(r"[A-Za-z]+", text.replace("'s", ""))}
            assert words - known == set()


def test_story_tells_of_nobody():
    cast = Cast(book("organism"), "pronoun", seed=2)
    story = " ".join(cast.line(j) for j in range(1, 6))
    assert story.count(".") == 20
    assert not set(re.findall(r"\w+", story)) & {*language.NAMES, *book("organism").roles, *language.CITIES}


# ---------------------------------------------------------------------------------------------------------------------
# Recast
# ---------------------------------------------------------------------------------------------------------------------


def check_cases(grid, tokenizer, told_in):
    cases = recast(grid, tokenizer)
    assert len(cases) == grid.n_cases == len({case.case_id for case in cases})
    for case in cases:
        assert len(case.prompt_ids) + len(case.answer_ids) == case.length
        text = text_of(tokenizer, case.prompt_ids)
        needle = text_of(tokenizer, case.prompt_ids[case.needle.start : case.needle.end]).strip()
        assert text.count(needle) >= 1
        assert case.prompt_ids[case.source.start : case.source.end] == case.answer_ids
        answer = text_of(tokenizer, case.answer_ids).strip()
        reader = Reader(told_in, text.removeprefix("<s> ").removeprefix("<|begin_of_text|>"))
        assert reader.answer() in needle
        assert answer == (needle if grid.answer == "needle" else reader.answer())
        topic = case.needle_id.split("-")[0]
        templates = told_in.topics[topic]
        assert any(pattern(t).fullmatch(needle) for t in (templates.standard, *templates.paraphrase, templates.pronoun))
    return cases


@pytest.mark.parametrize(("material", "answer"), itertools.product(MATERIALS, ANSWERS))
def test_recast_facts_are_exact_needles(tokenizer, material, answer):
    grid = LongBioGrid(
        lengths=(1100, 1733), depths=(0, 30, 100), samples=2, subsets=FORMS, answer=answer, material=material, seed=7
    )
    check_cases(grid, tokenizer, book(material))


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_recast_under_real_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    grid = LongBioGrid(lengths=(500, 1501), samples=2, subsets=FORMS)
    cases = check_cases(grid, tokenizer, book("english"))
    # The depths of one sample share their people.
    needles = [text_of(tokenizer, c.prompt_ids[c.needle.start : c.needle.end]) for c in cases[:5]]
    assert len({needle.strip() for needle in needles}) == 1
    assert len({case.haystack_id for case in cases[:5]}) == 1


def test_depth_is_where_lines_end_nearest_below(tokenizer):
    grid = LongBioGrid(lengths=(2000,), depths=tuple(range(0, 101, 10)), samples=3)
    for case in recast(grid, tokenizer):
        text = text_of(tokenizer, case.prompt_ids)
        needle = text_of(tokenizer, case.prompt_ids[case.needle.start : case.needle.end])
        lines = text.split("\n")
        (own,) = [n for n, line in enumerate(lines) if needle in line]
        before = len(tokenizer("\n".join(lines[:own]))["input_ids"])
        after = len(tokenizer("\n".join(["", *lines[own + 1 : -2]]))["input_ids"])
        context = before + after
        assert before <= case.depth_fraction * context + 1
        if case.depth_fraction == 1:
            assert own == len(lines) - 3
        elif own + 1 < len(lines) - 2:
            following = len(tokenizer("\n" + lines[own + 1])["input_ids"])
            assert before + following > case.depth_fraction * context - 2


def test_material_follows_the_tokenizer_unless_told(tokenizer):
    auto, organism, english = (
        LongBioGrid(lengths=(900,), depths=(50,), material=material).build(tokenizer)
        for material in ("auto", "organism", "english")
    )
    assert auto == organism
    assert "Question: " in text_of(tokenizer, english[0].prompt_ids)
    assert not set(text_of(tokenizer, english[0].prompt_ids).split()) & set(language.NAMES)


def test_grids_are_told_apart_by_their_configs():
    grid = LongBioGrid(lengths=(512,))
    changes = {
        "lengths": (513,), "depths": (0,), "samples": 2, "subsets": ("pronoun",), "answer": "answer",
        "material": "english", "seed": 1,
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(LongBioGrid)}
    configs = [dataclasses.replace(grid, **{key: value}).config() for key, value in changes.items()]
    written = {json.dumps(config) for config in [grid.config(), *configs]}
    assert len(written) == 1 + len(changes)
    assert grid.config()["task"] == "longbio"
    assert LongBioGrid(lengths=(512,), depths=(0.0, 25, 50, 75, 100)).config() == grid.config()


def test_heads_are_scored_on_recast_facts(trajectory, tmp_path):
    grid = LongBioGrid(lengths=(256,), depths=(0, 100), samples=2, subsets=("standard", "pronoun"))
    score_grid([trajectory], tmp_path / "run", grid)
    run = Run.open(tmp_path / "run")
    assert run.cases.height == grid.n_cases == 8
    assert run.config["task"] == "longbio"
    assert set(run.cases["task"]) == {"longbio"}
    score_grid([trajectory], tmp_path / "run", grid)
    with pytest.raises(LccpError, match="answer"):
        score_grid([trajectory], tmp_path / "run", dataclasses.replace(grid, answer="answer"))


def test_the_command_line_knows_the_task(lccp, checkpoint, tmp_path):
    arguments = ["score", checkpoint, "--task", "longbio", "--tokens", "tokens-1M=1M", "--lengths", "200"]
    arguments += ["--depths", "50", "--samples", "1", "--out", tmp_path / "run"]
    code, _, err = lccp(*arguments)
    assert code == 0, err
    assert Run.open(tmp_path / "run").cases["case_id"].to_list() == ["longbio-standard-200-d50-0"]
    code, _, err = lccp(*arguments, "--chat")
    assert code == 2
    assert "--task longbio writes its biographies and its prompt itself; leave out --chat" in err


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": ["citation"]}, "unknown subset 'citation' of LongBio-style; known: standard, paraphrase, pronoun"),
        ({"subsets": []}, "at least one subset and none twice, got none"),
        ({"subsets": ["pronoun", "pronoun"]}, "none twice, got pronoun, pronoun"),
        ({"lengths": []}, "at least one length and none twice"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"material": "latin"}, "unknown material 'latin'; known: english, organism"),
        ({"split": "test"}, "unknown split 'test'; known: eval, train"),
        ({"lengths": [64]}, "no sample of LongBio-style standard fits 64 tokens.*ask for at least"),
    ],
)
def test_mistakes_in_items(writer, change, message):
    with pytest.raises(LccpError, match=message):
        build_items(writer, **{"lengths": [512], "samples": 1, "material": "organism", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": ("multi_hop",)}, "unknown single-needle subset 'multi_hop' of LongBio-style; known: standard"),
        ({"lengths": ()}, "at least one length and one depth"),
        ({"depths": (0, 0)}, "name a value twice"),
        ({"depths": (101,)}, "depth 101 is outside 0-100"),
        ({"samples": 0}, "must be at least 1"),
        ({"answer": "name"}, "unknown answer 'name'; known: needle, answer"),
        ({"material": "latin"}, "unknown material 'latin'; known: auto, english, organism"),
    ],
)
def test_mistakes_in_grids(change, message):
    with pytest.raises(LccpError, match=message):
        LongBioGrid(**{"lengths": (512,), **change})


def test_a_length_without_room_says_what_would_do(tokenizer):
    with pytest.raises(LccpError, match=r"length 40 has no room for a context: .* take \d+ tokens; ask for at least"):
        recast(LongBioGrid(lengths=(40,), depths=(50,)), tokenizer)


def test_names_run_out_in_so_many_words():
    told_in = dataclasses.replace(book("english"), names=book("english").names[:3])
    cast = Cast(told_in, "standard", seed=0)
    assert [cast.line(0).count("."), cast.line(1).count(".")] == [6, 6]
    with pytest.raises(LccpError, match="has names for 3 biographies, more may be wanted; ask for a shorter length"):
        cast.line(2)


# ---------------------------------------------------------------------------------------------------------------------
# Whole prompts, to be read
# ---------------------------------------------------------------------------------------------------------------------


def written_out(writer) -> str:
    """One prompt of every material, split and subset, and a recast case, with the facts about each."""
    parts = []
    for material, split in itertools.product(MATERIALS, SPLITS):
        length = {"organism": 330, "english": 1100}[material]
        for item in build_items(writer, lengths=[length], samples=1, material=material, split=split):
            told = f"{material} {split} {item.item_id}: {item.target!r} of {item.references}, {item.grader}"
            parts.append(f"### {told}\n{text_of(writer.tokenizer, item.prompt_ids)}")
    (case,) = recast(LongBioGrid(lengths=(160,), depths=(50,)), writer.tokenizer)
    parts.append(f"### {case.case_id}\n{text_of(writer.tokenizer, (*case.prompt_ids, *case.answer_ids))}")
    return "\n\n".join(parts) + "\n"


def test_prompts_are_those_written_out(writer):
    assert written_out(writer) == GOLDEN.read_text(encoding="utf-8")
