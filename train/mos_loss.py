"""The loss that scores are learned with: how far, in which order, and how far at the extremes.

    loss = regression_weight · regression + ranking_weight · ranking + 0.1 · calibration

The first two weights adapt to the course of the training, and only there: they are part of what a
checkpoint holds, and an evaluation does not touch them.

Reference: `HybridLossFunction` and `AdaptiveLossManager` of QualiVision (`src/utils/training.py`).
"""

from collections.abc import Mapping

import jax.numpy as jnp

from jvjepa.typing import Array, Params

BEND = 0.1  # where the regression loss turns from a square into a line
SIGNIFICANT = 0.1  # least difference of two scores whose order is learned
MARGIN = 0.2  # by which their predictions should differ
LOW, HIGH = 2.5, 4.0  # scores below and above are rare, and weigh more
EXTREME_WEIGHT = 1.5
CALIBRATION_WEIGHT = 0.1
START = (0.7, 0.3)  # weights of regression and ranking
WINDOW = 3  # updates whose mean is compared with that of as many before


def regression_loss(predictions: Array, scores: Array) -> Array:
    """Measures how far predictions are from scores: smooth L1.

    Args:
        predictions: float [B, 5].
        scores: the same, what is right.

    Returns:
        float [], the mean.
    """
    distance = jnp.abs(predictions - scores)
    square = distance * distance * (0.5 / BEND)
    return jnp.mean(jnp.where(distance < BEND, square, distance - 0.5 * BEND))


def ranking_loss(predictions: Array, scores: Array) -> Array:
    """Measures how far the predictions of each pair of videos are from being in order.

    A pair whose scores differ by no more than 0.1 costs nothing, but is counted.

    Args:
        predictions: float [B, 5].
        scores: the same, what is right.

    Returns:
        float [], the mean over all pairs and scores; 0 where there is no pair.
    """
    videos, kinds = predictions.shape
    lead = scores[:, None] - scores[None]  # [B, B, 5]; each pair stands twice, signs reversed
    predicted = predictions[:, None] - predictions[None]
    cost = jnp.maximum(MARGIN - jnp.sign(lead) * predicted, 0.0)
    total = jnp.sum(jnp.where(jnp.abs(lead) > SIGNIFICANT, cost, 0.0))
    return total / max(videos * (videos - 1) * kinds, 1)


def calibration_loss(predictions: Array, scores: Array) -> Array:
    """Measures the squared distance, 2.25 times as much where a score is below 2.5 or above 4.

    Args:
        predictions: float [B, 5].
        scores: the same, what is right.

    Returns:
        float [], the mean.
    """
    extreme = (scores < LOW) | (scores > HIGH)
    distance = jnp.where(extreme, EXTREME_WEIGHT, 1.0) * (predictions - scores)
    return jnp.mean(distance * distance)


def quality_loss(predictions: Array, scores: Array, weights: Params) -> tuple[Array, Params]:
    """Adds the three losses up.

    Args:
        predictions: float [B, 5].
        scores: the same, what is right, 1 to 5.
        weights: from `start_weights` or `adapt_weights`.

    Returns:
        float [], and its parts "regression", "ranking" and "calibration", each float [].
    """
    parts = {
        "regression": regression_loss(predictions, scores),
        "ranking": ranking_loss(predictions, scores),
        "calibration": calibration_loss(predictions, scores),
    }
    total = weights["regression"] * parts["regression"] + weights["ranking"] * parts["ranking"]
    return total + CALIBRATION_WEIGHT * parts["calibration"], parts


def start_weights() -> Params:
    """The weights that a training begins with.

    Returns:
        "regression" and "ranking", float32 []; and what they adapt to: "history" float32 [6, 2],
        the two losses of the last updates, and "count" int32 [], how many of them there are.
    """
    regression, ranking = START
    return {
        "regression": jnp.float32(regression),
        "ranking": jnp.float32(ranking),
        "history": jnp.zeros((2 * WINDOW, 2), jnp.float32),
        "count": jnp.zeros((), jnp.int32),
    }


def adapt_weights(weights: Params, losses: Mapping[str, Array]) -> Params:
    """Moves weight to the loss that has grown, where the other has fallen.

    Compared are the means of three updates with those of the three before. Where one loss has grown
    by more than a tenth and the other has fallen by more, a weight of 0.1 changes over:
    regression keeps 0.5 to 0.8, ranking 0.2 to 0.5. Where a mean before is 0 nothing changes.

    The original moves weight to ranking where the regression loss has grown; that is kept.

    Args:
        weights: as they were for the update.
        losses: of the update, "regression" and "ranking" float32 [].

    Returns:
        The weights of the next one.
    """
    new = jnp.stack([losses["regression"], losses["ranking"]])[None]
    history = jnp.concatenate([weights["history"][1:], new])
    count = jnp.minimum(weights["count"] + 1, 2 * WINDOW)
    before, now = history[:WINDOW].sum(axis=0), history[WINDOW:].sum(axis=0)
    known = (count == 2 * WINDOW) & jnp.all(before > 0)
    trend = now / jnp.where(before > 0, before, 1.0)
    grown, fallen = trend > 1.1, trend < 0.9
    to_ranking = known & grown[0] & fallen[1]
    to_regression = known & fallen[0] & grown[1]

    def move(weight: Array, up: Array, down: Array, least: float, most: float) -> Array:
        weight = jnp.where(up, jnp.minimum(weight + 0.1, most), weight)
        return jnp.where(down, jnp.maximum(weight - 0.1, least), weight)

    regression = move(weights["regression"], to_regression, to_ranking, 0.5, 0.8)
    ranking = move(weights["ranking"], to_ranking, to_regression, 0.2, 0.5)
    total = regression + ranking
    return {
        "regression": regression / total,
        "ranking": ranking / total,
        "history": history,
        "count": count,
    }
