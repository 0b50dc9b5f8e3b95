"""RULER-style tasks: needles, variable tracking, counting words and question answering, at any length.

After Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654) and
its repository NVIDIA/RULER. `build_items` writes new samples with the same settings (benchmark "RULER-style"),
`read_ruler` reads the data that RULER's own scripts write (benchmark "RULER").

Kept: the subsets and their numbers of keys, values, hops and counts, the needle sentence, the questions, the answer
prefixes, the answer budgets, the metrics, the accounting (prompt and budget together are at most `length`), the worked
example of `vt` and `cwe`. Different, so that scores should not be set beside published ones:
- The sentences around the contexts have other words, and so has the first half of `fwe`'s question.
- The answer prefix of `vt` ends without its blank, which most tokenizers put in front of the answer.
- Text to hide needles in is the user's, cut at sentences and read from a seeded place, or generated; not essays.
- Needles in needles and noise stand at one of 40 depths, as they do in text; there is one `qa`, not two.
- What `aggregation` and `qa` say of their words and documents.
- An answer budget is the right answer's own length where a tokenizer needs more than RULER's for it.
- Prompts are tokens piece by piece, so that evidence has exact places: line breaks never merge with what is before.

Everything comes in two splits without a common needle, name or wording, `eval` to ask and `train` to fine-tune; filler
text is common to both. In the organism's language questions have the form the bundled model knows ("Question: ...",
"Answer:"), in both splits. This package refuses to know models and grades. Cost: see `build_items`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from lccp_interp.organism import language
from lccp_interp.schema import Item, LccpError
from lccp_interp.tasks.filler import filler_sentences
from lccp_interp.tasks.haystack import sentences
from lccp_interp.tasks.items import MATERIALS, PromptWriter, derived_seed
from lccp_interp.tasks.ruler.aggregation import write_cwe, write_fwe
from lccp_interp.tasks.ruler.niah import write_niah
from lccp_interp.tasks.ruler.official import read_ruler
from lccp_interp.tasks.ruler.qa import write_qa
from lccp_interp.tasks.ruler.questions import UserQuestion, read_questions
from lccp_interp.tasks.ruler.setting import SPLITS, Sample, Setting
from lccp_interp.tasks.ruler.tracing import write_vt

__all__ = ["SUBSETS", "UserQuestion", "build_items", "read_questions", "read_ruler"]

SUBSETS: dict[str, Callable[[Setting], Sample]] = {
    **{
        f"niah_{name}": write_niah
        for name in (
            "single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery",
        )
    },
    "vt": write_vt,
    "cwe": write_cwe,
    "fwe": write_fwe,
    "qa": write_qa,
}  # fmt: skip
"""What writes each subset, in RULER's order."""

# Sentences of generated filler; behind their end they begin again. The organism reads 4096 tokens, others far more.
_FILLER_SENTENCES = {"english": 8192, "organism": 1024}


def build_items(
    writer: PromptWriter,
    *,
    subsets: Sequence[str] | None = None,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    material: str = "english",
    split: str = "eval",
    haystack: str | None = None,
    questions: Sequence[UserQuestion] = (),
) -> list[Item]:
    """Samples of every subset and length, as long as they can be.

    Args:
        writer: for the model's tokenizer.
        subsets: out of `SUBSETS`; None for all.
        lengths: tokens of prompt and answer budget together.
        samples: per subset and length.
        seed: every item is a function of it and of its subset, length, sample and split.
        material: `english`, or `organism` for the bundled model.
        split: `eval`, or `train` for fine-tuning.
        haystack: a text to hide needles in; None for generated filler.
        questions: for `qa`; none for generated documents.

    Returns:
        Items in the order subset, length, sample.

    Raises:
        LccpError: an unknown subset, material or split, no samples, a length that a subset does not fit, an empty
            haystack, or too few questions.

    Example:
        >>> writer = PromptWriter(load_tokenizer("data/trajectory/18-lccp-2.62M"))                   # doctest: +SKIP
        >>> items = build_items(writer, lengths=[512], samples=1, material="organism")               # doctest: +SKIP
        >>> items[0].item_id, items[0].references                                                   # doctest: +SKIP
        ('ruler-niah_single_1-512-0', ('254726',))
    """
    names = list(SUBSETS) if subsets is None else list(subsets)
    for what, name, known in (
        *(("subset", name, SUBSETS) for name in names), ("material", material, MATERIALS), ("split", split, SPLITS),
    ):  # fmt: skip
        if name not in known:
            raise LccpError(f"unknown RULER-style {what} {name!r}; known: {', '.join(known)}")
    if samples < 1:
        raise LccpError(f"samples must be at least 1, got {samples}")
    text = _sentences_of(haystack) if haystack is not None else _filler(material, split, seed)
    make = partial(_item, writer, seed=seed, material=material, split=split, text=text, questions=questions)
    return [make(name, length, sample) for name in names for length in lengths for sample in range(samples)]


def _item(
    writer: PromptWriter,
    subset: str,
    length: int,
    index: int,
    *,
    seed: int,
    material: str,
    split: str,
    text: Sequence[str],
    questions: Sequence[UserQuestion],
) -> Item:
    item_seed = derived_seed("ruler", seed, material, split, subset, length, index)
    # The text's length decides where to begin in it, and nothing else.
    start = derived_seed(item_seed, "start") % len(text)
    setting = Setting(subset, length, material, split, Random(item_seed), text, start, index, questions)
    sample = SUBSETS[subset](setting)
    name = f"ruler-train-{subset}" if split == "train" else f"ruler-{subset}"
    item_id = f"{name}-{length}-{index}"
    # A tokenizer with short tokens may need more than RULER's budget for the right answer alone.
    budget = max(sample.max_new_tokens, len(writer.answer_ids(sample.target)))
    _, draft = writer.fit(
        sample.write, length=length, max_new_tokens=budget, answer_prefix=sample.answer_prefix,
        what=name, at_least=sample.at_least,
    )  # fmt: skip
    return Item(
        item_id=item_id,
        benchmark="RULER-style",
        subset=subset,
        length=length,
        prompt_ids=draft.ids,
        references=sample.references,
        target=sample.target,
        grader=sample.grader,
        max_new_tokens=budget,
        # The organism's answers are one line; RULER lets models write until the budget ends.
        stop=("\n",) if material == "organism" else (),
        evidence=draft.evidence,
        seed=item_seed,
    )


def _sentences_of(text: str) -> list[str]:
    # Paragraphs are joined, as RULER's essays are: line breaks are what sets needles off elsewhere.
    found = [sentence.strip() for sentence in sentences(" ".join(text.split()))]
    if not found:
        raise LccpError("the haystack is empty; give a text file or a folder of *.txt files")
    return found


def _filler(material: str, split: str, seed: int) -> list[str]:
    n, text_seed = _FILLER_SENTENCES[material], derived_seed("ruler", seed, split, "filler")
    if material == "english":
        return filler_sentences(n, seed=text_seed)
    rng = Random(text_seed)
    found: list[str] = []
    others = set(language.NAMES[1 - SPLITS.index(split) :: 2])
    while len(found) < n:
        sentence = language.filler_sentence(rng)
        if others.isdisjoint(sentence.removesuffix(".").split()):
            found.append(sentence)
    return found
