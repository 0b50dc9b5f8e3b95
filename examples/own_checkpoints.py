"""Score your own checkpoints from Python: one call, resumable, then tables without torch.

    python examples/own_checkpoints.py RUN CHECKPOINT [CHECKPOINT ...]

Each CHECKPOINT is a folder in Hugging Face form whose name or trainer state tells its tokens (`lccp-20B`,
`checkpoint-400` needs `tokens_per_step`). Without your own text the haystack is written in the bundled language, which
any tokenizer can read; for a real model give a text of its own domain with `haystack=read_haystack(Path(...))`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lccp_interp import find_checkpoints, read_needles, score
from lccp_interp.dynamics import census, lives, score_table

NEEDLES = read_needles(Path(__file__).with_name("needles.jsonl"))


def main(out: str, *folders: str) -> None:
    """Score `folders` into `out` and print the census of retrieval heads and their lives."""
    run = score(
        find_checkpoints(folders),
        out,
        lengths=[512, 1024],
        depths=[0, 50, 100],
        samples=2,
        needles=NEEDLES,
        progress=lambda done, total, message: print(f"\r{done:>9,}/{total:,} tokens  {message:<30}", end=""),
    )
    print()
    table = score_table(run, length=1024)
    print(census(table))
    print(lives(table))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
