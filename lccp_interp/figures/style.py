"""What both kinds of figures share: colours, units, the token axis, the choice of panels, matrices of cells.

Colours are safe for colour-blind readers: sequential scales (viridis, plasma) where there is an order, the palette of
Okabe and Ito for kinds. This module knows numbers and colours as hex strings; it refuses to know matplotlib and plotly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lccp_interp.dynamics.saturation import format_tokens
from lccp_interp.dynamics.selection import base_checkpoint
from lccp_interp.schema import LccpError
from lccp_interp.store import Run

Item = TypeVar("Item")

VIRIDIS = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c")
PLASMA = ("#0d0887", "#5b02a3", "#9a179b", "#cb4678", "#eb7852", "#f8a32f")
EARLIER = ("#8c8c8c", "#c4c4c4")
SCORES = ("#f7fbff", "#d2e3f3", "#9ac8e1", "#529dcc", "#1c6cb1", "#08306b")
CORRELATION = ("#8c510a", "#d8b365", "#f6f1e6", "#f5f5f5", "#e6f1ef", "#5ab4ac", "#01665e")
PERPLEXITY = ("#fdf6e3", "#fde0a6", "#f9b56b", "#ee7a4d", "#c8415b", "#7f2a6e", "#2f1453")

INK = "#222222"
MUTED = "#6b6b6b"
STAGE_SHADE = "#eef3f8"
UNDEFINED = "#d9d9d9"
COLOURS = {
    "niah_score": "#0072b2",
    "answer_ppl": "#d55e00",
    "from_start": "#56b4e9",
    "from_base": "#0072b2",
    "newborn": "#e69f00",
    "initial_mean": "#009e73",
    "birth": "#009e73",
    "death": "#cc3311",
}
METRIC_COLOURS = {
    "niah_score": "#0072b2",
    "greedy_exact": "#0072b2",
    "answer_ppl": "#d55e00",
    "loss_nats": "#d55e00",
    "n_retrieval_heads": "#222222",
    "mean_initial_score": "#009e73",
}
"""Colours of measures, the same in every figure; those of a score and of a perplexity share theirs with its loss."""

KINDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of things without an order (Okabe and Ito)."""

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
STAGE_NAMES = {"lccp": "LCCP", "pretrain": "pretraining", "train": "training"}
MAX_PANELS = 6


def stage_name(stage: str) -> str:
    """How a stage is called in figures and text.

    Example:
        >>> stage_name("lccp"), stage_name("cooldown")
        ('LCCP', 'cooldown')
    """
    return STAGE_NAMES.get(stage, stage)


def format_length(length: int) -> str:
    """A context length: powers of two in K (1024), others as they are.

    Example:
        >>> format_length(4096), format_length(256), format_length(1500)
        ('4K', '256', '1500')
    """
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def format_number(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits and no exponent below a million; `n/a` if undefined.

    Example:
        >>> format_number(1234.5), format_number(0.12345), format_number(1.25e7), format_number(float("nan"))
        ('1234', '0.123', '1.25·10⁷', 'n/a')
    """
    if not math.isfinite(value):
        return "n/a"
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    if abs(value) >= 1e6:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}·10{str(int(power)).translate(SUPERSCRIPTS)}"
    return f"{value:.{digits}g}"


def sequence_colour(scale: Sequence[str], fraction: float) -> str:
    """Colour at `fraction` (0..1) of a scale, as hex.

    Example:
        >>> sequence_colour(("#000000", "#ffffff"), 0.5)
        '#808080'
    """
    place = min(max(fraction, 0.0), 1.0) * (len(scale) - 1)
    left = min(int(place), len(scale) - 2)
    low, high = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (scale[left], scale[left + 1]))
    mixed = low + (high - low) * (place - left)
    return "#" + "".join(f"{round(float(part)):02x}" for part in mixed)


def metric_colour(metric: str) -> str:
    """The colour of a measure; of one that has none of its own (corpus perplexity) that of the fourth kind.

    Example:
        >>> metric_colour("loss_nats") == metric_colour("answer_ppl"), metric_colour("probe:x")
        (True, '#cc79a7')
    """
    return METRIC_COLOURS.get(metric, KINDS[3])


def spread_colours(scale: Sequence[str], n: int) -> list[str]:
    """`n` colours evenly over a scale."""
    return [sequence_colour(scale, i / (n - 1) if n > 1 else 0.0) for i in range(n)]


def checkpoint_colours(run: Run, names: Sequence[str]) -> list[str]:
    """A colour per checkpoint, by its place among those of `run`, so that it is the same in every figure.

    From the base on they go along viridis, earlier ones are grey, darker the earlier. Where `run` does not list one of
    them, all get theirs by their place among `names`.
    """
    listed = run.checkpoints.sort("tokens_seen", "name")["name"].to_list()
    if not set(names) <= set(listed):
        return spread_colours(VIRIDIS, len(names))
    start = listed.index(base_checkpoint(run.checkpoints))
    early, late = spread_colours(EARLIER, start), spread_colours(VIRIDIS, len(listed) - start)
    colours = dict(zip(listed, [*early, *late], strict=True))
    return [colours[name] for name in names]


def kind_colours(n: int) -> list[str]:
    """Colours of `n` things without an order; more than there are colours are all grey.

    Example:
        >>> kind_colours(2), kind_colours(9)[0]
        (['#0072b2', '#d55e00'], '#b5b5b5')
    """
    return list(KINDS[:n]) if n <= len(KINDS) else ["#b5b5b5"] * n


STRETCH_BELOW = 0.45
STRETCHED_SHARE = 0.7


@dataclass(frozen=True)
class TokenAxis:
    """The x axis: checkpoints by training tokens.

    Linear in tokens, unless the last stage would crowd into a corner (a short LCCP after a long pretraining): then the
    axis has two linear pieces, the last stage takes most of the width, and its ticks count from the base.
    """

    knots: tuple[tuple[float, float], ...]
    tick_at: tuple[float, ...]
    tick_text: tuple[str, ...]
    label: str

    @classmethod
    def of(cls, checkpoints: pl.DataFrame, base: str) -> TokenAxis:
        """The axis for `checkpoints` (columns checkpoint, tokens_seen, stage; in order of tokens)."""
        tokens = [int(value) for value in checkpoints["tokens_seen"]]
        first, last = tokens[0], tokens[-1]
        if first == last:
            return cls(((first, 0.0), (first + 1, 1.0)), (0.0,), (format_tokens(first),), "training tokens")
        stage = last_stage(checkpoints, base)
        start = last if stage is None else stage[1]
        if stage is None or not first < start < last or (last - start) / (last - first) >= STRETCH_BELOW:
            return cls._linear(first, last, "base" if start == first else "first checkpoint")
        axis = cls(((first, 0.0), (start, 1 - STRETCHED_SHARE), (last, 1.0)), (), (), "")
        early = [tick for tick in nice_ticks(first, start, 3) if axis.at([tick])[0] < 0.75 * (1 - STRETCHED_SHARE)]
        late = [tick for tick in nice_ticks(0, last - start, 4) if tick > 0]
        at = axis.at([*early, start, *(start + tick for tick in late)])
        text = (*map(format_tokens, early), format_tokens(start), *(f"+{format_tokens(tick)}" for tick in late))
        return cls(axis.knots, tuple(at), text, f"tokens (+: since base; {stage_name(stage[0])} stretched)")

    @classmethod
    def _linear(cls, first: int, last: int, origin: str) -> TokenAxis:
        ticks = nice_ticks(first, last)
        text = tuple(map(format_tokens, ticks))
        label = "training tokens"
        if len(set(text)) < len(text):
            # Three digits cannot tell 20.05T from 20.1T: count from the first checkpoint.
            later = nice_ticks(0, last - first)[1:]
            ticks = (first, *(first + tick for tick in later))
            text = (format_tokens(first), *(f"+{format_tokens(tick)}" for tick in later))
            label = f"training tokens (+: since the {origin})"
        axis = cls(((first, 0.0), (last, 1.0)), (), text, label)
        return cls(axis.knots, tuple(axis.at(ticks)), text, label)

    def at(self, tokens: Sequence[float] | pl.Series) -> list[float]:
        """Places on the axis, 0 for the first and 1 for the last checkpoint."""
        known, places = zip(*self.knots, strict=True)
        return [float(value) for value in np.interp([float(value) for value in tokens], known, places)]

    @property
    def limits(self) -> tuple[float, float]:
        """Left and right end, with a margin."""
        return -0.03, 1.03


PPL_TICKS = (
    1.1, 2, 10, 1.01, 100, 1.001, 1e4, 1e7, 1.3, 5, 1.03, 3,
    20, 1e3, 1e5, 1e12, 1.5, 1.003, 1.0001, 1.05, 1.2, 50, 1.02, 1.7,
)  # fmt: skip
"""Ticks of a perplexity axis, the most welcome first."""

SMALLEST_LOSS_NATS = 1e-4


@dataclass(frozen=True)
class PplScale:
    """A perplexity axis that is logarithmic in the loss, ln PPL.

    On it a fall from 1.1 to 1.01 is as visible as one from 10 to 1.26: near certainty perplexities all crowd at 1,
    which is just where a model that is still learning must be told from one that has finished.
    """

    low: float
    high: float

    @classmethod
    def of(cls, *values: NDArray[np.float64] | pl.Series) -> PplScale:
        """The scale that holds all finite values."""
        low, high = defined_range([np.asarray(value, dtype=np.float64) for value in values], (1.0, 10.0))
        low, high = cls.at(low), cls.at(high)
        return cls(low, max(high, low + 0.01))

    @staticmethod
    def at(ppl: float) -> float:
        """Place of a perplexity on the axis: log10 of its loss in nats; NaN stays NaN."""
        return math.log10(max(math.log(ppl), SMALLEST_LOSS_NATS)) if math.isfinite(ppl) and ppl > 0 else math.nan

    def places(self, values: NDArray[np.float64] | pl.Series) -> NDArray[np.float64]:
        """`at` of many values, any shape."""
        array = np.asarray(values, dtype=np.float64)
        return np.array([self.at(value) for value in array.ravel()]).reshape(array.shape)

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis, with a margin."""
        margin = 0.05 * (self.high - self.low)
        return self.low - margin, self.high + margin

    @property
    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and texts of up to about eight ticks."""
        chosen: list[float] = []
        around = nice_ticks(math.exp(10**self.low), math.exp(min(10**self.high, 100.0)))
        for tick in (*PPL_TICKS, *around):
            place = self.at(tick)
            room = (self.high - self.low) / (8 if tick in PPL_TICKS else 4)
            if self.low <= place <= self.high and all(abs(place - self.at(other)) >= room for other in chosen):
                chosen.append(tick)
        return [self.at(tick) for tick in sorted(chosen)], [format_ppl_tick(tick) for tick in sorted(chosen)]


def format_ppl_tick(ppl: float) -> str:
    """A perplexity as a tick: powers of ten from 10000 on.

    Example:
        >>> format_ppl_tick(1.001), format_ppl_tick(100.0), format_ppl_tick(1e7)
        ('1.001', '100', '10⁷')
    """
    power = round(math.log10(ppl))
    if power >= 4 and math.isclose(ppl, 10**power):
        return "10" + str(power).translate(SUPERSCRIPTS)
    return f"{ppl:.5g}"


def log_ppl_ticks(high: float) -> list[float]:
    """Up to seven round perplexities from 1 to `high` for a logarithmic axis.

    Example:
        >>> log_ppl_ticks(70), log_ppl_ticks(1e5), log_ppl_ticks(1.6)
        ([1, 2, 5, 10, 20, 50], [1, 10, 100, 1000, 10000, 100000], [1, 1.2, 1.5])
    """
    decades = [10**power for power in range(math.ceil(math.log10(high)) + 1)] if high > 1 else [1]
    ticks = decades if high >= 1000 else [1, 2, 5, 10, 20, 50, 100, 200, 500] if high > 5 else [1, 1.2, 1.5, 2, 3, 4, 5]
    shown = [tick for tick in ticks if tick <= high]
    return shown[:: math.ceil(len(shown) / 7)]


def place_in_training(checkpoints: pl.DataFrame, base: str, tokens: int) -> str:
    """A short name of a point of training: `+1.2M` since the base within a last stage, else all tokens.

    Example:
        >>> frame = pl.DataFrame({"checkpoint": ["a", "b"], "tokens_seen": [3_000_000, 3_100_000], "stage": ["x", "y"]})
        >>> place_in_training(frame, "a", 3_100_000), place_in_training(frame, "a", 3_000_000)
        ('+100K', '3M')
    """
    stage = last_stage(checkpoints, base)
    return format_tokens(tokens) if stage is None or tokens <= stage[1] else f"+{format_tokens(tokens - stage[1])}"


def nice_ticks(low: float, high: float, target: int = 6) -> tuple[float, ...]:
    """Round numbers between `low` and `high`, about `target` of them.

    Example:
        >>> nice_ticks(500_000, 4_800_000)
        (1000000.0, 2000000.0, 3000000.0, 4000000.0)
    """
    raw = (high - low) / target
    if raw <= 0:
        return (low,)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(step * i) for i in range(first, last + 1))


def last_stage(checkpoints: pl.DataFrame, base: str) -> tuple[str, int, int] | None:
    """(stage, tokens at its base, tokens at its end) of the last stage, None where there is only one stage."""
    if checkpoints["stage"].n_unique() < 2:
        return None
    start = checkpoints.filter(pl.col("checkpoint") == base)["tokens_seen"][0]
    return str(checkpoints["stage"][-1]), int(start), int(checkpoints["tokens_seen"][-1])


def select_panels(checkpoints: pl.DataFrame, base: str, n: int = MAX_PANELS) -> list[str]:
    """Names of up to `n` checkpoints for panels: the base, the last, and evenly between; earlier ones if room is left.

    Example:
        >>> frame = pl.DataFrame({"checkpoint": list("abcdefgh")})
        >>> select_panels(frame, "c", 3), select_panels(frame, "g", 3)
        (['c', 'f', 'h'], ['f', 'g', 'h'])
    """
    if n < 2:
        raise LccpError(f"panels must be at least 2 (the base and the last checkpoint), got {n}")
    names = [str(name) for name in checkpoints["checkpoint"]]
    start = min(names.index(base) if base in names else 0, max(0, len(names) - n))
    return pick_evenly(names[start:], n)


def short_names(names: Sequence[str], width: int) -> dict[str, str]:
    """Names that fit into `width` characters: without what all begin with, then without their beginnings.

    Example:
        >>> short_names(["org/model-13B@step_10", "org/model-13B@step_20"], 12)
        {'org/model-13B@step_10': 'step_10', 'org/model-13B@step_20': 'step_20'}
        >>> short_names(["step_10"], 12)
        {'step_10': 'step_10'}
    """
    cut = 0
    if max(map(len, names)) > width and len(names) > 1:
        first, last = min(names), max(names)
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        cut = max(first[:common].rfind(mark) for mark in "/@-. ") + 1
    rest = {name: name[cut:] for name in names}
    return {name: text if len(text) <= width else f"…{text[-(width - 1) :]}" for name, text in rest.items()}


def pick_evenly(items: Sequence[Item], n: int) -> list[Item]:
    """Up to `n` items, evenly, with the first and the last."""
    if len(items) <= n:
        return list(items)
    return [items[math.floor(i * (len(items) - 1) / (n - 1) + 0.5)] for i in range(n)]


def cell_matrix(
    frame: pl.DataFrame, rows: Sequence[float], columns: Sequence[float], row: str, column: str, value: str
) -> NDArray[np.float64]:
    """`value` as `[row, column]`, NaN where the frame has no such cell."""
    matrix = np.full((len(rows), len(columns)), np.nan)
    row_place = {key: i for i, key in enumerate(rows)}
    column_place = {key: i for i, key in enumerate(columns)}
    for at, to, cell in frame.select(row, column, value).iter_rows():
        matrix[row_place[at], column_place[to]] = float("nan") if cell is None else cell
    return matrix


def defined_range(matrices: Sequence[NDArray[np.float64]], fallback: tuple[float, float]) -> tuple[float, float]:
    """Smallest and largest finite value, `fallback` where there is none."""
    finite = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return (float(finite.min()), float(finite.max())) if finite.size else fallback


def head_name(layer: int, head: int) -> str:
    """A head as `layer-head`, as in the published tables.

    Example:
        >>> head_name(16, 19)
        '16-19'
    """
    return f"{layer}-{head}"
