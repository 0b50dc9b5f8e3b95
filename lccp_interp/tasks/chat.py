"""Chat templates: what a tokenizer's own template writes around one message of the user.

A base model reads a prompt as it is; a chat model expects it inside its turns. `Frame` holds the text before and after
the message, found by rendering the template around a mark. It refuses to know what the message says. Cost: one
rendering per tokenizer.
"""

from __future__ import annotations

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
        bos = tokenizer.bos_token
        if bos and opening.startswith(bos) and _puts_bos(tokenizer):
            opening = opening[len(bos) :]
        return cls(opening, closing)


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins every text with its beginning-of-text token."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
