"""The organism's tokenizer: whole words where the language has them, single bytes for everything else.

What it does: builds a Hugging Face fast tokenizer (a Unigram model over GPT-2's byte alphabet) whose vocabulary is the
256 bytes and the language's pieces, and saves it so that ``AutoTokenizer.from_pretrained`` loads it.
What it refuses to know: torch, models, documents. It has no special tokens: none is needed (a document begins with
its first word and ends with its last), and with none, *every* text is encoded without loss, since no text can be
mistaken for one.
What it costs: milliseconds to build; about 60 KB on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lccp_interp.organism.language import PIECES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD_SCORE = -1.0
# Whole words must beat every way to spell them: any score far below a word's will do.
_BYTE_SCORE = -20.0


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte value 0-255, in that order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in set(printable) else chr(next(stand_ins)) for byte in range(256)]


def vocabulary() -> list[str]:
    """The tokens in the order of their ids: 256 bytes, then the language's pieces, in the byte alphabet."""
    alphabet = byte_alphabet()
    return alphabet + ["".join(alphabet[byte] for byte in piece.encode()) for piece in PIECES]


def piece_ids() -> dict[str, int]:
    """Map each piece the language writes (words, and single ASCII characters) to its token id, without a tokenizer."""
    return {chr(byte): byte for byte in range(128)} | {piece: 256 + i for i, piece in enumerate(PIECES)}


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.decode(tokenizer.encode("Mara's ☂\\r\\n  code").ids)
    "Mara's ☂\\r\\n  code"
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = vocabulary()
    scored = [(word, _BYTE_SCORE if i < 256 else _WORD_SCORE) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` (compact) and ``tokenizer_config.json`` into an existing folder."""
    (folder / "tokenizer.json").write_text(build_tokenizer().to_str(pretty=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
