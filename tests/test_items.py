"""Prompts for free answers: spans by construction, lengths by accounting, the chat template around them."""

from __future__ import annotations

import pytest
from external import external
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lccp_interp.schema import Item, LccpError, Span, SpanError
from lccp_interp.tasks.chat import Frame
from lccp_interp.tasks.items import Piece, PromptWriter, derived_seed, natural_material

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture
def chat_tokenizer(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TURNS
    return tokenizer


def test_spans_decode_to_their_pieces(tokenizer):
    draft = PromptWriter(tokenizer).draft(
        [Piece("It was quiet."), Piece(" Mara enjoys chess.", True), Piece("\nÉtienne slept.", True)],
        answer_prefix=" Answer:",
    )
    assert text_of(tokenizer, draft.ids) == "It was quiet. Mara enjoys chess.\nÉtienne slept. Answer:"
    parts = [text_of(tokenizer, draft.ids[span.start : span.end]) for span in draft.evidence]
    assert parts == [" Mara enjoys chess.", "\nÉtienne slept."]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_spans_decode_to_their_pieces_under_real_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    pieces = [Piece("First."), Piece(" Oslo is 42, café.", True), Piece("\n\nLast one: 7f3a", True), Piece("!")]
    draft = PromptWriter(tokenizer).draft(pieces)
    for span, piece in zip(draft.evidence, pieces[1:3], strict=True):
        assert text_of(tokenizer, draft.ids[span.start : span.end]).strip() == piece.text.strip()
    assert text_of(tokenizer, draft.ids).endswith("First. Oslo is 42, café.\n\nLast one: 7f3a!")


def test_evidence_that_a_tokenizer_loses_is_an_error(tokenizer, monkeypatch):
    writer = PromptWriter(tokenizer)
    monkeypatch.setattr(writer.encoder, "middle", lambda pieces, after=None: [[65] for _ in pieces])
    with pytest.raises(SpanError, match="evidence cannot be placed under this tokenizer"):
        writer.draft([Piece("a"), Piece(" secret", True)])


def test_fit_is_the_largest_that_leaves_room(tokenizer):
    writer = PromptWriter(tokenizer)

    def write(n):
        return [Piece("Mara slept.")] + [Piece(f" The river moved {i}.") for i in range(n)] + [Piece("\nAnswer:")]

    for length in range(40, 300, 13):
        n, draft = writer.fit(write, length=length, max_new_tokens=20, what="rivers")
        # The slow way: try all sizes.
        sizes = [size for size in range(1, 100) if len(writer.draft(write(size)).ids) + 20 <= length]
        assert n == sizes[-1]
        assert draft == writer.draft(write(n))
        assert len(draft.ids) == writer.n_tokens(write(n)) <= length - 20


def test_a_length_that_no_sample_fits_says_what_would(tokenizer):
    writer = PromptWriter(tokenizer)

    def write(n):
        return [Piece("Mara slept.")] * n

    needed = writer.n_tokens(write(1)) + 9
    with pytest.raises(LccpError, match=rf"no sample of naps fits 5 tokens.*take {needed}; ask for at least {needed}"):
        writer.fit(write, length=5, max_new_tokens=9, what="naps")
    assert writer.fit(write, length=needed, max_new_tokens=9, what="naps")[0] == 1


def test_a_chat_template_stands_around_the_message(chat_tokenizer):
    writer = PromptWriter(chat_tokenizer, chat=True)
    draft = writer.draft([Piece("It rained."), Piece(" Mara slept.", True)], answer_prefix="It was")
    assert text_of(chat_tokenizer, draft.ids) == "<|user|>\nIt rained. Mara slept.\n<|assistant|>\nIt was"
    assert text_of(chat_tokenizer, draft.ids[draft.evidence[0].start : draft.evidence[0].end]) == " Mara slept."


@pytest.mark.parametrize("puts_bos", [True, False])
def test_a_frame_does_not_repeat_the_beginning_of_text(puts_bos):
    tokenizer = AutoTokenizer.from_pretrained(external("tokenizers/llama3"))
    bos = tokenizer.bos_token
    single = f"{bos} $A" if puts_bos else "$A"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(bos, 128000)])
    assert (tokenizer("a")["input_ids"][0] == 128000) is puts_bos
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    assert Frame.of(tokenizer).opening == ("[INST] " if puts_bos else f"{bos}[INST] ")
    ids = PromptWriter(tokenizer, chat=True).draft([Piece("Hello.")]).ids
    assert ids[0] == 128000
    assert ids.count(128000) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; leave out --chat"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "writes the user's message 2 times"),
        ("{{ raise_exception('system first') }}", "fails on a single message of the user: system first"),
    ],
)
def test_unusable_chat_templates(chat_tokenizer, template, message):
    chat_tokenizer.chat_template = template
    with pytest.raises(LccpError, match=message):
        PromptWriter(chat_tokenizer, chat=True)


def test_answers_follow_the_prompt(tokenizer):
    assert text_of(tokenizer, PromptWriter(tokenizer).answer_ids(" Oslo")) == " Oslo"


def test_material_follows_the_tokenizer(tokenizer):
    assert natural_material(tokenizer) == "organism"
    english = AutoTokenizer.from_pretrained(external("tokenizers/llama3"))
    assert natural_material(english) == "english"


def test_items_refuse_what_cannot_be_asked():
    good = {
        "item_id": "i", "benchmark": "b", "subset": "s", "length": 8, "prompt_ids": (1, 2), "references": ("x",),
        "target": " x", "grader": "g", "max_new_tokens": 3,
    }  # fmt: skip
    Item(**good)
    with pytest.raises(LccpError, match="item i: an item needs a prompt, a reference and room for an answer"):
        Item(**{**good, "references": ()})
    with pytest.raises(SpanError, match=r"item i: evidence .* outside a prompt of 2 tokens"):
        Item(**good, evidence=(Span(1, 3),))


def test_seeds_are_functions_of_their_parts():
    assert derived_seed("a", 1) == derived_seed("a", 1)
    assert len({derived_seed("a", 1), derived_seed("a", 2), derived_seed("b", 1), derived_seed("a", 1, 0)}) == 4
