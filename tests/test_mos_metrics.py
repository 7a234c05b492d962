import itertools

import numpy as np
import pytest

from jvjepa.errors import InputError
from jvjepa.quality import SCORES
from jvjepa.train.mos_metrics import intervals, measure

RNG = np.random.default_rng(0)
SCORED = RNG.integers(4, 21, (23, 5)) / 4  # with ties
PREDICTED = SCORED + RNG.normal(size=SCORED.shape)


def ranks(x: np.ndarray) -> np.ndarray:
    """Of equal values the mean rank."""
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Tau-b, pair by pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = np.array([[np.sign(a[i] - a[j]) for a in (x, y)] for i, j in pairs])
    return (signs[:, 0] @ signs[:, 1]) / np.sqrt((signs**2).sum(axis=0).prod())


def test_metrics_are_their_definitions() -> None:
    found = measure(PREDICTED, SCORED)
    for d, name in enumerate(SCORES):
        p, t = PREDICTED[:, d], SCORED[:, d]
        expected = {
            "srocc": correlation(ranks(p), ranks(t)),
            "plcc": correlation(p, t),
            "krocc": kendall(p, t),
            "rmse": np.sqrt(((p - t) ** 2).mean()),
            "mae": np.abs(p - t).mean(),
        }
        its = {metric: found[f"{name}/{metric}"] for metric in expected}
        assert its == pytest.approx(expected, abs=1e-12)
    both = [found[f"{name}/{metric}"] for name in SCORES for metric in ("srocc", "plcc")]
    assert found["final_score"] == pytest.approx(sum(both) / 10)
    assert found["overall_score"] == pytest.approx(sum(both[-2:]) / 2)
    assert found["overall_score"] != pytest.approx(found["final_score"])
    assert len(found) == 27


def test_order_alone_counts_for_ranks_and_scale_does_not_for_plcc() -> None:
    found, bent = measure(PREDICTED, SCORED), measure(np.exp(PREDICTED), SCORED)
    moved = measure(7 - 2 * PREDICTED, SCORED)
    for name in SCORES:
        assert bent[f"{name}/srocc"] == pytest.approx(found[f"{name}/srocc"])
        assert bent[f"{name}/krocc"] == pytest.approx(found[f"{name}/krocc"])
        assert bent[f"{name}/plcc"] != pytest.approx(found[f"{name}/plcc"])
        for metric in ("srocc", "plcc", "krocc"):
            assert moved[f"{name}/{metric}"] == pytest.approx(-found[f"{name}/{metric}"])
    perfect = measure(SCORED, SCORED)
    assert perfect["final_score"] == pytest.approx(1)
    assert perfect["Overall/rmse"] == perfect["Overall/mae"] == 0


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e-300])
def test_a_constant_has_no_correlation_and_no_score(constant: float) -> None:
    predictions = PREDICTED.copy()
    predictions[:, 1] = constant
    found = measure(predictions, SCORED)
    for metric in ("srocc", "plcc", "krocc"):
        assert np.isnan(found[f"Alignment/{metric}"])
    assert np.isfinite(found["Alignment/rmse"])
    assert np.isnan(found["final_score"])
    assert np.isfinite(found["overall_score"])
    assert np.isnan(measure(PREDICTED[:1], SCORED[:1])["overall_score"])
    almost = np.where(RNG.random(SCORED.shape) < 0.5, 3.0, np.nextafter(3.0, 4.0))
    assert np.isnan(measure(almost, SCORED)["final_score"])


def test_intervals_hold_what_they_should() -> None:
    """Of 25 data sets the true correlation lies in about nine of ten 90 % intervals."""
    rng, inside, widths = np.random.default_rng(1), 0, []
    for seed in range(25):
        truth = rng.normal(size=(30, 5))
        seen = truth + rng.normal(size=truth.shape)  # of correlation 1 / sqrt(2)
        found = intervals(seen, truth, resamples=40, confidence=0.9, seed=seed)["Overall/plcc"]
        inside += found.low <= 2**-0.5 <= found.high
        widths.append(found.high - found.low)
    assert 17 <= inside <= 24
    assert 0.15 < np.mean(widths) < 0.5


def test_intervals_follow_from_the_seed() -> None:
    options = {"resamples": 40, "seed": 3}
    found = intervals(PREDICTED, SCORED, **options)
    assert found == intervals(PREDICTED, SCORED, **options)
    assert found != intervals(PREDICTED, SCORED, resamples=40, seed=4)
    middle = measure(PREDICTED, SCORED)
    assert set(found) == set(middle)
    assert all(found[name].low <= found[name].high for name in found)
    assert found["final_score"].low < middle["final_score"] < found["final_score"].high
    wide = intervals(PREDICTED, SCORED, confidence=0.99, **options)["final_score"]
    assert wide.low <= found["final_score"].low
    assert wide.high >= found["final_score"].high


def test_what_is_never_defined_has_no_interval() -> None:
    constant = np.full_like(PREDICTED, 3.0)
    found = intervals(constant, SCORED, resamples=5)
    assert np.isnan(found["Overall/srocc"]).all()
    assert found["Overall/rmse"].low <= found["Overall/rmse"].high


def test_bad_input() -> None:
    broken = PREDICTED.copy()
    broken[4, 2] = np.nan
    with pytest.raises(InputError, match=r"predictions have a value that is not finite, in row 4"):
        measure(broken, SCORED)
    with pytest.raises(InputError, match=r"scores have the shape \[22, 5\]"):
        measure(PREDICTED, SCORED[1:])
    for shape in ((0, 5), (3, 4), (5,)):
        with pytest.raises(InputError, match=r"predictions have the shape"):
            measure(np.zeros(shape), np.zeros(shape))
    with pytest.raises(InputError, match=r"resamples = 0"):
        intervals(PREDICTED, SCORED, resamples=0)
    with pytest.raises(InputError, match=r"confidence = 1\.0"):
        intervals(PREDICTED, SCORED, confidence=1.0)
