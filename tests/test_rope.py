import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import relative_error
from transformers.models.vjepa2.modeling_vjepa2 import rotate_queries_or_keys

from jvjepa import rope

WIDTHS = [24, 32, 64, 80]


def _places(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, size=(n, 3)).astype(np.float32)


def _rotated(x: np.ndarray, places: np.ndarray, variant: str) -> np.ndarray:
    """x [n, K] at places [n, 3]."""
    cos, sin = rope.tables(jnp.asarray(places), x.shape[-1], variant)
    return np.asarray(rope.rotate(jnp.asarray(x)[None, :, None], cos[None], sin[None]))[0, :, 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_tiled_is_what_the_released_weights_were_trained_with(width: int) -> None:
    x = np.random.default_rng(1).normal(size=(50, width)).astype(np.float32)
    places = _places(50)
    axis = 2 * ((width // 3) // 2)
    parts = [
        rotate_queries_or_keys(
            torch.from_numpy(x[None, None, :, i * axis : (i + 1) * axis]),
            torch.from_numpy(places[:, i]),
        )[0, 0]
        for i in range(3)
    ]
    expected = np.concatenate([*parts, x[:, 3 * axis :]], axis=-1)
    assert relative_error(_rotated(x, places, "tiled"), expected) <= 1e-6
    assert relative_error(_rotated(x, places, "interleaved"), expected) > 0.1


@pytest.mark.parametrize("width", WIDTHS)
def test_interleaved_is_a_rotation_and_tiled_is_not(width: int) -> None:
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, 1, width)).astype(np.float32)
    a, b = _places(1, 3), _places(1, 4)
    shift = np.asarray([[7.0, 2.0, 5.0]], np.float32)

    def score(variant: str, move: np.ndarray) -> float:
        return (_rotated(q, a + move, variant) @ _rotated(k, b + move, variant).T).item()

    norm = np.linalg.norm(q)
    assert np.linalg.norm(_rotated(q, a, "interleaved")) == pytest.approx(norm, rel=1e-5)
    assert score("interleaved", shift) == pytest.approx(score("interleaved", 0 * shift), abs=1e-4)
    assert abs(np.linalg.norm(_rotated(q, a, "tiled")) / norm - 1) > 1e-3
    assert abs(score("tiled", shift) - score("tiled", 0 * shift)) > 1e-2


def test_positions_split_ids() -> None:
    found = rope.positions(jnp.arange(2 * 3 * 5), rope.Layout(3, 5))
    expected = [(t, r, c) for t in range(2) for r in range(3) for c in range(5)]
    assert np.array_equal(found, np.asarray(expected, np.float32))


def test_tables_stay_exact_where_half_precision_would_not() -> None:
    places = jnp.asarray([[70_000.0, 0.0, 0.0]])
    cos, _ = rope.tables(places, 24, "tiled")
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.cos(70_000.0 * frequencies.astype(np.float32).astype(np.float64))
    assert np.abs(np.asarray(cos)[0, :4] - expected).max() < 0.005  # float32 has 24 bits
