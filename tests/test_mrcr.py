"""MRCR: conversations whose needles differ by their order alone, and the rows of the data set itself."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from random import Random

import polars as pl
import pytest
from external import external
from transformers import AutoTokenizer

from lccp_interp.schema import LccpError
from lccp_interp.scoring.graders import GRADERS
from lccp_interp.tasks.chat import turns_around
from lccp_interp.tasks.items import PromptWriter
from lccp_interp.tasks.mrcr import SUBSETS, Turn, build_items, conversation_pieces, read_mrcr
from lccp_interp.tasks.mrcr_pieces import _POOLS, HASH_CHARACTERS, ordinal, writing

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = {"english": 5000, "organism": 500}
TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}<go>"
)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@functools.cache
def real_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))


def evidence_of(tokenizer, item) -> str:
    (span,) = item.evidence
    return text_of(tokenizer, item.prompt_ids[span.start : span.end]).strip()


@pytest.fixture
def chat_tokenizer(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TURNS
    return tokenizer


@pytest.mark.parametrize("material", ["english", "organism"])
def test_golden_prompts(tokenizer, material):
    items = build_items(PromptWriter(tokenizer), lengths=[LENGTHS[material]], samples=1, material=material)
    shown = [
        f"=== {item.item_id}\n{text_of(tokenizer, item.prompt_ids)}{item.target}\n=== max_new_tokens "
        f"{item.max_new_tokens}, stop {item.stop}, evidence {item.evidence}\n"
        for item in items
    ]
    assert "".join(shown) == (GOLDEN / f"mrcr-{material}.txt").read_text()


@pytest.mark.parametrize("split", ["eval", "train"])
@pytest.mark.parametrize("material", ["english", "organism"])
def test_the_answer_is_the_ith_of_the_same_requests(tokenizer, material, split):
    """Read the finished prompt as a reader would: list the answers to the request, take the one that is asked for."""
    items = build_items(
        PromptWriter(tokenizer), lengths=[2 * LENGTHS[material]], samples=4, material=material, split=split, seed=3
    )
    words = writing(material, split)
    for item in items:
        text = text_of(tokenizer, item.prompt_ids)
        user, assistant = words.labels
        turns = re.split(rf"\n?(?:{user}|{assistant}): ?", text)[1:]
        *rounds, question, rest = turns
        assert rest == ""
        asked = [
            (form, topic, index)
            for form, topic in itertools.product(words.forms, words.topics)
            for index in range(1, SUBSETS[item.subset] + 1)
            if question == words.question(item.references[0][:HASH_CHARACTERS], index, form, topic)
        ]
        ((form, topic, index),) = asked
        answers = [
            answer
            for request, answer in zip(rounds[::2], rounds[1::2], strict=True)
            if request == words.request(form, topic)
        ]
        assert len(answers) == len(set(answers)) == SUBSETS[item.subset]
        assert item.references[0][HASH_CHARACTERS:] == answers[index - 1] == evidence_of(tokenizer, item)
        assert item.target == f" {item.references[0]}"
        assert len(rounds) == len(set(rounds[1::2])) * 2 > 2 * SUBSETS[item.subset]
        assert item.benchmark == "MRCR-style"
        assert item.grader == "mrcr"
    assert len({item.references for item in items}) == len(items)


@pytest.mark.parametrize("material", ["english", "organism"])
def test_only_the_piece_that_is_asked_for_is_right(tokenizer, material):
    for item in build_items(PromptWriter(tokenizer), lengths=[LENGTHS[material]], samples=3, material=material):
        grade, (reference,) = GRADERS[item.grader], item.references
        assert grade(item.target, item.references) == 1
        assert grade(reference[HASH_CHARACTERS:], item.references) == 0
        turns = text_of(tokenizer, item.prompt_ids).split(f"\n{writing(material).labels[1]}: ")[1:]
        others = [turn.split(f"\n{writing(material).labels[0]}: ")[0] for turn in turns]
        scores = [grade(reference[:HASH_CHARACTERS] + other, item.references) for other in others]
        assert sorted(scores)[-1] == 1
        assert sorted(scores)[-2] < 0.75


def test_every_place_is_asked_for_and_needles_spread(tokenizer):
    items = build_items(PromptWriter(tokenizer), subsets=["4needle"], lengths=[1000], samples=40, material="organism")
    depths = [item.evidence[0].start / len(item.prompt_ids) for item in items]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    asked = [int(re.findall(r"(\d) for \w+\.\nAnswer:$", text_of(tokenizer, item.prompt_ids))[0]) for item in items]
    assert set(asked) == {1, 2, 3, 4}


def test_prompts_fill_their_length(tokenizer):
    for item in build_items(PromptWriter(tokenizer), lengths=[800, 1500], samples=3, material="organism"):
        answer = PromptWriter(tokenizer).answer_ids(item.target)
        assert len(answer) < item.max_new_tokens <= len(answer) + 10
        # One more round, of about 40 tokens, would not have fitted.
        assert item.length - 60 < len(item.prompt_ids) + item.max_new_tokens <= item.length


def test_an_item_is_a_function_of_its_own_place(tokenizer):
    writer = PromptWriter(tokenizer)
    many = build_items(writer, lengths=[600, 900], samples=3, material="organism", seed=7)
    one = build_items(writer, subsets=["4needle"], lengths=[900], samples=2, material="organism", seed=7)
    assert one == [item for item in many if item.item_id in ("mrcr-4needle-900-0", "mrcr-4needle-900-1")]
    other = build_items(writer, subsets=["4needle"], lengths=[900], samples=2, material="organism", seed=8)
    assert not {item.references for item in one} & {item.references for item in other}
    assert len({item.item_id for item in many}) == len(many) == 18


@pytest.mark.parametrize("material", ["english", "organism"])
def test_splits_share_no_form_topic_person_hash_or_wording(material):
    mine, theirs = writing(material, "eval"), writing(material, "train")
    for field in ("forms", "topics", "persons", "hash_openings"):
        ours, others = set(getattr(mine, field)), set(getattr(theirs, field))
        assert ours
        assert not ours & others
    assert mine.request_form != theirs.request_form
    assert mine.question_form != theirs.question_form
    templates = [{line for form in words.templates for line in (*form.openings, *form.lines, *form.closings)}
                 for words in (mine, theirs)]  # fmt: skip
    assert not templates[0] & templates[1]
    rng = Random(0)
    pieces = {words: {words.draw_piece(rng, form, words.topics[0]) for form in words.forms for _ in range(200)}
              for words in (mine, theirs)}  # fmt: skip
    assert not pieces[mine] & pieces[theirs]
    spoken = {word for piece in pieces[mine] for word in re.findall(r"\w+", piece)}
    assert not spoken & (set(theirs.persons) - set(_POOLS["place"]))


def test_pieces_of_one_request_are_not_told_apart_by_their_request():
    words, rng = writing("english"), Random(1)
    for form in words.forms:
        pieces = [words.draw_piece(rng, form, "tapirs") for _ in range(50)]
        assert len(set(pieces)) == 50
        for piece in pieces:
            assert "tapirs" in piece
            assert "{" not in piece
            assert not re.search(r"\b[Aa] [aeiou]", piece)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@pytest.mark.parametrize("chat", [False, True])
def test_spans_and_lengths_under_real_tokenizers(name, chat):
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = TURNS if chat else None
    for item in build_items(PromptWriter(tokenizer, chat=chat), lengths=[2048], samples=2):
        assert evidence_of(tokenizer, item) == item.references[0][HASH_CHARACTERS:]
        assert 2048 - 150 < len(item.prompt_ids) + item.max_new_tokens <= 2048
        assert item.target == ("" if chat else " ") + item.references[0]
        assert text_of(tokenizer, item.prompt_ids).endswith("<|assistant|>\n" if chat else "\nAssistant:")
        if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            assert item.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_writer_writes_real_turns(chat_tokenizer):
    (item,) = build_items(
        PromptWriter(chat_tokenizer, chat=True), subsets=["2needle"], lengths=[500], samples=1, material="organism"
    )
    text = text_of(chat_tokenizer, item.prompt_ids)
    contents = re.findall(r"<\|(user|assistant)\|>\n(.*)", text)
    messages = [{"role": role, "content": content} for role, content in contents[:-1]]
    assert messages[0]["role"] == messages[-1]["role"] == "user"
    assert text == chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert item.target == item.references[0]
    assert item.stop == ()
    assert evidence_of(chat_tokenizer, item) in [message["content"] for message in messages[1::2]]


def test_texts_around_turns_do_not_repeat_the_beginning_of_text():
    tokenizer = real_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + TURNS
    around = turns_around(tokenizer, ["user", "assistant", "user"])
    opening = "" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else tokenizer.bos_token
    assert around == [
        f"{opening}<|user|>\n", "\n<|assistant|>\n", "\n<|user|>\n", "\n<|assistant|>\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; leave out --chat"),
        ("{{ messages[0]['content'] }}", "writes 1 messages of 3, expected each once and in order"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "writes 6 messages of 3"),
        ("{{ raise_exception('no turns') }}", "fails on 3 turns: no turns"),
    ],
)
def test_templates_that_cannot_write_a_conversation(chat_tokenizer, template, message):
    chat_tokenizer.chat_template = template
    with pytest.raises(LccpError, match=message):
        turns_around(chat_tokenizer, ["user", "assistant", "user"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": ["3needle"]}, "unknown MRCR subset '3needle'; known: 2needle, 4needle, 8needle"),
        ({"material": "latin"}, "unknown material 'latin'; known: english, organism"),
        ({"split": "test"}, "unknown split 'test'; known: eval, train"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"lengths": [100]}, r"no sample of mrcr-2needle fits 100 tokens.*ask for at least \d+"),
    ],
)
def test_what_cannot_be_built(tokenizer, options, message):
    with pytest.raises(LccpError, match=message):
        build_items(PromptWriter(tokenizer), **{"lengths": [500], "samples": 1, "material": "organism", **options})


def test_ordinals():
    assert [ordinal(n) for n in range(1, 9)] == ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th"]


# The data set itself.

MESSAGES = [
    {"role": "user", "content": "Here are examples of such conversations."},
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "  Tapirs, tapirs,\n\nall day long.  "},
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "No tapirs today, Étienne."},
    {"role": "user", "content": "Prepend aYooSG8CQg to the 1st (1 indexed) poem about tapirs."},
]
ROW = {
    "prompt": json.dumps(MESSAGES),
    "answer": "aYooSG8CQg  Tapirs, tapirs,\n\nall day long.  ",
    "random_string_to_prepend": "aYooSG8CQg",
    "n_needles": 2,
    "desired_msg_index": 1,
    "total_messages": 6,
    "n_chars": 300,
    "date_added": "12/5/2025",
}


def written(folder: Path, *rows: dict) -> Path:
    path = folder / "2needle_0.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_official_rows_from_jsonl_and_parquet(tokenizer, tmp_path):
    (tmp_path / "2needle").mkdir()
    four = {**ROW, "n_needles": 4, "desired_msg_index": 3, "answer": "aYooSG8CQgNo tapirs today, Étienne."}
    path = written(tmp_path, ROW, four)
    pl.DataFrame([ROW, four]).write_parquet(tmp_path / "2needle" / "2needle_0.parquet")
    items = read_mrcr(path, tokenizer)
    assert items == read_mrcr(tmp_path / "2needle", tokenizer)
    assert len(read_mrcr(tmp_path, tokenizer)) == 4
    assert [item.item_id for item in items] == ["mrcr-2needle_0-1", "mrcr-2needle_0-2"]
    assert [item.subset for item in items] == ["2needle", "4needle"]
    assert [item.benchmark for item in items] == ["MRCR", "MRCR"]
    assert [item.references for item in items] == [(ROW["answer"],), (four["answer"],)]
    assert [evidence_of(tokenizer, item) for item in items] == [MESSAGES[2]["content"].strip(), MESSAGES[4]["content"]]
    names = {"user": "User", "assistant": "Assistant"}
    plain = "\n".join(f"{names[message['role']]}: {message['content']}" for message in MESSAGES)
    assert text_of(tokenizer, items[0].prompt_ids) == f"{plain}\nAssistant:"
    assert items[0].length == 8192
    assert items[0].target == " " + ROW["answer"]


def test_an_index_that_does_not_fit_gives_no_evidence(tokenizer, tmp_path):
    for index in (0, 3, 99, None):
        (item,) = read_mrcr(written(tmp_path, {**ROW, "desired_msg_index": index}), tokenizer)
        assert item.evidence == ()


def test_official_rows_in_chat_templates(chat_tokenizer, tmp_path):
    path = written(tmp_path, ROW)
    (item,) = read_mrcr(path, chat_tokenizer)
    rendered = chat_tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text_of(chat_tokenizer, item.prompt_ids) == rendered
    assert item.target == ROW["answer"]
    # A template that wants turns to alternate gets the two first messages as one.
    chat_tokenizer.chat_template = ALTERNATING
    (item,) = read_mrcr(path, chat_tokenizer)
    text = text_of(chat_tokenizer, item.prompt_ids)
    assert text.startswith(f"<user>\n{MESSAGES[0]['content']}\n\n{MESSAGES[1]['content']}\n<assistant>\n")
    assert text.endswith("\n<go>")
    assert evidence_of(chat_tokenizer, item) == MESSAGES[2]["content"].strip()


def test_long_rows_can_be_left_out(tokenizer, tmp_path):
    long = {**ROW, "prompt": json.dumps([{"role": "user", "content": "Mara " * 2000}, *MESSAGES[1:]])}
    path = written(tmp_path, long, ROW)
    assert [item.item_id for item in read_mrcr(path, tokenizer, max_length=1000)] == ["mrcr-2needle_0-2"]
    with pytest.raises(LccpError, match="holds no MRCR rows of at most 10 tokens; ask for longer ones"):
        read_mrcr(path, tokenizer, max_length=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, r"row 2, answer: expected a non-empty string, got None"),
        ({"answer": "Tapirs"}, r"row 2, answer: expected it to begin with random_string_to_prepend 'aYooSG8CQg'"),
        ({"random_string_to_prepend": 7}, r"row 2, random_string_to_prepend: expected a non-empty string, got 7"),
        ({"random_string_to_prepend": "aYooS"}, r"row 2, random_string_to_prepend: expected 10 characters"),
        ({"n_needles": "2"}, r"row 2, n_needles: expected a number from 1 upwards, got '2'"),
        ({"prompt": "[{"}, r"row 2, prompt: no JSON"),
        ({"prompt": "{}"}, r"row 2, prompt: expected a list of messages, got dict"),
        ({"prompt": '[{"role": "user"}]'}, r"row 2, prompt: message 0 is no object with role and content"),
        ({"prompt": json.dumps(MESSAGES[:3])}, r"row 2, prompt: expected the last message to be the user's"),
    ],
)
def test_malformed_rows_are_named(tokenizer, tmp_path, change, message):
    with pytest.raises(LccpError, match=rf"2needle_0\.jsonl {message}"):
        read_mrcr(written(tmp_path, ROW, {**ROW, **change}), tokenizer)


def test_a_template_that_fails_names_the_row(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(LccpError, match=r"2needle_0\.jsonl row 1, prompt: the chat template of .* fails on 5 turns"):
        read_mrcr(written(tmp_path, ROW), chat_tokenizer)


def test_files_that_hold_no_rows(tokenizer, tmp_path):
    with pytest.raises(LccpError, match=r"no MRCR data at .*nowhere; give a \*\.parquet or \*\.jsonl file"):
        read_mrcr(tmp_path / "nowhere", tokenizer)
    with pytest.raises(LccpError, match=r"holds no MRCR rows$"):
        read_mrcr(written(tmp_path), tokenizer)
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1 nothing")
    with pytest.raises(LccpError, match=r"x\.parquet is no Parquet file .*download it again"):
        read_mrcr(broken, tokenizer)
    lines = tmp_path / "y.jsonl"
    lines.write_text("nothing\n")
    with pytest.raises(LccpError, match=r"y\.jsonl:1: no JSON"):
        read_mrcr(lines, tokenizer)
    lines.write_text("[1]\n")
    with pytest.raises(LccpError, match=r"y\.jsonl:1: expected a JSON object, got list"):
        read_mrcr(lines, tokenizer)


def test_plain_turns_are_one_line_each():
    turns = [Turn("system", "Be short."), Turn("user", "Hello."), Turn("assistant", "Hi."), Turn("user", "Bye.")]
    pieces = conversation_pieces(turns, labels=("Question", "Answer"))
    assert "".join(piece.text for piece in pieces) == (
        "System: Be short.\nQuestion: Hello.\nAnswer: Hi.\nQuestion: Bye.\nAnswer:"
    )
