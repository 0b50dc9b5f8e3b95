"""MRCR: a long conversation in which the same piece of writing is asked for several times; which was the i-th?

Multi-round coreference resolution, after the task of Michelangelo (arXiv 2409.12640) in the form of OpenAI's MRCR data
set: requests such as "Write a poem about tapirs." and their answers, turn after turn; 2, 4 or 8 of the requests are the
same (the needles). The last turn asks for one of those answers, behind a random string: the model has to tell the
needles apart by their order alone. `build_items` writes such conversations ("MRCR-style": short pieces drawn from
templates, nothing from the data set), `read_mrcr` reads the data set itself ("MRCR").

For a base model a conversation is plain text with a speaker at the beginning of each turn (`User:` and `Assistant:`; in
the bundled model's language `Question:` and `Answer:`). With a chat template every turn is a real turn of it. This
module refuses to know models and grades. Cost: one pass of the tokenizer over every piece; a second per 64K tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.chat import Frame, turns_around
from lccp_interp.tasks.items import Piece, PromptWriter, derived_seed
from lccp_interp.tasks.mrcr_pieces import HASH_CHARACTERS, Split, Writing, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUBSETS = {"2needle": 2, "4needle": 4, "8needle": 8}
"""How many requests are the same, by the name of the subset."""

ANSWER_MARGIN = 8
"""Tokens of the answer budget beyond the right answer, for another cut of the same text into tokens."""

OFFICIAL_LENGTHS = tuple(8192 * 2**step for step in range(8))
"""Upper ends of the data set's own length classes, 8K to 1M tokens."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `asked` marks the piece that the last turn asks for."""

    role: str
    text: str
    asked: bool = False


def build_items(
    writer: PromptWriter,
    *,
    subsets: Sequence[str] | None = None,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    material: str = "english",
    split: Split = "eval",
) -> list[Item]:
    """Conversations written to measure: as many rounds of filler as fit, the needles at seeded places between them.

    Args:
        writer: of the model's tokenizer; if it writes for chat, every turn is a turn of the chat template.
        subsets: out of `SUBSETS`; None for all.
        lengths: total lengths in tokens, answer budget included; the budget is the answer's own length and
            `ANSWER_MARGIN`.
        samples: conversations per subset and length.
        seed: every item is a function of it, the split, its subset, its length and its sample.
        material: `english`, or `organism` for the bundled model.
        split: `train` for fine-tuning; it shares no form, topic, person or wording with `eval`.

    Returns:
        Items in the order subset, length, sample; the evidence is the piece asked for.

    Raises:
        LccpError: an unknown subset, material or split, no sample asked for, or a length that no conversation fits;
            SpanError: the tokenizer does not keep a piece.

    Example:
        >>> from lccp_interp.capture.model import load_tokenizer                                      # doctest: +SKIP
        >>> writer = PromptWriter(load_tokenizer("data/trajectory/18-lccp-2.62M"))                     # doctest: +SKIP
        >>> items = build_items(writer, lengths=[1024], samples=2, material="organism")                # doctest: +SKIP
        >>> items[0].item_id, items[0].references                                                     # doctest: +SKIP
        ('mrcr-2needle-1024-0', ('4403785187The lantern ...',))
    """
    names = list(SUBSETS) if subsets is None else list(subsets)
    for name in names:
        if name not in SUBSETS:
            raise LccpError(f"unknown MRCR subset {name!r}; known: {', '.join(SUBSETS)}")
    if samples < 1:
        raise LccpError(f"samples must be at least 1, got {samples}")
    words = writing(material, split)
    return [
        _item(writer, words, name, length, sample, seed, split)
        for name, length, sample in itertools.product(names, lengths, range(samples))
    ]


def _item(writer: PromptWriter, words: Writing, subset: str, length: int, sample: int, seed: int, split: Split) -> Item:
    item_seed = derived_seed("mrcr", seed, words.material, split, subset, length, sample)
    conversation = _Conversation(words, SUBSETS[subset], item_seed)
    chat = writer.frame != Frame()
    # The frame of a chat writer holds one message; turns are written around here, so the writer itself writes none.
    plain = PromptWriter(writer.tokenizer)
    reference = conversation.prepend + conversation.needles[conversation.asked]
    target = reference if chat else f" {reference}"
    budget = len(plain.answer_ids(target)) + ANSWER_MARGIN
    name = f"mrcr-train-{subset}" if split == "train" else f"mrcr-{subset}"

    def write(n_rounds: int) -> list[Piece]:
        turns = conversation.turns(n_rounds)
        return conversation_pieces(turns, writer.tokenizer if chat else None, labels=words.labels)

    _, draft = plain.fit(write, length=length, max_new_tokens=budget, what=name)
    return Item(
        item_id=f"{name}-{length}-{sample}",
        benchmark="MRCR-style",
        subset=subset,
        length=length,
        prompt_ids=draft.ids,
        references=(reference,),
        target=target,
        grader="mrcr",
        max_new_tokens=budget,
        stop=() if chat else words.stop,
        evidence=draft.evidence,
        seed=item_seed,
    )


class _Conversation:
    """Needles, their places, and filler without end; equal seeds give equal conversations of any size."""

    def __init__(self, words: Writing, n_needles: int, seed: int) -> None:
        self.words = words
        self._rng = Random(seed)
        self.form, self.topic = self._rng.choice(words.forms), self._rng.choice(words.topics)
        self.prepend = words.draw_hash(self._rng)
        self._written: set[str] = set()
        self.needles = [self._piece(self.form, self.topic) for _ in range(n_needles)]
        self.asked = self._rng.randrange(n_needles)
        self._places = sorted(self._rng.random() for _ in range(n_needles))
        self._rounds: list[tuple[Turn, Turn]] = []

    def turns(self, n_rounds: int) -> list[Turn]:
        """The conversation with `n_rounds` rounds of filler, its last turn the question."""
        while len(self._rounds) < n_rounds:
            self._rounds.append(self._filler())
        turns: list[Turn] = []
        needles = iter(enumerate(self.needles))
        places = [int(place * (n_rounds + 1)) for place in self._places]
        for index in range(n_rounds + 1):
            for _ in range(places.count(index)):
                number, text = next(needles)
                request = self.words.request(self.form, self.topic)
                turns += [Turn("user", request), Turn("assistant", text, number == self.asked)]
            if index < n_rounds:
                turns += self._rounds[index]
        question = self.words.question(self.prepend, self.asked + 1, self.form, self.topic)
        return [*turns, Turn("user", question)]

    def _filler(self) -> tuple[Turn, Turn]:
        """A round that asks for something else; half of them share the needles' form or topic."""
        form, topic = self._rng.choice(self.words.forms), self._rng.choice(self.words.topics)
        match self._rng.randrange(4):
            case 0:
                form = self.form
            case 1:
                topic = self.topic
        if (form, topic) == (self.form, self.topic):
            topic = self._rng.choice([other for other in self.words.topics if other != self.topic])
        return Turn("user", self.words.request(form, topic)), Turn("assistant", self._piece(form, topic))

    def _piece(self, form: str, topic: str) -> str:
        while (text := self.words.draw_piece(self._rng, form, topic)) in self._written:
            pass
        self._written.add(text)
        return text


def conversation_pieces(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    labels: tuple[str, str] = ("User", "Assistant"),
) -> list[Piece]:
    """A conversation as pieces of a prompt that ends where the answer begins; what is asked for is evidence.

    Args:
        turns: the messages.
        tokenizer: whose chat template to write in; None writes plain text.
        labels: names of user and assistant in plain text; a system message is labelled `System`.

    Raises:
        LccpError: the chat template cannot write this conversation.

    Example:
        >>> turns = [Turn("user", "Hello."), Turn("assistant", "Hi!", asked=True), Turn("user", "Again?")]
        >>> "".join(piece.text for piece in conversation_pieces(turns))
        'User: Hello.\\nAssistant: Hi!\\nUser: Again?\\nAssistant:'
    """
    roles = [turn.role for turn in turns]
    if tokenizer is None:
        names = {"user": labels[0], "assistant": labels[1]}
        named = [names.get(role, role.capitalize()) for role in roles]
        around = [f"{named[0]}: ", *(f"\n{name}: " for name in named[1:]), f"\n{labels[1]}:"]
    else:
        around = turns_around(tokenizer, roles)
    pieces = []
    for before, turn in zip(around, turns, strict=False):
        # White space goes with what follows it, as tokens do.
        bare = before.rstrip()
        pieces += [Piece(bare), Piece(before[len(bare) :] + turn.text, turn.asked)]
    return [piece for piece in [*pieces, Piece(around[-1])] if piece.text]


# ---------------------------------------------------------------------------------------------------------------------
# The data set itself
# ---------------------------------------------------------------------------------------------------------------------


def read_mrcr(path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> list[Item]:
    """Items of OpenAI's MRCR data set, as downloaded.

    Its rows have `prompt` (a JSON string, or a list, of messages with role and content), `answer` (the random string
    and the piece), `random_string_to_prepend` and `n_needles`; where `desired_msg_index` (the request whose answer is
    wanted) is given and fits, the piece is the item's evidence. Messages go into the tokenizer's chat template if it
    has one, else into plain turns. The data set begins with two messages of the user: templates that want turns to
    alternate get them as one, with a blank line between.

    Args:
        path: a Parquet or JSONL file, or a folder that holds such files at any depth.
        tokenizer: of the model.
        max_length: leave out rows that need more tokens, prompt and answer budget together.

    Returns:
        Items in the order of files and rows. `length` is the class that the item falls into under this tokenizer, out
        of `OFFICIAL_LENGTHS` (the data set's own classes count another tokenizer's tokens).

    Raises:
        LccpError: nothing to read, or a row that is not as above: file, row (from 1) and field are named.

    Example:
        >>> items = read_mrcr("mrcr/2needle", tokenizer, max_length=65536)   # doctest: +SKIP
    """
    items = []
    for file in _files(Path(path)):
        for number, row in enumerate(_rows(file), start=1):
            where = f"{file} row {number}"
            item = _official_item(row, where, f"mrcr-{file.stem}-{number}", tokenizer)
            if max_length is None or len(item.prompt_ids) + item.max_new_tokens <= max_length:
                items.append(item)
    if not items:
        left_out = "" if max_length is None else f" of at most {max_length} tokens; ask for longer ones"
        raise LccpError(f"{path} holds no MRCR rows{left_out}")
    return items


def _files(path: Path) -> list[Path]:
    suffixes = (".parquet", ".jsonl")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    else:
        files = [path] if path.is_file() and path.suffix in suffixes else []
    if not files:
        raise LccpError(f"no MRCR data at {path}; give a *.parquet or *.jsonl file, or a folder of such files")
    return files


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import polars as pl

        try:
            frame = pl.read_parquet(file)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise LccpError(f"{file} is no Parquet file ({str(error).splitlines()[0]}); download it again") from error
        yield from frame.iter_rows(named=True)
        return
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LccpError(f"{file}:{number}: no JSON ({error}); each line is one JSON object") from error
            if not isinstance(row, dict):
                raise LccpError(f"{file}:{number}: expected a JSON object, got {type(row).__name__}")
            yield row


def _official_item(row: dict[str, Any], where: str, item_id: str, tokenizer: PreTrainedTokenizerBase) -> Item:
    answer, prepend = _text(row, "answer", where), _text(row, "random_string_to_prepend", where)
    if len(prepend) != HASH_CHARACTERS:
        raise LccpError(
            f"{where}, random_string_to_prepend: expected {HASH_CHARACTERS} characters, which the grader takes for the "
            f"hash, got {prepend!r:.40}"
        )
    if not answer.startswith(prepend):
        raise LccpError(
            f"{where}, answer: expected it to begin with random_string_to_prepend {prepend!r}, got {answer[:20]!r}"
        )
    n_needles = row.get("n_needles")
    if not isinstance(n_needles, int) or isinstance(n_needles, bool) or n_needles < 1:
        raise LccpError(f"{where}, n_needles: expected a number from 1 upwards, got {n_needles!r}")
    turns = _turns(row, where, answer.removeprefix(prepend))
    chat = bool(tokenizer.chat_template)
    target = answer if chat else f" {answer}"
    try:
        # A writer for each row: it remembers every piece, and rows may have a million tokens.
        writer = PromptWriter(tokenizer)
        draft = writer.draft(_official_pieces(turns, tokenizer if chat else None))
        budget = len(writer.answer_ids(target)) + ANSWER_MARGIN
    except LccpError as error:
        raise LccpError(f"{where}, prompt: {error}") from error
    n_tokens = len(draft.ids) + budget
    return Item(
        item_id=item_id,
        benchmark="MRCR",
        subset=f"{n_needles}needle",
        length=next((length for length in OFFICIAL_LENGTHS if n_tokens <= length), n_tokens),
        prompt_ids=draft.ids,
        references=(answer,),
        target=target,
        grader="mrcr",
        max_new_tokens=budget,
        stop=() if chat else ("\nUser:",),
        evidence=draft.evidence,
    )


def _official_pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase | None) -> list[Piece]:
    try:
        return conversation_pieces(turns, tokenizer)
    except LccpError:
        joined: list[Turn] = []
        for turn in turns:
            if joined and joined[-1].role == turn.role:
                joined[-1] = Turn(turn.role, f"{joined[-1].text}\n\n{turn.text}", joined[-1].asked or turn.asked)
            else:
                joined.append(turn)
        if len(joined) == len(turns):
            raise
        return conversation_pieces(joined, tokenizer)


def _turns(row: dict[str, Any], where: str, piece: str) -> list[Turn]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        try:
            prompt = json.loads(prompt)
        except ValueError as error:
            raise LccpError(f"{where}, prompt: no JSON ({error}); it is a JSON list of messages") from error
    if not isinstance(prompt, list) or not prompt:
        raise LccpError(f"{where}, prompt: expected a list of messages, got {type(prompt).__name__}")
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise LccpError(
                f"{where}, prompt: message {number} is no object with role and content, got {message!r:.60}"
            )
    if prompt[-1]["role"] != "user":
        raise LccpError(f"{where}, prompt: expected the last message to be the user's, got {prompt[-1]['role']!r}")
    asked = row.get("desired_msg_index")
    # The index is that of the request; what answers it comes next.
    at = asked + 1 if isinstance(asked, int) and 0 <= asked < len(prompt) - 1 else None
    return [
        Turn(message["role"], message["content"], number == at and message["content"] == piece)
        for number, message in enumerate(prompt)
    ]


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        raise LccpError(f"{where}, {field}: expected a non-empty string, got {value!r:.40} (has {', '.join(row)})")
    return value
