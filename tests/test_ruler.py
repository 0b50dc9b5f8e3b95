"""RULER-style tasks: golden prompts, exact places and lengths, answers found again by brute force, official files."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from external import external
from transformers import AutoTokenizer

from lccp_interp.organism import language
from lccp_interp.schema import LccpError
from lccp_interp.scoring.graders import GRADERS
from lccp_interp.tasks import filler
from lccp_interp.tasks.items import PromptWriter
from lccp_interp.tasks.ruler import SUBSETS, aggregation, build_items, niah, qa, read_questions, read_ruler, tracing

GOLDEN = Path(__file__).parent / "golden"
# Tokens of the organism's tokenizer, which spells English out in bytes.
GOLDEN_LENGTHS = {
    "organism": dict.fromkeys(SUBSETS, 160) | {"niah_multiquery": 200, "vt": 200, "cwe": 180, "fwe": 200},
    "english": dict.fromkeys(SUBSETS, 900) | {"niah_multiquery": 1200, "vt": 2600, "cwe": 3200, "fwe": 1100},
}


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def evidence_of(tokenizer, item) -> list[str]:
    return [text_of(tokenizer, item.prompt_ids[span.start : span.end]).strip() for span in item.evidence]


@pytest.fixture(scope="module")
def writer(tokenizer):
    return PromptWriter(tokenizer)


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def english(request):
    return PromptWriter(AutoTokenizer.from_pretrained(external(f"tokenizers/{request.param}")))


def golden(writer: PromptWriter, material: str) -> str:
    """One whole prompt per subset, with everything an item says beside it."""
    sections = []
    for subset, length in GOLDEN_LENGTHS[material].items():
        item = build_items(writer, subsets=[subset], lengths=[length], samples=1, material=material)[0]
        about = f"{item.grader}, {item.max_new_tokens} tokens, stop {item.stop}, references {item.references}"
        sections.append(
            f"##### {item.item_id} ({item.benchmark}): {about}\n{text_of(writer.tokenizer, item.prompt_ids)}"
            f"\n##### target\n{item.target}\n##### evidence\n" + "\n".join(evidence_of(writer.tokenizer, item))
        )
    return "\n".join(sections) + "\n"


@pytest.mark.parametrize("material", ["english", "organism"])
def test_prompts_are_those_that_were_read_and_approved(writer, material):
    assert golden(writer, material) == (GOLDEN / f"ruler-{material}.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Laws of every subset
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["eval", "train"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_prompts_fill_their_length_and_not_more(writer, subset, split):
    items = build_items(writer, subsets=[subset], lengths=[300, 777, 2048], samples=3, material="organism", split=split)
    for item in items:
        free = item.length - len(item.prompt_ids) - item.max_new_tokens
        # Less than the largest step a prompt grows by: a document or a line of noise, or all common words once more.
        assert 0 <= free < (150 if subset == "cwe" else 45), item.item_id


@pytest.mark.parametrize("subset", SUBSETS)
def test_prompts_fill_their_length_under_real_tokenizers(english, subset):
    for item in build_items(english, subsets=[subset], lengths=[4096, 9000], samples=2):
        assert 0 <= item.length - len(item.prompt_ids) - item.max_new_tokens < 130, item.item_id


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_budgets_of_ruler_hold_the_answers(english, subset):
    official = {"vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    for item in build_items(english, subsets=[subset], lengths=[4096], samples=5):
        assert item.max_new_tokens == official.get(subset, 128)


def test_a_budget_grows_with_a_tokenizer_that_needs_more(writer):
    item = build_items(writer, subsets=["cwe"], lengths=[3200], samples=1)[0]
    assert item.max_new_tokens == len(writer.answer_ids(item.target)) > aggregation.CWE_BUDGET
    assert len(item.prompt_ids) + item.max_new_tokens <= 3200


@pytest.mark.parametrize("material", ["english", "organism"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_targets_are_right_answers(writer, subset, material):
    for split in ("eval", "train"):
        length = GOLDEN_LENGTHS[material][subset]
        for item in build_items(writer, subsets=[subset], lengths=[length], samples=3, material=material, split=split):
            assert GRADERS[item.grader](item.target, item.references) == 1.0
            assert item.target.startswith(" ")
            assert item.stop == (("\n",) if material == "organism" else ())


@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if subset not in ("cwe", "fwe")])
def test_evidence_holds_the_answers(writer, subset):
    for item in build_items(writer, subsets=[subset], lengths=[400], samples=5, material="organism"):
        found = evidence_of(writer.tokenizer, item)
        assert all(any(reference in text for text in found) for reference in item.references)
        assert len(found) == (5 if subset == "vt" else len(item.references))


@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if subset not in ("cwe", "fwe")])
def test_evidence_holds_the_answers_under_real_tokenizers(english, subset):
    for item in build_items(english, subsets=[subset], lengths=[3000], samples=3):
        found = evidence_of(english.tokenizer, item)
        assert all(any(reference in text for text in found) for reference in item.references)
        whole = text_of(english.tokenizer, item.prompt_ids)
        assert all(text in whole for text in found)


def test_items_do_not_depend_on_what_else_is_asked_for(writer):
    settings = {"lengths": [300, 500], "samples": 3, "material": "organism", "seed": 5}
    everything = {item.item_id: item for item in build_items(writer, **settings)}
    assert len(everything) == len(SUBSETS) * 2 * 3
    for subset in SUBSETS:
        alone = build_items(writer, subsets=[subset], **{**settings, "lengths": [500], "samples": 2})
        assert [everything[item.item_id] for item in alone] == alone
    # Another seed, sample or split is another item.
    others = build_items(writer, **{**settings, "seed": 6})
    assert all(everything[item.item_id].prompt_ids != item.prompt_ids for item in others)
    assert len({item.prompt_ids for item in everything.values()}) == len(everything)
    assert "ruler-train-vt-500-0" in {item.item_id for item in build_items(writer, split="train", **settings)}


def test_the_order_of_items(writer):
    items = build_items(writer, subsets=["vt", "qa"], lengths=[400, 300], samples=2, material="organism")
    assert [item.item_id.removeprefix("ruler-") for item in items] == [
        "vt-400-0", "vt-400-1", "vt-300-0", "vt-300-1", "qa-400-0", "qa-400-1", "qa-300-0", "qa-300-1",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def words_in(texts) -> set[str]:
    return set(itertools.chain.from_iterable(re.findall(r"[\w-]+", text) for text in texts))


@pytest.mark.parametrize("material", ["english", "organism"])
def test_splits_share_no_answer_and_no_name(writer, material):
    lengths = GOLDEN_LENGTHS[material]
    seen = {}
    for split in ("eval", "train"):
        items = [
            item
            for subset in SUBSETS
            for item in build_items(
                writer, subsets=[subset], lengths=[lengths[subset]], samples=10, material=material, split=split
            )
        ]
        facts = [text for item in items for text in evidence_of(writer.tokenizer, item)]
        keys = {word for word in words_in(facts) if word in language.NAMES or "-" in word}
        towns = set(
            re.findall(r"(?:Great|High|Little|Lower|Market|New|North|Old|South|Upper|West) \w+", "\n".join(facts))
        )
        seen[split] = {reference for item in items for reference in item.references} | keys | towns
    assert min(map(len, seen.values())) > 100
    assert not seen["eval"] & seen["train"]


def templates(split: str) -> list[str]:
    """Every fixed sentence of a split, fields blanked out."""
    found = [*vars(niah.WORDINGS[split]).values(), *niah.ORGANISM_WORDINGS[split], niah.ORGANISM_NOISE[split]]
    found.append({"eval": niah.NOISE, "train": niah.TRAIN_NOISE}[split])
    for wordings in (tracing.WORDINGS, aggregation.CWE_WORDINGS, aggregation.FWE_WORDINGS):
        for material in ("english", "organism"):
            found += vars(wordings[material, split]).values()
    found += [
        *vars(qa.WORDINGS[split]).values(),
        *qa.TOWN_STATEMENTS[split].values(),
        *qa.TOWN_QUESTIONS[split].values(),
    ]
    found += itertools.chain.from_iterable(qa.ORGANISM_FORMS[split].values())
    # "Question:" and "Answer:" are the form of the bundled model's documents, in both splits.
    return [re.sub(r"\{\w+\}|^\nQuestion:|^\nAnswer:", " _ ", text) for text in found]


def test_splits_share_no_wording():
    runs = {}
    for split in ("eval", "train"):
        words = [re.findall(r"\w+", template.lower()) for template in templates(split)]
        runs[split] = {
            tuple(w[at : at + 4]) for w in words for at in range(len(w) - 3) if w[at : at + 4].count("_") < 2
        }
    assert min(map(len, runs.values())) > 50
    assert not runs["eval"] & runs["train"]
    assert not {t for t in templates("eval") if t.strip(" _")} & {t for t in templates("train") if t.strip(" _")} - {
        "A"
    }


def test_the_filler_of_a_split_names_nobody_of_the_other(writer):
    for split, strangers in (("eval", language.NAMES[1::2]), ("train", language.NAMES[::2])):
        items = build_items(writer, lengths=[1500], samples=2, material="organism", split=split)
        assert not words_in(text_of(writer.tokenizer, item.prompt_ids) for item in items) & set(strangers)


# ---------------------------------------------------------------------------------------------------------------------
# Subsets, solved by brute force
# ---------------------------------------------------------------------------------------------------------------------

STATEMENT = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@pytest.mark.parametrize(
    ("subset", "n_needles", "n_answers", "kind"),
    [
        ("niah_single_1", 1, 1, "numbers"),
        ("niah_single_2", 1, 1, "numbers"),
        ("niah_single_3", 1, 1, "uuids"),
        ("niah_multikey_1", 4, 1, "numbers"),
        ("niah_multikey_2", None, 1, "numbers"),
        ("niah_multikey_3", None, 1, "uuids"),
        ("niah_multivalue", 4, 4, "numbers"),
        ("niah_multiquery", 4, 4, "numbers"),
    ],
)
def test_needles_are_those_of_the_question(english, subset, n_needles, n_answers, kind):
    for item in build_items(english, subsets=[subset], lengths=[4096], samples=4):
        text = text_of(english.tokenizer, item.prompt_ids)
        found = STATEMENT.findall(text)
        asked = re.search(r"magic \w+ for (.+?) mentioned in the provided text\?", text).group(1)
        keys = re.split(r", and |, ", asked)
        answers = [value for key in keys for _, k, value in found if k == key]
        assert len(item.references) == n_answers
        assert {of for of, _, _ in found} == {kind}
        shape = UUID4 if kind == "uuids" else re.compile(r"[1-9]\d{6}")
        assert all(shape.fullmatch(value) for _, _, value in found)
        if n_needles:
            assert len(found) == n_needles
        else:
            assert len({key for _, key, _ in found}) == len(found) > 30
            assert all(UUID4.fullmatch(key) for _, key, _ in found) is (kind == "uuids")
        # In the order of the question, and of the text.
        assert answers == list(item.references)
        if subset == "niah_single_1":
            assert set(text.split("\n")[1:-1]) - {
                found and f"One of the special magic numbers for {asked} is: {answers[0]}."
            } == {niah.NOISE}


def test_needles_among_needles_are_of_their_own_kind_first_in_the_organism(writer):
    item = build_items(writer, subsets=["niah_multikey_2"], lengths=[3000], samples=1, material="organism")[0]
    lines = text_of(writer.tokenizer, item.prompt_ids).split("\n")[:-2]
    pairs = [re.fullmatch(r"The (\w+) of (\w+) is (.+)\.", line).groups() for line in lines]
    assert len({(attribute, name) for attribute, name, _ in pairs}) == len(pairs)
    numeric = {"code", "badge", "account", "wedding", "debut", "visit"}
    assert sum(pair[0] in numeric for pair in pairs) == 24 * 6
    pairs.pop(lines.index(evidence_of(writer.tokenizer, item)[0]))
    assert len(pairs) > 24 * 6
    assert all((pair[0] in numeric) is (at < 24 * 6 - 1) for at, pair in enumerate(pairs))


def test_the_organism_can_read_further_than_it_has_facts(writer):
    item = build_items(writer, subsets=["niah_multikey_3"], lengths=[9000], samples=1, material="organism")[0]
    lines = text_of(writer.tokenizer, item.prompt_ids).split("\n")
    counts = Counter(lines[:-2])
    assert max(counts.values()) > 1
    assert counts[evidence_of(writer.tokenizer, item)[0]] == 1


@pytest.mark.parametrize("split", ["eval", "train"])
def test_variables_can_be_traced(english, split):
    forms = {
        "eval": (r"VAR (\w+) = (\d+)$", r"VAR (\w+) = VAR (\w+)$", r"assigned the value (\d+) in"),
        "train": (
            r"Let (\w+) hold (\d+)\.$",
            r"Let (\w+) hold what (\w+) holds\.$",
            r"name every box with (\d+) inside",
        ),
    }
    first, hop, question = forms[split]
    for item in build_items(english, subsets=["vt"], lengths=[2000], samples=3, split=split):
        held: dict[str, str] = {}
        text = text_of(english.tokenizer, item.prompt_ids)
        for line in text.split("\n"):
            if match := re.match(first, line):
                held[match.group(1)] = match.group(2)
            elif match := re.match(hop, line):
                held[match.group(1)] = held[match.group(2)]  # in order: what is handed on is known
        asked = re.findall(question, text)[-1]
        assert sorted(name for name, value in held.items() if value == asked) == sorted(item.references)
        # The chain of the example in front has another value and shorter names.
        assert len(held) == 10
        assert Counter(map(len, held)) == {3: 5, 5: 5}


@pytest.mark.parametrize(("length", "times"), [(4095, (6, 1)), (4096, (30, 3)), (16384, (30, 3))])
def test_common_words_are_the_most_common(english, length, times):
    item = build_items(english, subsets=["cwe"], lengths=[length], samples=1)[0]
    text = text_of(english.tokenizer, item.prompt_ids)
    shown, asked = text.split("Memorize those.\n" if "Memorize those" in text else "memorize those.\n")[1:]
    entries = re.findall(r"(\d+)\. ([\w-]+)", asked)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, _ in counts.most_common(10)} == set(item.references)
    assert {counts[word] for word in item.references} == {times[0]}
    rare = Counter(count for word, count in counts.items() if word not in item.references)
    # The last one may be cut short.
    assert max(rare) == times[1]
    assert sum(rare.values()) - rare[times[1]] <= 1
    # The example holds its own ten words three times, ten others once, and its answer.
    assert sorted(Counter(re.findall(r"\d+\. ([\w-]+)", shown)).values()) == [1] * 10 + [4] * 10
    assert not set(re.findall(r"\d+\. ([\w-]+)", shown)) & set(counts)


def test_common_words_stay_common_when_the_organism_runs_out_of_words(writer):
    for length in (300, 1000, 4000):
        item = build_items(writer, subsets=["cwe"], lengths=[length], samples=1, material="organism")[0]
        counts = Counter(re.findall(r"\d+\. (\w+)", text_of(writer.tokenizer, item.prompt_ids)))
        most = counts.most_common()
        assert {word for word, _ in most[:5]} == set(item.references)
        assert most[4][1] >= 6 * most[5][1]


@pytest.mark.parametrize("length", [700, 4096, 20000])
def test_frequent_words_are_the_most_frequent(english, length):
    item = build_items(english, subsets=["fwe"], lengths=[length], samples=1)[0]
    context = text_of(english.tokenizer, item.prompt_ids).split("appear most.")[1].split("\nQuestion:")[0]
    counts = Counter(context.split())
    noise, *rest = counts.most_common()
    assert noise[0] == "..."
    assert tuple(word for word, _ in rest[:3]) == item.references
    assert len({count for _, count in rest[:4]}) == 4
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)


def test_frequent_words_of_the_organism(writer):
    item = build_items(writer, subsets=["fwe"], lengths=[500], samples=1, material="organism")[0]
    counts = Counter(text_of(writer.tokenizer, item.prompt_ids).split("\n")[0].split()[1:])
    assert tuple(word for word, _ in counts.most_common(3)) == item.references


def test_zipf_counts_by_hand():
    # 164 / 1.644934 = 99.7; a quarter, a ninth, a sixteenth of it.
    assert aggregation.zipf_counts(164, 4) == [99, 24, 11, 6]


def test_one_document_answers(english):
    for item in build_items(english, subsets=["qa"], lengths=[3000], samples=6):
        text = text_of(english.tokenizer, item.prompt_ids)
        documents = re.findall(r"Document (\d+):\n(.+)", text)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        towns = [re.match(r"(.+) is a small town", document).group(1) for _, document in documents]
        assert len(set(towns)) == len(towns) > 10
        question = text.split("\n\nQuestion: ")[1]
        (asked,) = [
            document
            for town, (_, document) in zip(towns, documents, strict=True)
            if f" {town} " in f" {question}".replace("?", " ")
        ]
        assert evidence_of(english.tokenizer, item) == [asked]
        assert item.references[0] in asked
        assert text.endswith(" Answer:")


def test_lives_are_followed_by_stories(writer):
    item = build_items(writer, subsets=["qa"], lengths=[3000], samples=1, material="organism")[0]
    lines = text_of(writer.tokenizer, item.prompt_ids).split("\n")[:-2]
    lives = [line for line in lines if "University of" in line]
    assert len(lives) == 24
    assert all(line.count(".") == 4 for line in lines if line not in lives)
    assert len(lines) > 40


# ---------------------------------------------------------------------------------------------------------------------
# A user's own text and questions
# ---------------------------------------------------------------------------------------------------------------------


def test_needles_are_hidden_in_the_users_text(writer):
    haystack = "First one here. Second\none\n\nthere! Third? " + " ".join(f"Line {i} goes on." for i in range(9))
    (item,) = build_items(writer, subsets=["niah_single_2"], lengths=[900], samples=1, haystack=haystack)
    context = text_of(writer.tokenizer, item.prompt_ids).split("\n")[1]
    (fact,) = evidence_of(writer.tokenizer, item)
    assert context.count(fact) == 1
    rest = " ".join(context.replace(fact, " ").split())
    whole = " ".join(haystack.split())
    # From some sentence on, and behind the end from the beginning again.
    assert rest in " ".join([whole] * 4)
    assert rest.count("Second one there!") > 1


def test_text_changes_nothing_but_the_text(writer):
    settings = {"subsets": ["niah_multikey_1"], "lengths": [1500], "samples": 2}
    plain = build_items(writer, **settings)
    own = build_items(writer, haystack="It rained. It snowed all day.", **settings)
    assert [item.references for item in plain] == [item.references for item in own]
    assert [item.prompt_ids for item in plain] != [item.prompt_ids for item in own]


def questions_file(folder: Path, n: int = 12) -> Path:
    path = folder / "questions.jsonl"
    lines = [
        {
            "question": f"Who ate apple {i}?",
            "answers": [f"Person {i}, the eater", f"Person {i}"],
            "context": f"Apple {i}.",
        }
        for i in range(n)
    ]
    lines[3]["documents"] = ["Apple 3.", "More about apple 3."]
    del lines[3]["context"]
    lines[4]["answer"] = lines[4].pop("answers")[1]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_questions_of_the_user(writer, tmp_path):
    questions = read_questions(questions_file(tmp_path))
    assert len(questions) == 12
    assert questions[3].documents == ("Apple 3.", "More about apple 3.")
    assert questions[4].answers == ("Person 4",)
    settings = {"subsets": ["qa"], "lengths": [800], "questions": questions}
    asked = {}
    for split in ("eval", "train"):
        items = build_items(writer, samples=20, split=split, **settings)
        texts = [text_of(writer.tokenizer, item.prompt_ids) for item in items]
        asked[split] = [re.search(r"Who ate apple (\d+)\?", text).group(1) for text in texts]
        for item, number, text in zip(items, asked[split], texts, strict=True):
            own = questions[int(number)]
            assert item.references == own.answers
            assert item.target == f" Person {number}"
            assert sorted(evidence_of(writer.tokenizer, item)) == sorted(own.documents)
            assert text.count("\n\nDocument" if split == "eval" else "\n\nNote") > 5
        # In the order of the file, then again.
        mine = [str(i) for i in range(12) if str(i) in asked[split]]
        assert asked[split] == [mine[at % len(mine)] for at in range(20)]
        # Distractors come from the split's own questions.
        told = set(re.findall(r"Apple (\d+)\.", "\n".join(texts)))
        assert told == set(mine)
    assert set(asked["eval"]) | set(asked["train"]) == {str(i) for i in range(12)}
    assert not set(asked["eval"]) & set(asked["train"])


def test_too_few_questions(writer, tmp_path):
    questions = read_questions(questions_file(tmp_path))[:1]
    with pytest.raises(
        LccpError, match=r"of 1 questions belong to the split 'eval', and no document of theirs is left"
    ):
        build_items(writer, subsets=["qa"], lengths=[900], samples=1, questions=questions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"questions\.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: expected a JSON object, got list"),
        ('{"question": "q", "context": "c"}', r"line 2: no field 'answers' or 'answer', got question, context"),
        (
            '{"question": "q", "answers": [], "context": "c"}',
            r"line 2: field 'answers' must be a text or a list of texts",
        ),
        ('{"question": "q", "answers": ["a", " "], "context": "c"}', r"line 2: field 'answers' must be"),
        ('{"question": 3, "answer": "a", "context": "c"}', r"line 2: field 'question' must be a text .* got 3"),
    ],
)
def test_bad_questions_say_which_line(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "q", "answer": "a", "context": "c"}\n' + line)
    with pytest.raises(LccpError, match=message):
        read_questions(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(LccpError, match=r"no questions at .*; give a JSONL file"):
        read_questions(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(LccpError, match="holds no questions"):
        read_questions(empty)
    empty.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(LccpError, match="is not UTF-8 "):
        read_questions(empty)


def test_what_cannot_be_asked(writer):
    good = {"lengths": [300], "samples": 1, "material": "organism"}
    with pytest.raises(LccpError, match=r"unknown RULER-style subset 'niah'; known: niah_single_1, .*, qa"):
        build_items(writer, **good, subsets=["niah"])
    with pytest.raises(LccpError, match="unknown RULER-style material 'latin'; known: english, organism"):
        build_items(writer, **{**good, "material": "latin"})
    with pytest.raises(LccpError, match="unknown RULER-style split 'test'; known: eval, train"):
        build_items(writer, **good, split="test")
    with pytest.raises(LccpError, match="samples must be at least 1, got 0"):
        build_items(writer, **{**good, "samples": 0})
    with pytest.raises(LccpError, match=r"no sample of ruler-vt fits 60 tokens: .*; ask for at least \d+"):
        build_items(writer, **{**good, "lengths": [60]}, subsets=["vt"])
    with pytest.raises(LccpError, match="the haystack is empty"):
        build_items(writer, **good, haystack=" \n ")


def test_in_a_chat_the_answer_prefix_is_the_models(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (item,) = build_items(PromptWriter(tokenizer, chat=True), subsets=["niah_single_1"], lengths=[900], samples=1)
    text = text_of(tokenizer, item.prompt_ids)
    assert text.startswith("[A special magic number is hidden")
    assert re.search(
        r"mentioned in the provided text\?\]> The special magic number for \S+ mentioned in the provided text is$", text
    )


# ---------------------------------------------------------------------------------------------------------------------
# RULER's own files
# ---------------------------------------------------------------------------------------------------------------------


def official(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_official_files(tmp_path, tokenizer):
    new = {
        "index": 77,
        "input": "Find it.\n\u2028Where?",
        "outputs": ["41", "7"],
        "length": 4000,
        "answer_prefix": " It is",
    }
    old = {"index": 78, "input": "Find it. Where? It is", "outputs": ["8"], "length": 3990, "answer_prefix": " It is"}
    official(tmp_path / "vt" / "validation.jsonl", [new, old])
    official(tmp_path / "qa_2.jsonl", [{"index": 0, "input": "Who?", "outputs": ["Ann", "Anna"], "length": 20}])
    items = read_ruler(tmp_path, tokenizer)
    assert [item.item_id for item in items] == ["ruler-qa_2-32-0", "ruler-vt-4096-0", "ruler-vt-4096-1"]
    qa_item, first, second = items
    assert (qa_item.benchmark, qa_item.grader, qa_item.max_new_tokens, qa_item.target) == (
        "RULER",
        "string_match_part",
        32,
        " Ann",
    )
    assert (first.subset, first.grader, first.max_new_tokens, first.target) == ("vt", "string_match_all", 30, " 41, 7")
    assert text_of(tokenizer, first.prompt_ids) == "Find it.\n\u2028Where? It is"
    assert text_of(tokenizer, second.prompt_ids) == "Find it. Where? It is"
    assert first.references == ("41", "7")
    assert first.evidence == first.stop == ()


def test_official_files_of_a_folder_of_their_length(tmp_path, tokenizer):
    file = official(
        tmp_path / "8192" / "data" / "cwe" / "validation.jsonl", [{"input": "a", "outputs": ["b"], "length": 30}]
    )
    assert read_ruler(file, tokenizer)[0].item_id == "ruler-cwe-8192-0"
    assert read_ruler(file, tokenizer, length=100)[0].length == 100
    # A year, or a number of some run, is no length.
    file = official(tmp_path / "2026" / "cwe.jsonl", [{"input": "a", "outputs": ["b"], "length": 130}])
    assert read_ruler(file, tokenizer)[0].length == 256
    file = official(tmp_path / "own.jsonl", [{"input": "a", "outputs": ["b"]}])
    # One token and the budget of 50.
    assert read_ruler(file, tokenizer, subset="fwe")[0].item_id == "ruler-fwe-64-0"


def test_two_official_files_of_one_task_and_length(tmp_path, tokenizer):
    for folder in ("data", "pred"):
        official(tmp_path / folder / "vt.jsonl", [{"input": "a", "outputs": ["b"], "length": 4000}])
    with pytest.raises(LccpError, match=r"pred/vt\.jsonl and .*data/vt\.jsonl are both of vt at 4096 tokens; give one"):
        read_ruler(tmp_path, tokenizer)


def test_official_prompts_are_tokens_as_the_tokenizer_makes_them(tmp_path, english):
    prompt = "Some special magic numbers.\n\nThe grass is green. \nWhat?"
    file = official(tmp_path / "niah_single_1.jsonl", [{"input": prompt, "outputs": ["1"], "answer_prefix": " It is"}])
    (item,) = read_ruler(file, english.tokenizer)
    assert list(item.prompt_ids) == english.tokenizer(prompt + " It is")["input_ids"]
    assert item.max_new_tokens == 128


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"outputs": ["a"]}, r"vt\.jsonl, line 2: fields 'input' and 'answer_prefix' must be texts, got None"),
        ({"input": "a", "outputs": "a"}, r"line 2: field 'outputs' must be a list of texts, none empty, got 'a'"),
        ({"input": "a", "outputs": []}, r"line 2: field 'outputs'"),
        ({"input": "a", "outputs": [3]}, r"line 2: field 'outputs'"),
        ({"input": "a", "outputs": ["b"], "answer_prefix": 3}, r"line 2: fields 'input' and 'answer_prefix'"),
    ],
)
def test_bad_official_lines_say_which(tmp_path, tokenizer, record, message):
    file = official(tmp_path / "vt.jsonl", [{"input": "a", "outputs": ["b"]}, record])
    with pytest.raises(LccpError, match=message):
        read_ruler(file, tokenizer)


def test_official_files_without_a_task(tmp_path, tokenizer):
    file = official(tmp_path / "mine.jsonl", [{"input": "a", "outputs": ["b"]}])
    with pytest.raises(
        LccpError, match=r"neither the file nor its folder is named after a RULER task; .* niah_single_1"
    ):
        read_ruler(file, tokenizer)
    with pytest.raises(LccpError, match=r"unknown RULER subset 'mine'; known: niah_single_1"):
        read_ruler(file, tokenizer, subset="mine")
    (tmp_path / "none").mkdir()
    with pytest.raises(LccpError, match="no RULER data in"):
        read_ruler(tmp_path / "none", tokenizer)
    with pytest.raises(LccpError, match="no RULER data at"):
        read_ruler(tmp_path / "vt.jsonl", tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Filler
# ---------------------------------------------------------------------------------------------------------------------


def test_no_key_is_part_of_another():
    words = {*filler.ADJECTIVES, *filler.NOUNS}
    assert len(words) == len(filler.ADJECTIVES) + len(filler.NOUNS)
    assert not [(a, b) for a in words for b in words if a != b and (b.startswith(a) or b.endswith(a))]


def test_compounds_are_different_and_halves_disjoint():
    first, second = (filler.compounds(Random(3), 10**6, half=slice(at, None, 2)) for at in (0, 1))
    assert len(set(first)) == len(first) > 10000
    assert not set(first) & set(second)
    parts = [key.split("-") for key in first]
    assert all(left != right for left, right in parts)
    # Adjectives in front as long as there are any.
    n_pairs = len(filler.ADJECTIVES[::2]) * len(filler.NOUNS[::2])
    assert all(left in filler.ADJECTIVES for left, _ in parts[:n_pairs])
    assert all(left in filler.NOUNS for left, _ in parts[n_pairs:])


def test_filler_is_plain_text():
    text = filler.filler_sentences(3000, seed=1)
    assert len(set(text)) > 2900
    assert all(re.fullmatch(r"[A-Z][a-z, ]+\.", sentence) for sentence in text)
    assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]", " ".join(text))
    assert len(words_in(text)) > 450


def test_writing_tasks_needs_no_torch():
    code = "import sys, lccp_interp.tasks.ruler, lccp_interp.scoring.graders; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
