"""Learning curves fitted to a handful of checkpoints: which shape, when it is nearly done, and how sure that is.

Three shapes over the tokens N since the base checkpoint, with c the asymptote and a the total gain:

- *log-linear* A log N + B, the one of arXiv 2604.02650, Figure 6. It says nothing about N = 0, so a base checkpoint
  costs it one more parameter, its own value. It has no plateau.
- *exponential* c + a exp(-N / tau).
- *power law* c + a (1 + N / s)^(-b). It becomes the exponential for large b and resembles the log-linear for small b.

The saturation point is the N at which a share x of the gain from N = 0 to the asymptote is made: tau log(1 / (1 - x)),
or s ((1 - x)^(-1/b) - 1). Given that point and b the curve is linear in c and a, so a grid over the two finds the least
squares without starting values and without failing; `fit_curves` then refines the winner.

The interval does not trust the choice of shape. It is the set of saturation points that a test does not reject: a
point is rejected if the best power law with it (exponential and nearly log-linear ones are among them) fits worse, in
log residual squares, than bootstrapped data from that very curve would 95 times of 100. The bootstrapped noise is that
of resampled cases, the same ones at all checkpoints, plus a normal scatter of the checkpoints as large as the residuals
ask for. Only the range of the data is judged: an upper end beyond the last checkpoint is reported as open.

The module knows arrays; it refuses to know runs, metrics and verdicts. Cost: about 0.1 s per curve of 20 checkpoints.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import kendalltau

from lccp_interp.schema import LccpError

Array = NDArray[np.float64]

LOG_LINEAR, EXPONENTIAL, POWER_LAW = "log-linear", "exponential", "power law"
MODELS = (LOG_LINEAR, EXPONENTIAL, POWER_LAW)

MIN_CHECKPOINTS = 5
"""Below this nothing is fitted: a power law has four parameters."""

N_SHAPE_PARAMETERS = 4

EXPONENTS = np.array([0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.2, 3.5, 6, 12, np.inf])
"""Exponents b of the power laws that are tried; infinite is the exponential, 0.1 hardly bends on a log axis."""

LOG_EXPONENT_BOUNDS = ((math.log(0.1), math.log(12.0)),)
"""Of the power law; above, it is the exponential."""

POINTS_PER_DECADE = 16
"""Saturation points tried per factor of ten in tokens."""

N_TESTED = 40
"""Saturation points at which the bootstrap test is run; between them its p-value is interpolated."""

MIN_ACCEPTED = 6
"""With fewer of them not rejected the grid is too coarse for the interval, and refined."""

HORIZON = 1e3
"""Saturation points up to so many times the last checkpoint's tokens are tried; further ones look like no plateau."""

MAX_EXACT_PERMUTATIONS = 8
"""Tied series up to so many checkpoints are tested against all their orders."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One fitted shape.

    `parameters` are named as in the formulas at the top of the module, in tokens and units of the metric. `n_free`
    counts them, the base checkpoint's own value where there is one, and the noise. `aicc` is NaN where n <= n_free + 1
    leaves it undefined. `tokens_at_share` is infinite for the log-linear shape. `fitted` has one value per checkpoint.
    """

    model: str
    parameters: dict[str, float]
    n_free: int
    rss: float
    aicc: float
    tokens_at_share: float
    gain: float
    fitted: Array = field(repr=False)


@dataclass(frozen=True, slots=True)
class Saturation:
    """What the checkpoints say about the saturation point; all tokens count from the base checkpoint.

    `ci_high` is infinite where the interval reaches beyond the last checkpoint; `ci_low` is then at most the last
    checkpoint's tokens. `p_no_gain` is the p-value of "there is no gain at all", `extra_sd` the scatter of the
    checkpoints beyond that of resampled cases, in units of the metric.
    """

    fits: tuple[Fit, ...]
    best: Fit
    ci_low: float
    ci_high: float
    p_no_gain: float
    extra_sd: float

    def fit(self, model: str) -> Fit:
        """The fit of one of `MODELS`."""
        return next(fit for fit in self.fits if fit.model == model)

    @property
    def margin(self) -> float:
        """AICc of the best shape with a plateau minus that of the log-linear one: above 0 the latter is better.

        NaN where only one of them has a defined AICc.
        """
        kind, score = min(_rank(fit) for fit in self.fits if fit.model != LOG_LINEAR)
        own_kind, own_score = _rank(self.fit(LOG_LINEAR))
        return score - own_score if kind == own_kind else math.nan


def curve_shape(tokens: Array, saturation: Array, exponent: Array, share: float) -> Array:
    """The falling part of a curve: 1 at the base, 1 - `share` at its saturation point, 0 at infinity.

    Args:
        tokens: tokens since the base, `[checkpoint]`, at least 0.
        saturation: tokens at which `share` of the gain is made, any shape, above 0.
        exponent: b of the power law, same shape; infinite for the exponential.
        share: in (0, 1).

    Returns:
        `[..., checkpoint]`, with the shape of `saturation` in front.

    Example:
        >>> curve_shape(np.array([0.0, 10.0]), np.array([10.0, 10.0]), np.array([1.0, np.inf]), 0.9).round(3)
        array([[1. , 0.1],
               [1. , 0.1]])
    """
    rate = -math.log1p(-share)
    saturation, exponent = saturation[..., None], exponent[..., None]
    finite = np.where(np.isfinite(exponent), exponent, 1.0)
    scale = saturation / np.expm1(rate / finite)
    power = np.exp(-finite * np.log1p(tokens / scale))
    return np.where(np.isfinite(exponent), power, np.exp(-rate * tokens / saturation))


@dataclass(frozen=True)
class _Basis:
    """Shapes as unit vectors orthogonal to the constant, in the metric that `weights` (1 / variance) define."""

    root: Array  # square roots of the weights, [checkpoint]
    constant: Array  # the constant, a unit vector
    unit: Array  # [..., checkpoint]
    norm: Array  # length of each shape before it was made a unit vector

    @classmethod
    def of(cls, shapes: Array, variance: Array) -> _Basis:
        root = 1 / np.sqrt(variance)
        constant = root / np.linalg.norm(root)
        weighted = shapes * root
        weighted = weighted - (weighted @ constant)[..., None] * constant
        norm = np.linalg.norm(weighted, axis=-1)
        # A shape that is constant over the checkpoints explains nothing.
        flat = norm < 1e-9 * np.linalg.norm(root)
        unit = np.where(flat[..., None], 0.0, weighted / np.where(flat, 1.0, norm)[..., None])
        return cls(root, constant, unit, np.where(flat, np.inf, norm))

    def whiten(self, values: Array) -> Array:
        """Weighted values without their mean; `values` is `[..., checkpoint]`."""
        weighted = values * self.root
        return weighted - (weighted @ self.constant)[..., None] * self.constant

    def gains(self, values: Array, sign: int) -> Array:
        """Length of the projection on each shape, 0 where it has the wrong sign."""
        return np.maximum(0.0, sign * (self.unit @ self.whiten(values)))

    def rss(self, values: Array, sign: int) -> Array:
        """Weighted residual squares of each shape."""
        centred = self.whiten(values)
        return np.maximum(centred @ centred - self.gains(values, sign) ** 2, _tiny(values * self.root))


def _tiny(values: Array) -> float:
    """Residual squares below this are rounding."""
    return float(1e-14 * (values @ values) + np.finfo(np.float64).tiny)


def saturation_grid(tokens: Array) -> Array:
    """Saturation points to try, from a tenth of the first checkpoint after the base; the last checkpoint is one."""
    last = tokens.max()
    first = 0.1 * tokens[tokens > 0].min()
    n_within = max(8, math.ceil(POINTS_PER_DECADE * math.log10(last / first)))
    n_beyond = math.ceil(POINTS_PER_DECADE * math.log10(HORIZON))
    return np.concatenate(
        [np.geomspace(first, last, n_within + 1), np.geomspace(last, HORIZON * last, n_beyond + 1)[1:]]
    )


def noise_variance(values: Array, shapes: Array, case_variance: Array, sign: int) -> tuple[Array, float]:
    """Variance of each checkpoint's value: that of its cases, plus as much for all as the residuals ask for.

    The extra part is the one at which the weighted residual squares equal their degrees of freedom (Paule and Mandel
    1982), 0 where the cases explain all. Checkpoints at a ceiling have no variance over cases; a sixteenth of the
    median of the others keeps their weight finite.

    Returns:
        Variances `[checkpoint]`, and the extra part.
    """
    positive = case_variance[case_variance > 0]
    floor = float(np.median(positive)) / 16 if positive.size else 0.0
    case_variance = np.maximum(case_variance, floor)
    degrees = max(len(values) - N_SHAPE_PARAMETERS, 1)

    def misfit(extra: float) -> float:
        return float(_Basis.of(shapes, case_variance + extra).rss(values, sign).min())

    if floor > 0 and misfit(0.0) <= degrees:
        return case_variance, 0.0
    high = len(values) * float(np.var(values)) / degrees
    low = 1e-10 * high
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if misfit(middle) > degrees else (low, middle)
    return case_variance + high, high


def fit_curves(
    tokens: Array, values: Array, variance: Array, *, higher_is_better: bool, share: float = 0.95
) -> tuple[Fit, ...]:
    """Fit the three shapes by weighted least squares, none of them in the direction of getting worse.

    Args:
        tokens: tokens since the base, `[checkpoint]`, rising, at least 0.
        values: the metric, `[checkpoint]`, finite.
        variance: of each value, `[checkpoint]`, above 0; only the ratios matter.
        higher_is_better: whether a gain raises the metric.
        share: of the gain that defines the saturation point, in (0, 1).

    Returns:
        One `Fit` per shape, in the order of `MODELS`.

    Example:
        >>> tokens = np.array([0.0, 1, 2, 4, 8, 16, 32])
        >>> fits = fit_curves(tokens, 3 + 5 * np.exp(-tokens / 4), np.ones(7), higher_is_better=False)
        >>> [fit.model for fit in fits], round(fits[1].parameters["tau"], 2), round(fits[1].tokens_at_share, 1)
        (['log-linear', 'exponential', 'power law'], 4.0, 12.0)
    """
    sign = -1 if higher_is_better else 1
    grid, exponents = np.meshgrid(saturation_grid(tokens), EXPONENTS, indexing="ij")
    rss = _Basis.of(curve_shape(tokens, grid, exponents, share), variance).rss(values, sign)
    made = [_fit_log_linear(tokens, values, variance, sign)]
    for model, columns in ((EXPONENTIAL, slice(-1, None)), (POWER_LAW, slice(None, -1))):
        i, j = np.unravel_index(rss[:, columns].argmin(), rss[:, columns].shape)
        start = float(grid[:, columns][i, j]), float(exponents[:, columns][i, j])
        made.append(_refine(model, start, tokens, values, variance, sign, share))
    return tuple(made)


def _refine(
    model: str, start: tuple[float, float], tokens: Array, values: Array, variance: Array, sign: int, share: float
) -> Fit:
    """Walk from the best point of the grid to the least squares (Nelder and Mead, which cannot fail, only tire)."""
    free = 2 if model == POWER_LAW else 1
    step = math.log(10) / POINTS_PER_DECADE
    bounds = [(math.log(start[0]) - 8 * step, math.log(start[0]) + 8 * step), *LOG_EXPONENT_BOUNDS][:free]

    def misfit(logs: Array) -> float:
        exponent = np.exp(logs[1]) if free == 2 else np.inf
        shape = curve_shape(tokens, np.exp(logs[0]), np.array(exponent), share)
        return math.log(float(_Basis.of(shape, variance).rss(values, sign)))

    low, high = np.array(bounds).T
    first = np.clip(np.log(np.array(start))[:free], low, high)
    # Towards smaller exponents, where shapes differ most, unless the walk starts at the smallest.
    offsets = np.diag([step, -0.2 if start[1] > 0.2 else 0.2][:free])
    simplex = np.stack([first, *(first + offset for offset in offsets)])
    found = minimize(
        misfit, first, method="Nelder-Mead", bounds=bounds,
        options={"initial_simplex": simplex, "xatol": 1e-5, "fatol": 1e-7, "maxfev": 400},
    )  # fmt: skip
    saturation, exponent = math.exp(found.x[0]), math.exp(found.x[1]) if free == 2 else math.inf
    shape = curve_shape(tokens, np.array(saturation), np.array(exponent), share)
    basis = _Basis.of(shape, variance)
    gain = sign * float(basis.gains(values, sign) / basis.norm)
    asymptote = float((values - gain * shape) @ basis.root**2 / (basis.root @ basis.root))
    rate = -math.log1p(-share)
    parameters = {"c": asymptote, "a": gain}
    if model == EXPONENTIAL:
        parameters |= {"tau": saturation / rate}
    else:
        parameters |= {"s": saturation / math.expm1(rate / exponent), "b": exponent}
    squares = float(basis.rss(values, sign))
    n_free = len(parameters) + 1
    score = aicc(squares, len(values), n_free)
    return Fit(model, parameters, n_free, squares, score, saturation, abs(gain), asymptote + gain * shape)


def _fit_log_linear(tokens: Array, values: Array, variance: Array, sign: int) -> Fit:
    """A log N + B over the checkpoints after the base; the base, if there, is its own parameter."""
    after = tokens > 0
    basis = _Basis.of(-np.log(tokens[after]), variance[after])
    slope = -sign * float(basis.gains(values[after], sign) / basis.norm)
    weights = basis.root**2
    intercept = float(weights @ (values[after] - slope * np.log(tokens[after])) / weights.sum())
    fitted = values.copy()
    fitted[after] = slope * np.log(tokens[after]) + intercept
    rss = float(max(((values - fitted) ** 2 / variance).sum(), _tiny(values / np.sqrt(variance))))
    n_free = 3 + int(not after.all())
    score = aicc(rss, len(values), n_free)
    return Fit(LOG_LINEAR, {"A": slope, "B": intercept}, n_free, rss, score, math.inf, math.nan, fitted)


def aicc(rss: float, n: int, n_free: int) -> float:
    """Akaike's criterion with its correction for few points, up to a constant; NaN where n <= n_free + 1.

    Args:
        rss: weighted residual squares, above 0.
        n: number of points.
        n_free: fitted parameters, the noise among them.

    Example:
        >>> round(aicc(10.0, 10, 3), 3), aicc(10.0, 4, 3)
        (10.0, nan)
    """
    if n <= n_free + 1:
        return math.nan
    return n * math.log(rss / n) + 2 * n_free + 2 * n_free * (n_free + 1) / (n - n_free - 1)


def curve_values(fit: Fit, tokens: Array) -> Array:
    """The fitted shape at any tokens since the base, of the same shape as `tokens`; A log N + B is NaN at N = 0.

    Example:
        >>> falling = Fit(EXPONENTIAL, {"c": 3, "a": 5, "tau": 4}, 4, 1, 0, 12, 5, np.zeros(0))
        >>> curve_values(falling, np.array([0.0, 1e9]))
        array([8., 3.])
    """
    named = fit.parameters
    if fit.model == LOG_LINEAR:
        after = np.where(tokens > 0, tokens, np.nan)
        return np.asarray(named["A"] * np.log(after) + named["B"])
    if fit.model == EXPONENTIAL:
        return np.asarray(named["c"] + named["a"] * np.exp(-tokens / named["tau"]))
    return np.asarray(named["c"] + named["a"] * np.exp(-named["b"] * np.log1p(tokens / named["s"])))


def choose_fit(fits: tuple[Fit, ...]) -> Fit:
    """The fit of least AICc; where none is defined, the best fitting of those with the fewest parameters."""
    return min(fits, key=_rank)


def _rank(fit: Fit) -> tuple[int, float]:
    """(0, AICc) where it is defined, else (its number of parameters, the fit's part of AICc)."""
    if math.isfinite(fit.aicc):
        return 0, fit.aicc
    return fit.n_free, len(fit.fitted) * math.log(fit.rss)


def find_saturation(
    tokens: Array,
    values: Array,
    deviations: Array,
    *,
    higher_is_better: bool,
    share: float = 0.95,
    confidence: float = 0.95,
    seed: int = 0,
) -> Saturation:
    """Fit the shapes, choose one, and find the saturation point's bootstrap interval (see the top of the module).

    Args:
        tokens: tokens since the base, `[checkpoint]`, rising, at least 0.
        values: the metric, `[checkpoint]`, finite, not all equal.
        deviations: what resampling the cases adds to the values, `[resample, checkpoint]`, around 0; all 0 where
            nothing is known about the cases. Its rows are drawn together, as checkpoints share their cases.
        higher_is_better: whether a gain raises the metric.
        share: of the gain that defines the saturation point, in (0, 1).
        confidence: level of the interval, in (0, 1).
        seed: of the scatter that is added to the resampled cases.

    Raises:
        LccpError: fewer than `MIN_CHECKPOINTS` checkpoints, or a share or confidence outside (0, 1).

    Example:
        >>> tokens = np.array([0.0, 1, 2, 4, 8, 16, 32, 64])
        >>> noise = 0.1 * np.random.default_rng(0).normal(size=(201, 8))
        >>> values = 3 + 5 * np.exp(-tokens / 4) + noise[0]
        >>> found = find_saturation(tokens, values, noise[1:], higher_is_better=False)
        >>> found.best.model, found.ci_low < 12 < found.ci_high < 64
        ('exponential', True)
    """
    check_share(share)
    if not 0 < confidence < 1:
        raise LccpError(f"confidence must lie between 0 and 1, got {confidence}; the usual one is 0.95")
    if len(tokens) < MIN_CHECKPOINTS:
        raise LccpError(f"a saturation point needs at least {MIN_CHECKPOINTS} checkpoints, got {len(tokens)}")
    sign = -1 if higher_is_better else 1
    grid = saturation_grid(tokens)
    mesh, exponents = np.meshgrid(grid, EXPONENTS, indexing="ij")
    shapes = curve_shape(tokens, mesh, exponents, share)
    variance, extra = noise_variance(values, shapes, deviations.var(axis=0), sign)
    fits = fit_curves(tokens, values, variance, higher_is_better=higher_is_better, share=share)
    rng = np.random.default_rng(seed)
    # Cases as they were drawn, and independent scatter up to the variance that the fits assume.
    scatter = rng.normal(size=deviations.shape) * np.sqrt(np.maximum(variance - deviations.var(axis=0), 0.0))
    p_no_gain = _test_no_gain(_Basis.of(shapes, variance), values, deviations, scatter, extra > 0, rng, sign)
    points = [fit.tokens_at_share for fit in fits if math.isfinite(fit.tokens_at_share)]
    low, high = _test_points(tokens, values, variance, deviations + scatter, np.array(points), sign, share, confidence)
    best = choose_fit(fits)
    # An interval without its own estimate would be a riddle.
    low, high = min(low, best.tokens_at_share), max(high, best.tokens_at_share)
    last = float(tokens.max())
    return Saturation(fits, best, min(low, last), high if high <= last else math.inf, p_no_gain, math.sqrt(extra))


def check_share(share: float) -> None:
    """Refuse a share of the gain outside (0, 1)."""
    if not 0 < share < 1:
        raise LccpError(
            f"share must lie between 0 and 1 (on the command line 0 and 100), got {share:g}; "
            "the usual ones are 0.9 and 0.95"
        )


def _test_no_gain(
    basis: _Basis,
    values: Array,
    deviations: Array,
    scatter: Array,
    is_estimated: bool,
    rng: np.random.Generator,
    sign: int,
) -> float:
    """Bootstrap p-value of "the curve is flat": how often noise alone explains as many squares as the best curve.

    Where the size of the scatter `is_estimated` from few residuals, it is drawn anew as Student's t would have it.
    """
    if is_estimated:
        degrees = max(len(values) - N_SHAPE_PARAMETERS, 1)
        scatter = scatter * np.sqrt(degrees / rng.chisquare(degrees, size=(len(scatter), 1)))
    flat = basis.unit.reshape(-1, len(values))
    noise = np.maximum((sign * (basis.whiten(deviations + scatter) @ flat.T)).max(axis=1), 0.0)
    return float((1 + (noise >= basis.gains(values, sign).max()).sum()) / (1 + len(noise)))


def _test_points(
    tokens: Array,
    values: Array,
    variance: Array,
    noise: Array,
    estimates: Array,
    sign: int,
    share: float,
    confidence: float,
) -> tuple[float, float]:
    """Lowest and highest saturation point that is not rejected, 0 and infinity for past the ends.

    First over the whole range; where few points are left, once more between their neighbours.
    """
    grid = np.unique(np.concatenate([saturation_grid(tokens), estimates]))
    within = int(np.searchsorted(grid, tokens.max() * (1 + 1e-9))) - 1
    n_beyond = N_TESTED // 5
    tested = np.concatenate(
        [
            np.linspace(0, within, N_TESTED - n_beyond).astype(np.int64),
            np.linspace(within, len(grid) - 1, n_beyond + 1).astype(np.int64),
            np.searchsorted(grid, estimates),
        ]
    )
    points = grid[np.unique(tested)]
    for rounds_left in (2, 1, 0):
        mesh, exponents = np.meshgrid(grid, EXPONENTS, indexing="ij")
        basis = _Basis.of(curve_shape(tokens, mesh, exponents, share), variance)
        p_values = _p_values(basis, values, noise, np.searchsorted(grid, points), sign)
        inside = np.flatnonzero(p_values > 1 - confidence)
        if len(inside) >= MIN_ACCEPTED or not rounds_left:
            break
        first, final = (inside[0], inside[-1]) if len(inside) else (p_values.argmax(),) * 2
        ends = points[max(first - 1, 0)], points[min(final + 1, len(points) - 1)]
        points = np.unique(np.concatenate([np.geomspace(*ends, N_TESTED // 2), points[first : final + 1]]))
        grid = np.unique(np.concatenate([grid, points]))
    return _accepted(points, p_values, 1 - confidence, grid)


def _p_values(basis: _Basis, values: Array, noise: Array, tested: NDArray[np.int64], sign: int) -> Array:
    """Bootstrap p-values of some saturation points of the grid, `[tested]`.

    A point's statistic is log(rss with it / rss of the best), which knows no scale: how large the noise is in all
    cancels. Projections of the noise on all shapes are made once; a curve only shifts them.
    """
    n_exponents, n_checkpoints = basis.unit.shape[1:]
    flat = basis.unit.reshape(-1, n_checkpoints)
    white = basis.whiten(noise)
    squares = (white**2).sum(axis=1)
    projected = sign * (white @ flat.T)
    floor = _tiny(values * basis.root)
    rss = basis.rss(values, sign)
    gains = basis.gains(values, sign)
    p_values = np.empty(len(tested))
    for place, point in enumerate(tested):
        exponent = int(rss[point].argmin())
        curve = sign * gains[point, exponent] * basis.unit[point, exponent]
        total = squares + 2 * (white @ curve) + curve @ curve
        lengths = projected + sign * (flat @ curve)
        own = lengths[:, point * n_exponents : (point + 1) * n_exponents]
        with_point, best = (
            np.maximum(total - np.maximum(columns.max(axis=1), 0.0) ** 2, floor) for columns in (own, lengths)
        )
        observed = math.log(rss[point].min() / rss.min())
        p_values[place] = (1 + (np.log(with_point / best) >= observed - 1e-12).sum()) / (1 + len(noise))
    return p_values


def _accepted(points: Array, p_values: Array, level: float, grid: Array) -> tuple[float, float]:
    """Lowest and highest point with p > `level`, interpolated in log tokens; 0 and infinity past the grid's ends."""
    inside = np.flatnonzero(p_values > level)
    if not inside.size:
        return math.inf, 0.0
    logs = np.log(points)

    def crossing(inner: int, outer: int) -> float:
        part = (p_values[inner] - level) / (p_values[inner] - p_values[outer])
        return float(np.exp(logs[inner] + part * (logs[outer] - logs[inner])))

    first, final = int(inside[0]), int(inside[-1])
    low = crossing(first, first - 1) if first > 0 else 0.0 if points[0] == grid[0] else float(points[0])
    if final < len(points) - 1:
        return low, crossing(final, final + 1)
    return low, math.inf if points[-1] == grid[-1] else float(points[-1])


def trend_p_value(values: Array, *, higher_is_better: bool) -> float:
    """One-sided p-value of Mann and Kendall's test that a series improves, exact for short series.

    The order of the checkpoints is all it knows: no curve, no scale. Without ties the null distribution is exact; with
    ties it is exact up to `MAX_EXACT_PERMUTATIONS` values and a normal one beyond. A constant series gives 1.

    Args:
        values: in the order of training, finite.
        higher_is_better: whether improving means rising.

    Returns:
        p in (0, 1]; NaN below two values.

    Example:
        >>> round(trend_p_value(np.array([4.0, 3.0, 2.0, 1.0]), higher_is_better=False), 4)   # 1 order of 24
        0.0417
    """
    n = len(values)
    if n < 2:
        return math.nan
    series = values if higher_is_better else -values
    if np.ptp(series) == 0:
        return 1.0
    if len(np.unique(series)) < n and n <= MAX_EXACT_PERMUTATIONS:
        pairs = np.triu_indices(n, 1)
        orders = series[np.array(list(itertools.permutations(range(n))))]
        scores = np.sign(orders[:, pairs[1]] - orders[:, pairs[0]]).sum(axis=1)
        return float((scores >= scores[0]).mean())
    return float(kendalltau(np.arange(n), series, alternative="greater").pvalue)


def median_slope(x: Array, y: Array) -> float:
    """Median of the slopes between all pairs of points (Theil and Sen); NaN below two.

    Example:
        >>> median_slope(np.array([0.0, 1, 2, 3, 4]), np.array([0.0, 1, 2, 3, 99]))
        1.0
    """
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i]))) if len(i) else math.nan
