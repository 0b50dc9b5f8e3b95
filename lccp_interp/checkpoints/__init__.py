"""Checkpoints: find them, order them by tokens seen, verify them, and fetch them when their turn comes.

A checkpoint is a folder in Hugging Face form (config.json, *.safetensors, tokenizer), on this machine or on a hub.
Where its token count comes from, best first: an explicit table; a `trajectory.json` beside it; the Trainer's
`trainer_state.json`; its name (`lccp-1.2M`, `tokens50B`), or a step in its name times tokens per step. This package
reads headers and JSON only; it refuses to know models and imports no torch. Verifying a folder costs one read of the
weight files, for their hash; finding revisions on a hub costs their configs and tokenizers, and no weights.
"""

from lccp_interp.checkpoints.depot import Depot
from lccp_interp.checkpoints.find import (
    Found,
    bundled_trajectory,
    find_checkpoints,
    list_checkpoints,
    refuse_ambiguous,
)
from lccp_interp.checkpoints.folders import (
    TOKENIZER_FILES,
    checkpoint_hash,
    common_tokenizer,
    read_config,
    tokenizer_hash,
    verify_folder,
    verify_safetensors,
    weight_files,
)
from lccp_interp.checkpoints.names import SUFFIXES, NameParts, parse_bytes, parse_count, parse_name
from lccp_interp.checkpoints.tokens import TokenTable, read_token_table

__all__ = [
    "SUFFIXES",
    "TOKENIZER_FILES",
    "Depot",
    "Found",
    "NameParts",
    "TokenTable",
    "bundled_trajectory",
    "checkpoint_hash",
    "common_tokenizer",
    "find_checkpoints",
    "list_checkpoints",
    "parse_bytes",
    "parse_count",
    "parse_name",
    "read_config",
    "read_token_table",
    "refuse_ambiguous",
    "tokenizer_hash",
    "verify_folder",
    "verify_safetensors",
    "weight_files",
]
