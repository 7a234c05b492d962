from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative_error

from jvjepa.encoder import concatenate_levels
from jvjepa.errors import InputError
from jvjepa.masks import MaskConfig, sample
from jvjepa.train.losses import (
    distance_weights,
    feature_regression,
    mean_absolute_error,
    normalized_levels,
    ramp,
)
from jvjepa.typing import Array

TOLERANCE = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_valid(*shape: int, seed: int = 0) -> np.ndarray:
    """As masks have it: some at the beginning, padding behind."""
    counts = np.random.default_rng(seed).integers(1, shape[1], size=(shape[0], 1), endpoint=True)
    return np.arange(shape[1])[None] < counts


def layer_norm(x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


# --- Masked L1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_mean_is_over_valid_tokens_of_the_batch(
    batch: int, weighted: bool, padded: bool
) -> None:
    prediction, target = normal(batch, 7, 5), normal(batch, 7, 5, seed=1)
    weights = np.abs(normal(batch, 7, seed=2)) if weighted else None
    valid = random_valid(batch, 7, seed=3) if padded else None
    total, count = 0.0, 0
    for b in range(batch):
        for k in range(7):
            if valid is None or valid[b, k]:
                error = np.abs(prediction[b, k].astype(np.float64) - target[b, k]).sum()
                total += error * (1.0 if weights is None else weights[b, k])
                count += 5
    run = jax.jit(mean_absolute_error)
    found = run(prediction, target, valid=valid, weights=weights)
    assert found.dtype == jnp.float32
    assert relative_error(found, total / count) <= TOLERANCE


def test_padding_has_no_gradient_and_no_influence() -> None:
    prediction, target = normal(2, 6, 4), normal(2, 6, 4, seed=1)
    valid = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    other = np.where(valid[..., None], prediction, 1e6).astype(np.float32)
    run = jax.value_and_grad(lambda p: mean_absolute_error(p, target, valid=valid))
    (first, gradient), (second, again) = run(jnp.asarray(prediction)), run(jnp.asarray(other))
    assert first == second
    assert np.array_equal(gradient, again)
    assert np.array_equal(np.any(np.asarray(gradient) != 0, axis=-1), valid)
    assert np.allclose(np.abs(np.asarray(gradient)[valid]), 1 / (8 * 4), rtol=1e-6, atol=0)


def test_bfloat16_is_compared_in_float32() -> None:
    prediction = normal(2, 5, 8).astype(jnp.bfloat16)
    target = normal(2, 5, 8, seed=1)
    expected = np.abs(prediction.astype(np.float64) - target).mean()
    assert relative_error(mean_absolute_error(prediction, target), expected) <= 1e-6


# --- Targets -------------------------------------------------------------------------------------


def test_every_level_has_a_norm_of_its_own() -> None:
    levels = normal(4, 2, 6, 10) * np.array([1, 30, 0.1, 5], np.float32).reshape(4, 1, 1, 1) + 3
    found = jax.jit(normalized_levels)(levels)
    assert found.shape == (2, 6, 40)
    for i, level in enumerate(levels):
        part = found[..., 10 * i : 10 * (i + 1)]
        assert relative_error(part, layer_norm(level)) <= TOLERANCE
    whole = layer_norm(np.asarray(concatenate_levels(jnp.asarray(levels))))
    assert relative_error(found, whole) > 0.1  # one norm over all levels is something else


# --- Distances -----------------------------------------------------------------------------------


def brute_force(context: np.ndarray, target: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Ids of one clip, without padding."""
    _, rows, columns = grid
    places = [
        np.array([[i // (rows * columns), i // columns % rows, i % columns] for i in ids], float)
        for ids in (context, target)
    ]
    distances = [min(np.linalg.norm(place - other) for other in places[1]) for place in places[0]]
    return 1 / np.sqrt(distances)


@pytest.mark.parametrize(("grid", "batch"), [((3, 5, 7), 3), ((1, 9, 4), 2), ((4, 3, 6), 1)])
def test_distance_weights(grid: tuple[int, int, int], batch: int) -> None:
    config = MaskConfig(num_blocks=3, spatial_scale=(0.15, 0.3), temporal_scale=(0.4, 1.0))
    size = int(np.prod(grid))
    masks = sample(
        *(jax.random.key(1), config, grid, batch), num_context=size - 1, num_targets=size // 2
    )
    found = jax.jit(distance_weights, static_argnums=2)(
        masks.context_ids, masks.target_ids, grid, target_valid=masks.target_valid
    )
    assert found.shape == masks.context_ids.shape
    assert not np.asarray(masks.target_valid).all() or not np.asarray(masks.context_valid).all()
    for b in range(batch):
        context = np.asarray(masks.context_ids[b])[np.asarray(masks.context_valid[b])]
        target = np.asarray(masks.target_ids[b])[np.asarray(masks.target_valid[b])]
        expected = brute_force(context, target, grid)
        assert relative_error(found[b, : len(context)], expected) <= 1e-6
        assert expected.min() < 1


def test_padding_is_no_target() -> None:
    """A padded id that is near would make the distance smaller."""
    context, target = jnp.array([[0, 3]]), jnp.array([[11, 1]])
    valid = jnp.array([[True, False]])
    far = distance_weights(context, target, (1, 3, 4), target_valid=valid)
    expected = [13**-0.25, 2**-0.5]
    assert relative_error(far[0], expected) <= 1e-6
    near = distance_weights(context, target, (1, 3, 4))
    assert relative_error(near[0], [1.0, 2**-0.5]) <= 1e-6


# --- Ramp ----------------------------------------------------------------------------------------


def test_the_ramp() -> None:
    steps = np.array([0, 14_999, 15_000, 15_001, 20_000, 29_999, 30_000, 500_000])
    expected = [min(max(step - 15_000, 0) / 15_000, 1) for step in steps]
    found = jax.jit(jax.vmap(lambda step: ramp(step, 15_000, 30_000)))(jnp.asarray(steps))
    assert relative_error(found, expected) <= 1e-6
    assert found[2] == 0
    assert found[-2] == 1


# --- Feature regression --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 4, 16), (5, 8), (2, 3, 2, 12)])
@pytest.mark.parametrize("padded", [False, True])
def test_feature_regression(shape: tuple[int, ...], padded: bool) -> None:
    prediction, target = 4 * normal(*shape) + 1, normal(*shape, seed=1) - 2
    valid = (
        np.random.default_rng(2).random(shape[:-1]) < 0.6 if padded else np.ones(shape[:-1], bool)
    )
    valid.flat[0] = True
    x, y = layer_norm(prediction)[valid], layer_norm(target)[valid]
    difference = np.abs(x - y)
    smooth = np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    found = jax.jit(feature_regression)(prediction, target, valid=valid if padded else None)
    assert relative_error(found[0], smooth) <= TOLERANCE
    assert relative_error(found[1], (1 - cosine).mean()) <= TOLERANCE


def test_what_is_alike_is_at_no_distance() -> None:
    features = normal(2, 5, 12)
    smooth, cosine = feature_regression(3 * features + 1, features)
    assert float(smooth) < 1e-9
    assert abs(float(cosine)) < 1e-6
    assert abs(float(feature_regression(-features, features)[1]) - 2) < 1e-6


def test_features_without_direction_have_finite_gradients() -> None:
    features, flat = normal(1, 2, 8), np.full((1, 2, 8), 3.0, np.float32)
    for pair in ((features, flat), (flat, features), (flat, flat)):
        gradient = jax.grad(lambda p, t: sum(feature_regression(p, t)))(*pair)
        assert np.isfinite(np.asarray(gradient)).all()
        assert feature_regression(*pair)[1] == 1


# --- Gradients -----------------------------------------------------------------------------------


def smooth_l1(prediction: Array) -> Array:
    return feature_regression(prediction, normal(2, 3, 6, seed=1))[0]


def cosine_distance(prediction: Array) -> Array:
    valid = np.array([[1, 1, 0], [1, 0, 0]], bool)
    return feature_regression(prediction, normal(2, 3, 6, seed=1), valid=valid)[1]


def masked_l1(prediction: Array) -> Array:
    valid = np.array([[1, 1, 0], [1, 0, 0]], bool)
    how: dict[str, Any] = {"valid": valid, "weights": np.abs(normal(2, 3, seed=2))}
    return mean_absolute_error(prediction, normal(2, 3, 6, seed=1), **how)


@pytest.mark.parametrize("loss", [smooth_l1, cosine_distance, masked_l1])
def test_gradients_are_those_of_finite_differences(loss: Callable[[Array], Array]) -> None:
    with jax.enable_x64(False):
        point = jnp.asarray(normal(2, 3, 6))
        gradient = np.asarray(jax.grad(loss)(point))
        for seed in range(5):
            direction, size = normal(2, 3, 6, seed=10 + seed), 1e-2
            ends = [float(loss(point + sign * size * direction)) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * size)
            assert abs((gradient * direction).sum() - expected) <= 2e-3 * np.abs(gradient).sum()


# --- Bad input -----------------------------------------------------------------------------------


def test_shapes_that_differ_are_refused() -> None:
    x, y = normal(2, 3, 4), normal(2, 1, 4)
    for loss in (mean_absolute_error, feature_regression):
        message = r"prediction has the shape \(2, 3, 4\) and target \(2, 1, 4\)"
        with pytest.raises(InputError, match=message):
            loss(x, y)
        with pytest.raises(InputError, match=r"valid has the shape \(2,\); it must be \(2, 3\)"):
            loss(x, x, valid=np.ones(2, bool))
    with pytest.raises(InputError, match=r"weights has the shape \(2, 3, 4\)"):
        mean_absolute_error(x, x, weights=x)
