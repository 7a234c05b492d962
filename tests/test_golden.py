"""Parity of the encoders with Meta's official code, whose outputs are in tests/golden."""

import functools

import jax.numpy as jnp
import numpy as np
import official
import pytest
from models import relative_error

from jvjepa import Encoder
from jvjepa.config import ModelConfig
from jvjepa.encoder import concatenate_levels
from jvjepa.typing import Array, Params

MODELS = {
    "vjepa2_tiny": (official.V2, "target_encoder"),
    "vjepa2_1_tiny_teacher": (official.TEACHER, "target_encoder"),
    "vjepa2_1_tiny_distilled": (official.DISTILLED, "ema_encoder"),
}
V2_1 = ["vjepa2_1_tiny_teacher", "vjepa2_1_tiny_distilled"]


@functools.cache
def golden(name: str) -> tuple[ModelConfig, Params, dict[str, np.ndarray]]:
    config, key = MODELS[name]
    return config, official.encoder(official.weights(f"{name}.pt", key)), official.data(name)


def encode(name: str, clip: str, *, method: str = "__call__", keep: str | None = None) -> Array:
    config, params, data = golden(name)
    ids = None if keep is None else jnp.asarray(data[keep], jnp.int32)
    video = official.video(data[clip])
    return Encoder(config.encoder).apply({"params": params}, video, ids, method=method)


@pytest.mark.parametrize("name", MODELS)
def test_video(name: str) -> None:
    assert relative_error(encode(name, "in.video"), golden(name)[2]["out.video"]) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_masked_video(name: str) -> None:
    tokens = encode(name, "in.video", keep="in.masks_x")
    assert relative_error(tokens, golden(name)[2]["out.video_masked"]) <= 1e-5


@pytest.mark.parametrize("name", V2_1)
@pytest.mark.parametrize("clip", ["image", "wide"])
def test_image_and_another_grid(name: str, clip: str) -> None:
    tokens = encode(name, f"in.{clip}")
    assert relative_error(tokens, golden(name)[2][f"out.{clip}"]) <= 1e-5


@pytest.mark.parametrize("name", V2_1)
def test_every_level(name: str) -> None:
    levels = encode(name, "in.video", method="levels")
    assert levels.shape[0] == 4
    for i, level in enumerate(levels):
        assert relative_error(level, golden(name)[2][f"out.level{i}"]) <= 1e-5


@pytest.mark.parametrize(
    ("clip", "keep", "out"),
    [
        ("in.video", None, "out.video_hier"),
        ("in.video", "in.masks_x", "out.video_masked_hier"),
        ("in.image", "in.image_masks_x", "out.image_masked_hier"),
    ],
)
@pytest.mark.parametrize("name", V2_1)
def test_hierarchical(name: str, clip: str, keep: str | None, out: str) -> None:
    levels = encode(name, clip, method="levels", keep=keep)
    # The distilled one was made to return its last level alone.
    tokens = concatenate_levels(levels) if name == "vjepa2_1_tiny_teacher" else levels[-1]
    assert relative_error(tokens, golden(name)[2][out]) <= 1e-5
