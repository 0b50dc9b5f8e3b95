"""Cases: exact lengths, exact spans, on every kind of tokenizer."""

from __future__ import annotations

import json

import pytest
from external import external
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lccp_interp.organism import language
from lccp_interp.schema import LccpError, Needle, SpanError
from lccp_interp.tasks.haystack import Haystack, place_in, read_haystack, sentences
from lccp_interp.tasks.needles import WU_PROMPT
from lccp_interp.tasks.niah import NiahGrid, build_cases, read_needles
from lccp_interp.tasks.pieces import PieceEncoder
from lccp_interp.tasks.twins import FoldedText, Twins, refuse_twins

# Line breaks at the end stand in strings, where Jinja keeps them.
CHATS = {
    "tagged": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>\n' }}",
    "llama2": "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]",
    "llama3": "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\n{{ messages[0].content }}<|eot_id|>"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
}
NEEDLES = (
    Needle(
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
        "What is the best thing to do in San Francisco?",
        "eat a sandwich and sit in Dolores Park on a sunny day.",
    ),
    Needle("Mr Green wears 1234567 hats.", "What does Mr Green wear?", "Mr Green wears 1234567 hats."),
    Needle('She said: "naïve café"!', "What did she say?", "naïve café"),
)
TEXT = "It rained in the town. Mara walked home slowly, and nobody saw her! Who knows why? " * 60


def decoded(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def check_spans(cases, needles, tokenizer):
    """The law: exact length, and the decoded spans are the needle and its answer."""
    for case in cases:
        needle = needles[int(case.needle_id[1:])]
        assert len(case.prompt_ids) + len(case.answer_ids) == case.length
        assert decoded(tokenizer, case.prompt_ids[case.source.start : case.source.end]).strip() == needle.answer
        assert decoded(tokenizer, case.prompt_ids[case.needle.start : case.needle.end]).strip() == needle.needle
        assert decoded(tokenizer, case.answer_ids).strip() == needle.answer
        asked = case.prompt_ids[case.question.start : case.question.end]
        assert needle.question in decoded(tokenizer, asked)
        assert needle.question not in decoded(tokenizer, asked[1:])
        assert needle.question not in decoded(tokenizer, asked[:-1])


@pytest.mark.parametrize("prompt", ["paper", "wu", WU_PROMPT, "Read this:\n{context}\n\nQ: {question} A: "])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_span_law_on_real_tokenizers_and_essays(name, prompt):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    needles = list(NEEDLES)
    for line in external("haystack/needles.jsonl").read_text().splitlines():
        entry = json.loads(line)
        needles.append(Needle(entry["needle"], entry["question"], entry["needle"]))
        if entry["real_needle"] in entry["needle"]:
            needles.append(Needle(entry["needle"], entry["question"], entry["real_needle"]))
    grid = NiahGrid(
        lengths=(200, 1000, 8192),
        depths=(0, 1, 25, 50, 99, 100),
        samples=2,
        needles=tuple(needles),
        haystack=read_haystack(external("haystack/essays")),
        prompt=prompt,
    )
    cases = build_cases(grid, tokenizer)
    assert len(cases) == grid.n_cases == 3 * 6 * 2 * len(needles)
    check_spans(cases, needles, tokenizer)


@pytest.mark.parametrize("prompt", ["paper", "wu"])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_span_law_in_a_chat(name, prompt):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    tokenizer.chat_template = CHATS[name]
    grid = NiahGrid(
        lengths=(200, 1000), depths=(0, 30, 100), needles=NEEDLES, haystack=TEXT * 2, prompt=prompt, chat=True
    )
    cases = build_cases(grid, tokenizer)
    check_spans(cases, NEEDLES, tokenizer)
    for case in cases:
        # The same message, put in its place by the template itself.
        text = decoded(tokenizer, case.prompt_ids)
        opening = {"llama2": "[INST] ", "llama3": "<|end_header_id|>\n\n"}[name]
        message = text.split(opening, 1)[1].split("\nAnswer:")[0] + "\nAnswer:"
        assert tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False) == text
        assert case.prompt_ids.count(tokenizer.bos_token_id) == 1


@given(seed=st.integers(0, 10**6), length=st.integers(120, 900), depth=st.floats(0, 100))
@settings(max_examples=25, deadline=None)
def test_span_law_in_the_bundled_language(tokenizer, seed, length, depth):
    (case,) = build_cases(NiahGrid(lengths=(length,), depths=(depth,), seed=seed), tokenizer)
    assert len(case.prompt_ids) + len(case.answer_ids) == length
    source = case.prompt_ids[case.source.start : case.source.end]
    assert source == case.answer_ids  # answers follow a blank in needle and prompt alike
    assert case.prompt_ids.count(10) >= 2  # the line breaks before question and answer


def test_the_prompt_has_the_papers_form(tokenizer):
    needle = Needle("The code of Mara is 4 0 7.", "What is the code of Mara?", "4 0 7")
    grid = NiahGrid(lengths=(160,), depths=(0, 50, 100), needles=(needle,), haystack=TEXT)
    front, middle, end = (decoded(tokenizer, c.prompt_ids) for c in build_cases(grid, tokenizer))
    tail = "\nQuestion: What is the code of Mara?\nAnswer:"
    assert front.startswith("The code of Mara is 4 0 7.\nIt rained in the town.")
    assert "\nThe code of Mara is 4 0 7.\n" in middle
    assert middle.split("\nThe code")[0][-1] in ".!?"
    assert middle.endswith(tail)
    assert end.endswith("\nThe code of Mara is 4 0 7." + tail)


CODE = Needle("The code of Mara is 4 0 7.", "What is the code of Mara?", "4 0 7")
LAMP = "The lamp fell. A horse crossed the bridge at night! Who saw it? " * 20
GOLDEN = {
    ("paper", False): (
        "The lamp fell. A horse crossed the bridge at night! Who saw it? The lamp fell.\nThe code of Mara is 4 0 7.\n"
        "A horse crossed the bridge at night! Who saw it? The lamp fell. A horse crossed the bridge at night! Who "
        "saw it\nQuestion: What is the code of Mara?\nAnswer:",
        " 4 0 7",
    ),
    ("wu", False): (
        "The lamp fell. A horse crossed the bridge at night! Who saw it? The code of Mara is 4 0 7. The lamp fell. "
        "A horse crossed the bridge at night! Who saw it? The lamp fell"
        "Based on the content of the book, Question: What is the code of Mara?\nAnswer:",
        " 4 0 7",
    ),
    ("paper", True): (
        "<|user|>\nThe lamp fell. A horse crossed the bridge at night!\nThe code of Mara is 4 0 7.\n"
        "Who saw it? The lamp fell. A horse crossed the bridge at night! Who s\n"
        "Question: What is the code of Mara?\nAnswer:<|end|>\n<|assistant|>\n",
        "4 0 7",
    ),
    ("wu", True): (
        "<|user|>\nThe lamp fell. The code of Mara is 4 0 7. A horse crossed the bridge at night! Who saw it? The "
        "lamp fBased on the content of the book, Question: What is the code of Mara?\nAnswer:<|end|>\n<|assistant|>\n",
        "4 0 7",
    ),
}


@pytest.mark.parametrize(("prompt", "chat"), GOLDEN)
def test_golden_prompts(checkpoint, prompt, chat):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = CHATS["tagged"]
    grid = NiahGrid(lengths=(110,), depths=(50,), needles=(CODE,), haystack=LAMP, prompt=prompt, chat=chat)
    (case,) = grid.build(tokenizer)
    assert (decoded(tokenizer, case.prompt_ids), decoded(tokenizer, case.answer_ids)) == GOLDEN[prompt, chat]


def test_between_sentences_the_needle_is_joined_by_blanks_alone(tokenizer):
    """Taking the needle out again gives the haystack as it was."""
    grid = NiahGrid(lengths=(300,), depths=(0, 20, 60, 100), needles=(CODE,), haystack=LAMP, prompt="wu")
    for case in grid.build(tokenizer):
        text = decoded(tokenizer, case.prompt_ids).split("Based on")[0]
        needle = decoded(tokenizer, case.prompt_ids[case.needle.start : case.needle.end])
        assert text.count(needle) == 1
        assert LAMP.startswith(text.replace(needle, "").lstrip())


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(LccpError, match="has no chat template; leave out --chat"):
        NiahGrid(lengths=(300,), chat=True).build(tokenizer)


def test_settings_that_came_later_leave_older_configs_as_they_were():
    old = NiahGrid(lengths=(256,)).config()
    assert list(old) == ["task", "lengths", "depths", "samples", "needles", "haystack", "prompt", "seed"]
    assert NiahGrid(lengths=(256,), prompt="paper").config() == old
    assert NiahGrid(lengths=(256,), chat=True).config() == {**old, "chat": True}
    between = NiahGrid(lengths=(256,), prompt="wu").config()
    assert between == {**old, "prompt": WU_PROMPT, "needle_place": "between sentences"}
    assert NiahGrid(lengths=(256,), prompt=WU_PROMPT).config() == {**old, "prompt": WU_PROMPT}


@pytest.mark.parametrize("depth", [3, 10, 30, 61, 90, 99])
def test_the_needle_stands_at_the_sentence_boundary_nearest_below_its_depth(tokenizer, depth):
    """Slow twin: decode, find the needle as text, and look at every sentence end before and after it."""
    (case,) = build_cases(NiahGrid(lengths=(700,), depths=(depth,), needles=NEEDLES[:1], haystack=TEXT), tokenizer)
    pieces = [decoded(tokenizer, [token]) for token in case.prompt_ids]
    text, needle = "".join(pieces), NEEDLES[0].needle
    before, after = text.split(needle)
    after = after.split("\nQuestion:")[0]
    n_before, n_after = len(tokenizer(before.rstrip("\n")).input_ids), len(tokenizer(after).input_ids)
    n_context = n_before + n_after
    sentence_ends = [0]
    ends = [i + 1 for i, character in enumerate(TEXT) if character in ".!?"]
    sentence_ends += [len(tokenizer(TEXT[:end]).input_ids) for end in ends]
    nearest_below = max(n for n in sentence_ends if n <= depth / 100 * n_context)
    assert n_before == nearest_below


def test_run_on_text_reaches_every_depth(tokenizer):
    for text in ("字" * 3000, "word\n" * 3000, "word " * 3000):
        grid = NiahGrid(lengths=(7000,), depths=(0, 30, 60, 90), needles=NEEDLES[:1], haystack=text)
        places = [case.needle.start for case in build_cases(grid, tokenizer)]
        assert len(set(places)) == 4
        assert places == sorted(places)


def test_samples_read_different_places_and_seeds_repeat(tokenizer):
    def prompts(seed):
        grid = NiahGrid(lengths=(300,), depths=(50,), samples=4, needles=NEEDLES[:1], haystack=TEXT * 3, seed=seed)
        return [case.prompt_ids for case in build_cases(grid, tokenizer)]

    assert prompts(0) == prompts(0)
    assert len(set(prompts(0))) > 1
    assert prompts(0)[0] == prompts(1)[0]  # the first sample reads from the top
    assert prompts(0) != prompts(1)


def test_a_haystack_with_too_few_places_for_the_samples(tokenizer):
    grid = NiahGrid(lengths=(300,), depths=(50,), samples=50, needles=NEEDLES[:1], haystack=TEXT[:1800])
    with pytest.raises(LccpError, match=r"has \d+ places from which \d+ tokens can be read, 50 samples are asked for"):
        build_cases(grid, tokenizer)


def test_in_the_bundled_language_every_sample_and_depth_and_seed_is_its_own(tokenizer):
    def drawn(seed):
        cases = build_cases(NiahGrid(lengths=(300,), depths=(25, 75), samples=3, seed=seed), tokenizer)
        needles = [case.prompt_ids[case.needle.start : case.needle.end] for case in cases]
        return needles, [case.haystack_id for case in cases]

    needles, haystacks = drawn(0)
    assert len(set(needles)) == len(set(haystacks)) == 6
    others, other_haystacks = drawn(1)
    assert not set(needles) & set(others)
    assert not set(haystacks) & set(other_haystacks)


@pytest.mark.parametrize(
    ("needle", "answer", "message"),
    [
        ("Mara met Mara.", "Mara", "stands 2 times in its needle"),
        ("x is \ud800.", "x", "half a character"),
    ],
)
def test_needles_that_cannot_be_used(needle, answer, message):
    with pytest.raises(LccpError, match=message):
        Needle(needle, "q?", answer)


def test_the_answer_is_the_word_and_not_a_piece_of_another():
    assert Needle("In 2019 the code was 19.", "Code?", "19").answer_start == 21
    assert Needle("The cat had a c", "What?", "c").answer_start == 14
    assert Needle("是七八九", "?", "七八九").answer_start == 1


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_answers_without_a_blank_before_them(name):
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    chinese = Needle("密码是七八九。", "密码是什么?", "七八九")
    cases = build_cases(NiahGrid(lengths=(300,), needles=(chinese,), haystack=TEXT * 2), tokenizer)
    check_spans(cases, (chinese,), tokenizer)
    assert all(set(c.answer_ids) & set(c.prompt_ids[c.source.start : c.source.end]) for c in cases)


def test_an_answer_that_shares_no_token_with_itself_is_refused():
    """Behind the cue it would be another token than in the needle: every head would score 0 by construction."""
    tokenizer = AutoTokenizer.from_pretrained(external("tokenizers/llama3"))
    needle = Needle("Mara is the queen.", "Who is the queen?", "Mara")
    with pytest.raises(
        SpanError, match=r"'Mara' has no token in common with itself.*so that there the answer follows a b"
    ):
        build_cases(NiahGrid(lengths=(300,), depths=(0,), needles=(needle,), haystack="It rained. " * 300), tokenizer)


def test_a_lossy_tokenizer_is_refused_with_the_text(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    grid = NiahGrid(lengths=(400,), needles=NEEDLES[:1], haystack=TEXT)
    with pytest.raises(SpanError, match=r"the answer of needle n0 cannot be placed under this tokenizer.*eat a sand"):
        build_cases(grid, tokenizer)


def test_a_tokenizer_without_line_breaks_is_refused():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "best": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(SpanError, match=r"gives '\\n' no tokens of its own in mid-text: it drops every character"):
        build_cases(NiahGrid(lengths=(400,), needles=NEEDLES[:1], haystack=TEXT), tokenizer)


def test_special_tokens_in_front_are_kept_and_counted(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert PieceEncoder(tokenizer).prefix == [bos]
    grid = NiahGrid(lengths=(300,), needles=NEEDLES[:1], haystack=TEXT)
    cases = build_cases(grid, tokenizer)
    assert all(case.prompt_ids[0] == bos and case.prompt_ids.count(bos) == 1 for case in cases)
    check_spans(cases, NEEDLES, tokenizer)


def test_haystack_split_is_exact(tokenizer):
    haystack = Haystack(TEXT, PieceEncoder(tokenizer))
    for n_context in (1, 2, 50, 51, 777):
        for depth in (0.0, 0.1, 0.5, 0.999, 1.0):
            before, after = haystack.split(n_context, depth)
            assert len(before) + len(after) == n_context
            assert len(before) <= max(depth * n_context, 0)


def test_sentences():
    assert sentences("One. Two! 3.5 is a number? Yes.") == ["One.", " Two!", " 3.5 is a number?", " Yes."]
    assert sentences('He said "No." Then left.\n\nA title\n\nEnd') == [
        'He said "No."',
        " Then left.",
        "\n\nA title",
        "\n\nEnd",
    ]
    assert sentences("你好。再见！") == ["你好。", "再见！"]
    hard_wrapped = "a line\nthat goes on"
    assert sentences(hard_wrapped) == [hard_wrapped]
    run_on = "word " * 300
    assert len(sentences(run_on)) > 3
    assert "".join(sentences(run_on)) == run_on


def test_a_haystack_too_short_says_how_much_is_missing(tokenizer):
    grid = NiahGrid(lengths=(4000,), needles=NEEDLES[:1], haystack="Only this. " * 10)
    with pytest.raises(LccpError, match=r"the haystack has \d+ tokens, \d+ are needed; give a longer text"):
        build_cases(grid, tokenizer)


def test_a_length_without_room_says_how_much_is_needed(tokenizer):
    with pytest.raises(LccpError, match=r"length 30 has no room for a context: needle n0.*ask for at least \d+"):
        build_cases(NiahGrid(lengths=(30,), needles=NEEDLES[:1], haystack=TEXT), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (101,)}, "depth 101 is outside 0-100"),
        ({"depths": (-1,)}, "depth -1 is outside 0-100"),
        ({"lengths": ()}, "at least one length"),
        ({"lengths": (0,)}, "above 0, got 0"),
        ({"lengths": (256, 256)}, "name a value twice"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"needles": ()}, "list of needles is empty"),
        ({"prompt": "papre"}, "unknown prompt 'papre'; give paper or wu, or a template"),
        ({"prompt": "{question}"}, r"must hold \{context\} exactly once"),
        ({"prompt": "{question} {context}"}, r"\{context\} before \{question\}"),
    ],
)
def test_grid_mistakes(change, message):
    with pytest.raises(LccpError, match=message):
        NiahGrid(**{"lengths": (256,), **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"needle": "a b", "question": "q"}', r"needles.jsonl:1: field 'answer' is missing .*repeat the needle"),
        ('\n{"needle": "a", "answer": "a"}', r"needles.jsonl:2: field 'question' is missing \(has answer, needle\)"),
        ('{"needle": "a", "question": " ", "answer": "a"}', r":1: a needle's field 'question' must be a non-empty"),
        ('{"needle": "a", "question": "q", "answer": 3}', r":1: a needle's field 'answer' must be a non-empty"),
        ('{"needle": "a b", "question": "q", "answer": "c"}', r":1: the answer 'c' is not part of its needle 'a b'"),
        ("{broken", r"needles.jsonl:1: no JSON"),
        ('["a"]', r"needles.jsonl:1: expected a JSON object, got list"),
        ("\n \n", "holds no needles"),
    ],
)
def test_needle_file_mistakes_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "needles.jsonl"
    path.write_text(content)
    with pytest.raises(LccpError, match=message):
        read_needles(path)


def test_needle_file(tmp_path):
    path = tmp_path / "needles.jsonl"
    path.write_text('{"needle": "x is 1.", "question": "x?", "answer": "1", "extra": 2}\n\n')
    assert read_needles(path) == (Needle("x is 1.", "x?", "1"),)
    with pytest.raises(LccpError, match="no needle file at"):
        read_needles(tmp_path / "none.jsonl")


def test_haystack_files(tmp_path):
    with pytest.raises(LccpError, match="no haystack at"):
        read_haystack(tmp_path / "none.txt")
    with pytest.raises(LccpError, match=r"is empty \(0 files read\)"):
        read_haystack(tmp_path)
    (tmp_path / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.\n")
    assert read_haystack(tmp_path) == "First.\n\nSecond."
    (tmp_path / "c.txt").write_bytes(b"ok \xff\xfe")
    with pytest.raises(LccpError, match=r"c.txt is not UTF-8 \(byte 3\)"):
        read_haystack(tmp_path)


def twins_slowly(text, phrase):
    """Word by word: every run of whole words of the text against those of the phrase."""
    words, wanted = text.lower().split(), phrase.lower().split()
    hits = [at for at in range(len(words) - len(wanted) + 1) if words[at : at + len(wanted)] == wanted]
    if not hits:
        return None
    first = at = 0
    for _ in range(hits[0] + 1):
        first = text.index(text[at:].split(None, 1)[0], at)
        at = first + len(text[at:].split(None, 1)[0])
    return Twins(len(hits), first)


@given(
    words=st.lists(st.sampled_from(["a", "A", "b", "Ab", "ba", "7"]), max_size=12),
    blanks=st.lists(st.sampled_from([" ", "\n", "  ", "\t\n"]), min_size=13, max_size=13),
    phrase=st.lists(st.sampled_from(["a", "b", "ab", "7"]), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_twins_against_a_slow_search(words, blanks, phrase):
    text = blanks[0] + "".join(word + blank for word, blank in zip(words, blanks[1:], strict=False))
    assert FoldedText(text).twins(" ".join(phrase)) == twins_slowly(text, " ".join(phrase))


@pytest.mark.parametrize(
    ("text", "phrase", "n"),
    [
        ("In 2019 the code was 19.", "19", 1),
        ("the cat; CAT! (cat) concat cat's", "cat", 4),
        ("密码是七八九。七八九", "七八九", 2),
        ("Straße, STRASSE", "strasse", 2),
        ("nothing", "thing", 0),
        ("x", " ", 0),
    ],
)
def test_twins_are_words_of_their_own(text, phrase, n):
    found = FoldedText(text).twins(phrase)
    assert (found.n if found else 0) == n


def test_a_haystack_that_holds_a_needle_is_refused(tokenizer):
    text = "It snowed. " * 50 + "THE code of\nMara is 4 0 7, they said. The code of Mara is 4 0 7."
    message = (
        r"the haystack holds needles itself: n0 \('The code of Mara is 4 0 7'\) 2 times \(first at character 550\); "
        "a head that retrieves from there would get no credit"
    )
    with pytest.raises(LccpError, match=message):
        NiahGrid(lengths=(200,), needles=(CODE,), haystack=text).build(tokenizer)


def test_answers_in_the_haystack_are_counted_and_told(tokenizer):
    text = "The number 4 0 7 is odd. " + LAMP + "So is 4 0 7."
    with pytest.warns(UserWarning, match=r"holds answers itself: n0 \('4 0 7'\) 2 times \(first at character 11\)"):
        cases = NiahGrid(lengths=(200,), depths=(50,), needles=(CODE,), haystack=text).build(tokenizer)
    assert len(cases) == 1


def test_needles_of_the_bundled_language_are_looked_for_in_the_users_text(tokenizer):
    drawn = language.needles(1, seed=1)[0]
    grid = NiahGrid(lengths=(200,), depths=(50,), haystack=LAMP)
    (case,) = grid.build(tokenizer)
    needle = decoded(tokenizer, case.prompt_ids[case.needle.start : case.needle.end])
    assert needle != drawn.needle
    with pytest.raises(LccpError, match=r"holds needles itself: s0d50 .* 1 time \(first at character 0\)"):
        NiahGrid(lengths=(200,), depths=(50,), haystack=f"{needle} {LAMP}").build(tokenizer)


def test_many_twins_are_named_in_part():
    needles = {f"n{i}": Needle(f"Door {i} is open.", "?", "open") for i in range(6)}
    text = " ".join(needle.needle for needle in needles.values())
    with pytest.raises(LccpError, match=r"n3 \('Door 3 is open'\) 1 time \(first at character 48\), and 2 more;"):
        refuse_twins(text, needles)


def test_a_twin_in_a_folder_is_named_with_its_file(tmp_path):
    (tmp_path / "a.txt").write_text("First.\n")
    (tmp_path / "b.txt").write_text(" It rained. Door 1 is open.")
    (tmp_path / "c.txt").write_text("\n")
    text = read_haystack(tmp_path)
    with pytest.raises(LccpError, match=r"1 time \(first at .*b\.txt, character 11\)"):
        refuse_twins(text, {"n0": Needle("Door 1 is open.", "?", "open")})
    assert place_in(text, 0) == f"{tmp_path / 'a.txt'}, character 0"
    assert place_in(str(text), 20) == "character 20"


def test_what_has_no_tokens_is_refused(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("zzz", "")
    needle = Needle("Mara is zzz", "Who is Mara?", "zzz")
    with pytest.raises(SpanError, match=r"the answer of needle n0 cannot be placed .*'zzz' becomes ' ' in tokens"):
        NiahGrid(lengths=(300,), needles=(needle,), haystack=LAMP).build(tokenizer)
    with pytest.raises(SpanError, match="gives 'zzz' no tokens of its own in mid-text: it drops every character of it"):
        PieceEncoder(tokenizer).middle(["a", "zzz"])


def test_bundled_haystacks_do_not_give_the_answer_away(tokenizer):
    for case in build_cases(NiahGrid(lengths=(2048,), depths=(50,), samples=5), tokenizer):
        outside = case.prompt_ids[: case.needle.start] + case.prompt_ids[case.needle.end :]
        needle = case.prompt_ids[case.needle.start : case.needle.end]
        assert decoded(tokenizer, needle[:6]).strip() not in decoded(tokenizer, outside)


def test_the_bundled_language_is_a_function_of_its_seed():
    assert language.needles(3, seed=5) == language.needles(3, seed=5)
    assert language.needles(3, seed=5) != language.needles(3, seed=6)


def test_span_law_on_a_slow_byte_tokenizer():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    grid = NiahGrid(lengths=(600, 1500), depths=(0, 40, 100), needles=NEEDLES, haystack=TEXT)
    check_spans(build_cases(grid, tokenizer), NEEDLES, tokenizer)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_template_that_opens_with_text_reads_as_one_text(name):
    """What follows the template's opening is mid-text: no blank may slip in where SentencePiece would begin a text."""
    tokenizer = AutoTokenizer.from_pretrained(external(f"tokenizers/{name}"))
    prompt = "Read this:\n{context}\n\nQ: {question} A:"
    grid = NiahGrid(lengths=(300,), depths=(0, 50, 100), needles=NEEDLES[:1], haystack=TEXT * 2, prompt=prompt)
    for case in build_cases(grid, tokenizer):
        text = decoded(tokenizer, case.prompt_ids)
        assert text.startswith("Read this:\n" + ("The best" if case.depth_fraction == 0 else "It rained"))
        assert tokenizer(text, add_special_tokens=False).input_ids[:12] == list(case.prompt_ids[:12])
