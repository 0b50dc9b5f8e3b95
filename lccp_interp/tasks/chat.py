"""Chat templates: what a tokenizer's own template writes around messages.

A base model reads a prompt as it is; a chat model expects it inside its turns. `Frame` holds the text before and after
one message of the user, `turns_around` the texts around the messages of a conversation, found by rendering the template
around marks. It refuses to know what the messages say. Cost: one rendering per tokenizer, or per conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lccp_interp.schema import LccpError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u2983message\u2984"


@dataclass(frozen=True)
class Frame:
    """Text around a user's message, special tokens written out; both parts are empty for a base model.

    `opening` does not hold the tokenizer's beginning-of-text token: `PieceEncoder.prefix` puts it in front.
    """

    opening: str = ""
    closing: str = ""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """The frame that the tokenizer's chat template makes, up to where the answer begins.

        Raises:
            LccpError: the tokenizer has no chat template, or one that changes the message.
        """
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise LccpError(f"the tokenizer of {name} has no chat template; leave out --chat for a base model")
        messages = [{"role": "user", "content": _MARK}]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is code of others and may raise anything
            raise LccpError(f"the chat template of {name} fails on a single message of the user: {error}") from error
        if text.count(_MARK) != 1:
            raise LccpError(
                f"the chat template of {name} writes the user's message {text.count(_MARK)} times, expected once; "
                "leave out --chat and give the turns in --prompt"
            )
        opening, closing = text.split(_MARK)
        return cls(_without_bos(tokenizer, opening), closing)


def turns_around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """Texts that the tokenizer's chat template writes around the messages of a conversation.

    Args:
        tokenizer: with a chat template.
        roles: who says each message, in order; the last is the user.

    Returns:
        `len(roles) + 1` texts: before the first message, between two, and after the last up to where the answer begins.
        The first does not hold the beginning-of-text token that the tokenizer itself puts in front.

    Raises:
        LccpError: no chat template, or one that refuses these roles, changes a message or leaves one out.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise LccpError(f"the tokenizer of {name} has no chat template; leave out --chat for a base model")
    marks = [f"\u2983{index}\u2984" for index in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is code of others and may raise anything
        raise LccpError(f"the chat template of {name} fails on {len(roles)} turns: {error}") from error
    found = re.findall("\u2983\\d+\u2984", text)
    if found != marks:
        raise LccpError(
            f"the chat template of {name} writes {len(found)} messages of {len(marks)}, expected each once and in "
            "order; leave out --chat"
        )
    around = re.split("\u2983\\d+\u2984", text)
    around[0] = _without_bos(tokenizer, around[0])
    return around


def _without_bos(tokenizer: PreTrainedTokenizerBase, opening: str) -> str:
    """The beginning of a rendered conversation, less what the tokenizer will put there itself."""
    bos = tokenizer.bos_token
    return opening[len(bos) :] if bos and opening.startswith(bos) and _puts_bos(tokenizer) else opening


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins every text with its beginning-of-text token."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
