"""Published numbers of arXiv 2604.02650, as data, to print beside a user's own.

Its Table 5 (how stable the ranking of heads is), Tables 3 and 6 (NIAH score and NIAH perplexity against results after
light fine-tuning: Pearson r and p), Tables 4 and 7 (number of retrieval heads and mean retrieval score: r and p), over
six checkpoints of 0 to 200 billion tokens, and the size of its SFT probe. The p-values are those of the two-sided t
test of r at n = 6. This module computes nothing. It costs nothing.

The names of the cheap metrics are those of `run_series`. The paper's "mean retrieval score" is set beside
`mean_initial_score`, the curve of its Figure 5: the mean over the retrieval heads of its first checkpoint.
"""

from __future__ import annotations

import polars as pl

PAPER_N = 6
"""Checkpoints behind every correlation of the paper: 0, 20, 50, 100, 150 and 200 billion tokens."""

PAPER_BENCHMARKS = ("RULER", "MRCR", "LongBio")
"""Its probes: the QA subset of RULER, MRCR, LongBio; samples of 32K to 64K tokens."""

SFT_PROBE_SAMPLES = 440_000
SFT_PROBE_TOKENS = 250_000_000
SFT_PROBE_EPOCHS = 2
"""Light fine-tuning of one checkpoint before it is probed: about 0.25 billion tokens, seen twice."""

# (table of r, table of p, cheap metric, the paper's name of it) -> (r, p) per benchmark
_PAPER_TABLES = {
    (3, 6, "niah_score", "NIAH score"): ((0.8552, 0.0299), (0.8927, 0.0166), (0.4977, 0.3151)),
    (3, 6, "answer_ppl", "NIAH PPL"): ((-0.9115, 0.0114), (-0.9231, 0.0087), (-0.6283, 0.1816)),
    (4, 7, "n_retrieval_heads", "number of retrieval heads"): ((0.8243, 0.0436), (0.8326, 0.0397), (0.5715, 0.2361)),
    (4, 7, "mean_initial_score", "mean retrieval score"): ((0.8956, 0.0158), (0.8469, 0.0334), (0.6210, 0.1882)),
}

PUBLISHED_AVERAGES = {
    "niah_score": 0.7486,
    "answer_ppl": -0.8210,
    "n_retrieval_heads": 0.7428,
    "mean_initial_score": 0.7878,
}
"""The averages of r over its three benchmarks that Tables 3 and 4 print (of numbers with more digits)."""

PUBLISHED_STABILITY = (
    ("0B", "20B", 24, 0.7316),
    ("20B", "50B", 29, 0.9238),
    ("50B", "100B", 28, 0.9164),
    ("100B", "150B", 28, 0.8808),
    ("150B", "200B", 28, 0.8921),
)
"""arXiv 2604.02650, Table 5: Hunyuan-A13B, overlap of the top 30 of 1024 heads and Spearman of all scores."""


def published_correlations() -> pl.DataFrame:
    """Pearson r and p of arXiv 2604.02650, Tables 3, 4, 6 and 7.

    Returns:
        Columns cheap, paper_name, benchmark, published_r, published_p, n, r_table, p_table; 12 rows.

    Example:
        >>> published_correlations().filter(cheap="answer_ppl", benchmark="RULER").row(0)
        ('answer_ppl', 'NIAH PPL', 'RULER', -0.9115, 0.0114, 6, 3, 6)
    """
    return pl.DataFrame(
        [
            {
                "cheap": cheap,
                "paper_name": paper_name,
                "benchmark": benchmark,
                "published_r": r,
                "published_p": p,
                "n": PAPER_N,
                "r_table": r_table,
                "p_table": p_table,
            }
            for (r_table, p_table, cheap, paper_name), numbers in _PAPER_TABLES.items()
            for benchmark, (r, p) in zip(PAPER_BENCHMARKS, numbers, strict=True)
        ]
    )
