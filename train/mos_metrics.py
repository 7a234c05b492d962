"""How well predicted scores agree with those that people gave.

Two definitions of one number are about, and are not comparable: "overall_score" looks at the
overall score alone, "final_score", which counts in the VQualA challenge, at all five.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from jvjepa.errors import InputError
from jvjepa.quality import SCORES

METRICS = ("srocc", "plcc", "krocc", "rmse", "mae")
OVERALL, FINAL = "overall_score", "final_score"
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Where a metric lies when other videos are drawn; nan where it is not defined.

    Args:
        low: lower end.
        high: upper end.
    """

    low: float
    high: float


def measure(predictions: NDArray[np.floating], scores: NDArray[np.floating]) -> dict[str, float]:
    """Compares predictions with scores.

    Args:
        predictions: float [n, 5], in the order of `jvjepa.quality.SCORES`.
        scores: the same, what is right.

    Returns:
        "Traditional/srocc" and so on: for each score Spearman's, Pearson's and Kendall's
        correlation (srocc, plcc, krocc), root of the mean square and mean absolute error (rmse,
        mae). "overall_score": (srocc + plcc) / 2 of the overall score. "final_score": the mean of
        all ten srocc and plcc. A correlation is nan where one side has a single value.

    Raises:
        InputError: the arrays have another shape, or a value is not finite.
    """
    predictions, scores = _checked(predictions, scores)
    return {name: float(value) for name, value in _measure(predictions, scores).items()}


def intervals(
    predictions: NDArray[np.floating],
    scores: NDArray[np.floating],
    *,
    resamples: int = 1000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Interval]:
    """Estimates how much `measure` depends on which videos were drawn: percentile bootstrap.

    Args:
        predictions: as in `measure`.
        scores: as in `measure`.
        resamples: how often as many videos are drawn anew, with replacement, all five scores of a
            video together.
        confidence: the share of the resamples that lies inside, above 0 and below 1.
        seed: of the draws.

    Returns:
        For each metric of `measure` its interval; resamples where it is not defined do not count.

    Raises:
        InputError: as `measure`, or a number is impossible.
    """
    predictions, scores = _checked(predictions, scores)
    if resamples < 1:
        raise InputError(f"resamples = {resamples}; it must be 1 or more")
    if not 0 < confidence < 1:
        raise InputError(f"confidence = {confidence}; it must be above 0 and below 1")
    rows = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    tails = (0.5 - confidence / 2, 0.5 + confidence / 2)
    found: dict[str, Interval] = {}
    for name, values in _measure(predictions[rows], scores[rows]).items():
        known = values[np.isfinite(values)]
        found[name] = Interval(*(np.quantile(known, tails) if len(known) else (np.nan, np.nan)))
    return found


def _measure(
    predictions: NDArray[np.float64], scores: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The metrics of `measure`, each [...], of predictions and scores [..., n, 5]."""
    found: dict[str, NDArray[np.float64]] = {}
    for i, name in enumerate(SCORES):
        of_one = _of_one(predictions[..., i], scores[..., i])
        found |= {f"{name}/{metric}": value for metric, value in of_one.items()}
    means = {name: (found[f"{name}/srocc"] + found[f"{name}/plcc"]) / 2 for name in SCORES}
    return found | {OVERALL: means["Overall"], FINAL: np.mean(list(means.values()), axis=0)}


def _of_one(
    predictions: NDArray[np.float64], scores: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The metrics of one score, of [..., n]."""
    error = predictions - scores
    size = {"rmse": np.sqrt(np.mean(error**2, axis=-1)), "mae": np.mean(np.abs(error), axis=-1)}
    unordered = _is_constant(predictions) | _is_constant(scores)
    if unordered.all():
        return dict.fromkeys(("srocc", "plcc", "krocc"), np.full(unordered.shape, np.nan)) | size
    anything = np.arange(predictions.shape[-1], dtype=np.float64)  # where there is no correlation
    pair = [np.where(unordered[..., None], anything, x) for x in (predictions, scores)]
    ranks = [stats.rankdata(x, axis=-1) for x in pair]
    kendall = np.vectorize(lambda p, t: stats.kendalltau(p, t).statistic, signature="(n),(n)->()")
    found = {
        "srocc": stats.pearsonr(*ranks, axis=-1).statistic,
        "plcc": stats.pearsonr(*pair, axis=-1).statistic,
        "krocc": kendall(*pair),
    }
    return {name: np.where(unordered, np.nan, value) for name, value in found.items()} | size


def _is_constant(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the last axis has a single value; rounding has no order."""
    return np.ptp(values, axis=-1) <= 1e-12 * np.abs(values).max(axis=-1)


def _checked(
    predictions: NDArray[np.floating], scores: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pair = [np.asarray(x, np.float64) for x in (predictions, scores)]
    for name, x in zip(("predictions", "scores"), pair, strict=True):
        if x.ndim != 2 or x.shape[1] != len(SCORES) or len(x) != len(pair[0]) or not len(x):
            raise InputError(
                f"{name} have the shape {list(x.shape)}; both must be [n, {len(SCORES)}], n 1 or "
                "more"
            )
        if not np.isfinite(x).all():
            row = int(np.argmin(np.isfinite(x).all(axis=1)))
            raise InputError(f"{name} have a value that is not finite, in row {row}")
    return pair[0], pair[1]
