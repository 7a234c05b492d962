"""Losses on features, as pure functions; all are computed in float32.

Reference: `app/vjepa/train.py`, `app/vjepa_2_1/train.py` and `src/masks/utils.py` of Meta's
V-JEPA 2; arXiv:2506.09985. Meta cuts all masks of a batch to the shortest, and takes the mean over
what is left. Here masks are padded, and means are over the tokens of the batch that are valid.
"""

import jax.numpy as jnp
import optax
from einops import rearrange

from jvjepa.errors import InputError
from jvjepa.layers import normalize
from jvjepa.masks import Grid
from jvjepa.typing import Array

NORM_EPS = 1e-5  # of LayerNorms without parameters
_TINY = 1e-12
_FAR = 2**30


def normalized_levels(levels: Array) -> Array:
    """Makes targets of the teacher's levels: each through a LayerNorm without parameters.

    Args:
        levels: float [n, B, N, D].

    Returns:
        float32 [B, N, n·D], one level after the other in the channels.
    """
    return rearrange(normalize(levels, NORM_EPS), "n b t d -> b t (n d)")


def mean_absolute_error(
    prediction: Array,
    target: Array,
    *,
    valid: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """The mean of |prediction - target| over tokens and channels.

    Args:
        prediction: float [B, K, C].
        target: float [B, K, C].
        valid: bool [B, K], the tokens that count, one or more; None means all.
        weights: float [B, K], what each token's error is multiplied with before the mean; the sum
            is divided by the number of tokens, not by that of the weights, as Meta's. None is 1.

    Returns:
        float32 [].

    Raises:
        InputError: shapes differ.
    """
    _check(prediction, target, valid=valid, weights=weights)
    error = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    error = jnp.mean(error, axis=-1)
    return _mean(error if weights is None else error * weights, valid)


def distance_weights(
    context_ids: Array, target_ids: Array, grid: Grid, *, target_valid: Array | None = None
) -> Array:
    """The weights of the context loss: the nearer to what is hidden, the more a token counts.

    Matches `compute_mask_distance` of `app/vjepa_2_1`: 1 / sqrt(distance), with the smallest
    Euclidean distance to a target in tubelets, rows and columns of tokens.

    Args:
        context_ids: int [B, M], none of them a target.
        target_ids: int [B, K].
        grid: (t, h, w), the tubelets, rows and columns of the clip's tokens.
        target_valid: bool [B, K], False where an id is only padding; one or more are True. None
            means that all are valid.

    Returns:
        float32 [B, M], above 0, at most 1.
    """
    _, rows, columns = grid
    squares = jnp.zeros((), jnp.int32)
    for unit, count in ((rows * columns, grid[0]), (columns, rows), (1, columns)):
        context, target = (ids // unit % count for ids in (context_ids, target_ids))
        squares = squares + jnp.square(context[:, :, None] - target[:, None, :])  # [B, M, K]
    if target_valid is not None:
        squares = jnp.where(target_valid[:, None, :], squares, _FAR)
    return jnp.min(squares, axis=-1).astype(jnp.float32) ** -0.25


def ramp(step: Array, start: int, end: int) -> Array:
    """The share of the context loss that counts at a step: 0 to `start`, 1 from `end` on.

    Matches `Lambda_LinearWarmupHold` of `app/vjepa_2_1`.

    Args:
        step: int [], from 0.
        start: where it begins to rise, linearly.
        end: where it has risen, above `start`.

    Returns:
        float32 [], 0 to 1.
    """
    return jnp.clip((step.astype(jnp.float32) - start) / (end - start), 0, 1)


def feature_regression(
    prediction: Array, target: Array, *, valid: Array | None = None
) -> tuple[Array, Array]:
    """How far features are from others, after a LayerNorm without parameters of both.

    Args:
        prediction: float [.., D].
        target: float [.., D].
        valid: bool [..], the features that count, one or more; None means all.

    Returns:
        smooth_l1: float32 [], the mean over features and channels of the smooth L1, that is
            square / 2 where the difference is below 1, and the difference - 1/2 elsewhere.
        cosine_distance: float32 [], the mean over features of 1 - cosine, 0 to 2.

    Raises:
        InputError: shapes differ.
    """
    _check(prediction, target, valid=valid)
    x, y = (normalize(features, NORM_EPS) for features in (prediction, target))
    smooth = jnp.mean(optax.huber_loss(x, y), axis=-1)
    # Features whose channels are all alike have no direction: the product is 0, the distance 1.
    lengths = (jnp.sum(x * x, axis=-1) + _TINY) * (jnp.sum(y * y, axis=-1) + _TINY)
    cosine = jnp.sum(x * y, axis=-1) / jnp.sqrt(lengths)
    return _mean(smooth, valid), _mean(1 - cosine, valid)


def _mean(values: Array, valid: Array | None) -> Array:
    if valid is None:
        return jnp.mean(values)
    total = jnp.sum(jnp.where(valid, values, jnp.zeros((), values.dtype)))
    return total / jnp.sum(valid, dtype=jnp.float32)


def _check(prediction: Array, target: Array, **per_token: Array | None) -> None:
    if prediction.shape != target.shape:
        raise InputError(
            f"prediction has the shape {prediction.shape} and target {target.shape}; they must be "
            "the same"
        )
    for name, values in per_token.items():
        if values is not None and values.shape != prediction.shape[:-1]:
            raise InputError(
                f"{name} has the shape {values.shape}; it must be {prediction.shape[:-1]}, a value "
                "for each token"
            )
