import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jvjepa.train.mos_loss import (
    adapt_weights,
    calibration_loss,
    quality_loss,
    ranking_loss,
    regression_loss,
    start_weights,
)


def draw(videos: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores on a raster, so that some differ by little or nothing, and predictions near them."""
    rng = np.random.default_rng(seed)
    scores = 1 + 0.07 * rng.integers(0, 58, (videos, 5))
    return scores + rng.normal(size=scores.shape) * rng.choice([0.02, 0.7], scores.shape), scores


def plain(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    """The formulas, number by number."""
    videos, regression, ranking, calibration = len(p), 0.0, 0.0, 0.0
    for i in range(videos):
        for d in range(5):
            distance = abs(p[i, d] - t[i, d])
            regression += 5 * distance**2 if distance < 0.1 else distance - 0.05
            weight = 1.5 if t[i, d] < 2.5 or t[i, d] > 4.0 else 1.0
            calibration += (weight * distance) ** 2
            for j in range(i + 1, videos):
                lead, predicted = t[i, d] - t[j, d], p[i, d] - p[j, d]
                if lead > 0.1:
                    ranking += max(0.0, 0.2 - predicted)
                elif lead < -0.1:
                    ranking += max(0.0, 0.2 + predicted)
    pairs = videos * (videos - 1) / 2 * 5
    return {
        "regression": regression / (videos * 5),
        "ranking": ranking / pairs if pairs else 0.0,
        "calibration": calibration / (videos * 5),
    }


@pytest.mark.parametrize("videos", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_the_formulas(videos: int, seed: int) -> None:
    predictions, scores = draw(videos, seed)
    expected = plain(predictions, scores)
    with jax.enable_x64(True):
        weights = {"regression": jnp.float64(0.6), "ranking": jnp.float64(0.4)}
        found, parts = quality_loss(jnp.asarray(predictions), jnp.asarray(scores), weights)
        assert found.dtype == jnp.float64
    total = 0.6 * expected["regression"] + 0.4 * expected["ranking"] + 0.1 * expected["calibration"]
    assert float(found) == pytest.approx(total, rel=1e-12)
    assert {name: float(x) for name, x in parts.items()} == pytest.approx(expected, rel=1e-12)
    narrow = [jnp.asarray(x, jnp.float32) for x in (predictions, scores)]
    single, _ = quality_loss(*narrow, start_weights())
    total = 0.7 * expected["regression"] + 0.3 * expected["ranking"] + 0.1 * expected["calibration"]
    assert single.dtype == jnp.float32
    assert float(single) == pytest.approx(total, rel=1e-6)


def test_losses_and_gradients_are_those_of_torch() -> None:
    predictions, scores = draw(9)
    p, t = torch.tensor(predictions, requires_grad=True), torch.tensor(scores)
    i, j = np.triu_indices(9, 1)
    significant = (t[i] - t[j]).abs() > 0.1
    ranked = torch.nn.functional.margin_ranking_loss(
        p[i], p[j], (t[i] - t[j]).sign(), margin=0.2, reduction="none"
    )
    others = {
        regression_loss: torch.nn.functional.smooth_l1_loss(p, t, beta=0.1),
        ranking_loss: (ranked * significant).mean(),
        calibration_loss: (torch.where((t < 2.5) | (t > 4), 2.25, 1.0) * (p - t) ** 2).mean(),
    }
    for loss, other in others.items():
        (gradient,) = torch.autograd.grad(other, p, retain_graph=True)
        with jax.enable_x64(True):
            found = jax.value_and_grad(loss)(jnp.asarray(predictions), jnp.asarray(scores))
        np.testing.assert_allclose(found[0], other.item(), rtol=1e-12)
        np.testing.assert_allclose(found[1], gradient.numpy(), atol=1e-14)


def test_equal_predictions_have_finite_gradients() -> None:
    scores = jnp.asarray([[1.0] * 5, [5.0] * 5, [5.0] * 5])
    for loss in (regression_loss, ranking_loss, calibration_loss):
        for predictions in (scores, jnp.full_like(scores, 3.0)):
            assert np.isfinite(jax.grad(loss)(predictions, scores)).all()
    assert not jax.grad(ranking_loss)(scores, scores).any()


def plain_weights(losses: np.ndarray) -> list[tuple[float, float]]:
    """The weights of each update, as the original's manager gives them, which looks at ten."""
    alpha, beta, found = 0.7, 0.3, []
    for n in range(len(losses)):
        found.append((alpha, beta))
        recent = losses[max(0, n - 9) : n + 1]
        if len(recent) < 6 or not recent[-6:-3].mean(axis=0).all():
            continue
        s, r = recent[-3:].mean(axis=0) / recent[-6:-3].mean(axis=0)
        if s > 1.1 and r < 0.9:
            alpha, beta = max(0.5, alpha - 0.1), min(0.5, beta + 0.1)
        elif s < 0.9 and r > 1.1:
            alpha, beta = min(0.8, alpha + 0.1), max(0.2, beta - 0.1)
        alpha, beta = alpha / (alpha + beta), beta / (alpha + beta)
    return found


@pytest.mark.parametrize("course", ["to ranking", "to regression", "wandering", "no ranking"])
def test_weights_adapt_as_the_original_does(course: str) -> None:
    n = np.arange(40)
    rng = np.random.default_rng(0)
    losses = {
        "to ranking": np.stack([1.2**n, 0.8**n], axis=1),
        "to regression": np.stack([0.8**n, 1.2**n], axis=1),
        "wandering": np.exp(rng.normal(size=(40, 2)).cumsum(axis=0) * [[0.5, -0.5]]),
        "no ranking": np.stack([1.2**n, np.where(n < 20, 0.0, 0.5)], axis=1),
    }[course]
    weights, found = start_weights(), []
    adapt = jax.jit(adapt_weights)
    for regression, ranking in losses:
        found.append((float(weights["regression"]), float(weights["ranking"])))
        update = {"regression": jnp.float32(regression), "ranking": jnp.float32(ranking)}
        weights = adapt(weights, update)
    expected = plain_weights(losses)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[:6] == [pytest.approx((0.7, 0.3))] * 6
    if course.startswith("to"):
        assert found[-1] == pytest.approx((0.5, 0.5) if "ranking" in course else (0.8, 0.2))
    if course == "wandering":
        assert len(set(np.round(found, 3)[:, 0])) > 2
