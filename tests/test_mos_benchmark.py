import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jvjepa.quality import SCORES, text_features
from jvjepa.train.degradations import blur, fade, noise, repeat
from jvjepa.train.mos_metrics import intervals, measure
from jvjepa.train.synthetic import render, write_video

sys.path[:0] = [str(Path(__file__).parent.parent / "benchmarks")]
mos = importlib.import_module("mos")

FRAMES = render(1, 7, mos.VIDEOS)


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 100.0])
def test_ridge_regression(penalty: float) -> None:
    """The same as least squares with rows that pull the weights to zero."""
    rng = np.random.default_rng(0)
    x, y, others = (rng.normal(size=shape) for shape in ((30, 7), (30, 5), (4, 7)))
    x -= x.mean(axis=0)
    rows = np.concatenate([x, np.sqrt(penalty) * np.eye(7)])
    right = np.concatenate([y - y.mean(axis=0), np.zeros((7, 5))])
    weights = np.linalg.lstsq(rows, right, rcond=None)[0]
    found = mos.ridge(x, y, others, penalty)
    np.testing.assert_allclose(found, others @ weights + y.mean(axis=0), atol=1e-10)


def test_statistics_see_degradations(tmp_path: Path) -> None:
    def of(name: str, frames: np.ndarray) -> np.ndarray:
        path = tmp_path / f"{name}.mp4"
        write_video(path, frames, 8)
        return mos.statistics(path, mos.PROMPTS[3])

    draw = np.random.default_rng(0)
    clean = of("clean", FRAMES)
    assert np.isfinite(clean).all()
    assert clean[-16:].tolist() == [0, 0, 0, 1, *[0] * 12]
    blurred, noisy = of("blurred", blur(FRAMES, 1.0)), of("noisy", noise(FRAMES, 1.0, draw))
    faded, slow = of("faded", fade(FRAMES, 1.0)), of("slow", repeat(FRAMES, 1.0, draw))
    assert blurred[0] < clean[0] < noisy[0]  # variance of the Laplacian
    assert faded[2] < clean[2]  # contrast
    assert slow[9] < clean[9]  # least change from frame to frame


def test_prompts_have_features_of_their_own(tmp_path: Path) -> None:
    model = mos.text_model(tmp_path / "text", 0)
    found = np.asarray(text_features(model, mos.PROMPTS))
    cosines = found @ found.T - np.eye(16)
    assert cosines.max() < 0.99
    assert not any("[UNK]" in model.tokenizer.inner.encode(text).tokens for text in mos.PROMPTS)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mos, "RESAMPLES", 20)
    rng = np.random.default_rng(0)
    scores = rng.uniform(1, 5, (20, 5))
    predictions = scores + rng.normal(size=scores.shape)
    metrics, ends = measure(predictions, scores), intervals(predictions, scores, resamples=10)
    row: dict[str, Any] = {"metrics": metrics, "intervals": ends}
    sizes = {field: getattr(mos.QUICK, field) for field in mos.QUICK.__dataclass_fields__}
    better = mos.gain(scores, predictions, scores)
    assert 0 < better[1] < better[0] < better[2]
    assert better[0] == pytest.approx(1 - metrics["final_score"])
    row["gain"] = better
    report = {"sizes": sizes, "seed": 0, "rows": {"pixels": row}, "machine": ["CPU: one"]}
    mos.write(tmp_path, report)
    text = (tmp_path / "mos.md").read_text()
    lines = text.splitlines()
    assert "24 held-out videos, 48 to learn from" in lines[2]
    assert [cell.strip() for cell in lines[4].split("|")[2:-1]] == [*SCORES, "final score", "gain"]
    low, high = ends["Temporal/srocc"]
    assert f"| {metrics['Temporal/srocc']:.2f} ({low:.2f} to {high:.2f}) |" in lines[6]
    assert lines[6].endswith(f"| {better[0]:.2f} ({better[1]:.2f} to {better[2]:.2f}) |")
    assert lines[-1] == "- CPU: one"
    assert (tmp_path / "mos.json").is_file()
    assert not list(tmp_path.glob("*.part"))


def test_a_patch_embedding_of_cosines() -> None:
    """Stripes that stand still, and the same that jump, are told apart by columns of their own."""
    kernel = mos.cosines()
    assert kernel.shape == (2 * 8 * 8 * 3, 96)
    assert np.linalg.matrix_rank(kernel) == 96
    x = np.arange(8) + np.zeros((8, 1))
    stripes = np.cos(np.pi * 3 * (x + 0.5) / 8)[..., None] + np.zeros(3)
    still = np.stack([stripes, stripes]).ravel() @ kernel
    jumps = np.stack([stripes, -stripes]).ravel() @ kernel
    assert np.flatnonzero(np.abs(still) > 1e-9).tolist() == [3]
    assert np.flatnonzero(np.abs(jumps) > 1e-9).tolist() == [36 + 3]
    red = np.tile([1.0, -1.0, 0.0], 2 * 8 * 8)
    assert np.flatnonzero(np.abs(red @ kernel) > 1e-9).tolist() == [72]
