"""V-JEPA 2.1 in the parts that it shares with V-JEPA 2: streaming, gating, levels, images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
from models import compiled, random_params, random_video, relative_error, tiny_model

from jvjepa import Encoder, gating, rope, streaming
from jvjepa.encoder import concatenate_levels
from jvjepa.errors import InputError
from jvjepa.parameters import unstack_layers

TOLERANCE = 1e-5
WINDOW, COUNT = 3, 7
CONFIG = dataclasses.replace(official.TEACHER.encoder, num_layers=4, levels=(0, 1, 3))


def model() -> tuple[Encoder, dict]:
    encoder = Encoder(CONFIG)
    return encoder, random_params(encoder)


def steps(encoder: Encoder, params: dict, tubelets: np.ndarray, positions: str) -> jax.Array:
    sides = dict(zip(("height", "width"), tubelets.shape[3:5], strict=True))
    state = streaming.init_state(encoder, tubelets.shape[1], WINDOW, **sides)
    _, outputs = streaming.scan(encoder, params, state, tubelets, positions=positions)
    return outputs.tokens  # [n, B, S, D]


# --- Streaming and gating -----------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_steps_equal_the_full_forward_in_both_position_modes(positions: str) -> None:
    encoder, params = model()
    tubelets = random_video(COUNT, 2, 2, 48, 80)  # not square: rows and columns scale differently
    clip = tubelets.swapaxes(0, 1).reshape(2, 2 * COUNT, 48, 80, 3)
    full = compiled(encoder, params, clip, window=WINDOW)
    full = full.reshape(2, COUNT, 15, -1).swapaxes(0, 1)
    found = steps(encoder, params, tubelets, positions)
    for q in range(COUNT):
        assert relative_error(found[q], full[q]) <= TOLERANCE


def test_a_true_rotation_does_not_care_where_time_starts() -> None:
    """With tiled rope the two modes differ; a rotation sees differences of positions alone."""
    encoder, params = model()
    tubelets = random_video(COUNT, 1, 2, 64, 64)
    window, absolute = (steps(encoder, params, tubelets, how) for how in ("window", "absolute"))
    assert relative_error(window, absolute) <= TOLERANCE
    tiled = Encoder(dataclasses.replace(CONFIG, rope="tiled"))
    window, absolute = (steps(tiled, params, tubelets, how) for how in ("window", "absolute"))
    assert relative_error(window[-1], absolute[-1]) > 1e-3


def test_a_gated_stream_equals_the_stream_of_what_it_encoded() -> None:
    encoder, params = model()
    scenes = random_video(3, 1, 2, 64, 64)
    tubelets = scenes[np.array([0, 0, 1, 1, 1, 2])]
    state = gating.init_state(encoder, 1, WINDOW)
    state, out = gating.scan(encoder, params, state, tubelets, gating.Gate(tau=0.015))
    assert out.is_new[:, 0].tolist() == [True, False, True, False, False, True]
    ungated = steps(encoder, params, scenes, "window")
    assert relative_error(out.tokens[jnp.array([0, 2, 5])], ungated) <= TOLERANCE


# --- Levels -------------------------------------------------------------------------------------


def test_levels_are_the_normed_layers() -> None:
    encoder, params = model()
    video = random_video(2, 4, 48, 64)
    levels = compiled(encoder, params, video, method="levels")
    layers = compiled(encoder, params, video, method="layers").layers
    assert levels.shape == (3, 2, 24, 32)
    for i, layer in enumerate(CONFIG.levels):
        x = np.asarray(layers[1 + layer], np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        scale, bias = (np.asarray(params["norms"][key][i], np.float64) for key in ("scale", "bias"))
        assert relative_error(levels[i], x * scale + bias) <= TOLERANCE
    tokens = compiled(encoder, params, video)
    np.testing.assert_array_equal(levels[-1], tokens)
    joined = concatenate_levels(levels)
    np.testing.assert_array_equal(joined[..., 32:64], levels[1])


def test_some_levels_and_unrolled_layers() -> None:
    encoder, params = model()
    video = random_video(1, 2, 64, 64)
    every = compiled(encoder, params, video, method="levels")
    some = compiled(encoder, params, video, layers=(0, 1), method="levels")
    assert relative_error(some, every[:2]) <= TOLERANCE
    unrolled = Encoder(CONFIG, scan=False)
    found = compiled(unrolled, unstack_layers(params), video, method="levels")
    assert relative_error(found, every) <= TOLERANCE


def test_layers_of_v2_go_through_its_one_norm() -> None:
    encoder, params = tiny_model()
    video = random_video(1, 4, 32, 48)
    layers = compiled(encoder, params, video, method="layers").layers
    levels = compiled(encoder, params, video, layers=(0, 2), method="levels")
    tokens = compiled(encoder, params, video)
    np.testing.assert_array_equal(levels[1], tokens)
    last = compiled(encoder, params, video, method="levels")
    np.testing.assert_array_equal(last, tokens[None])
    x = np.asarray(layers[1], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    scale, bias = (np.asarray(params["norm"][key], np.float64) for key in ("scale", "bias"))
    assert relative_error(levels[0], x * scale + bias) <= TOLERANCE


def test_layers_without_a_norm_are_refused() -> None:
    encoder, params = model()
    video = random_video(1, 2, 32, 32)
    for layers in ((2,), (1, 0), (0, 0), (9,)):
        with pytest.raises(InputError, match=r"ascending, and among .* \[0, 1, 3\]"):
            compiled(encoder, params, video, layers=layers, method="levels")


# --- Images and modalities ----------------------------------------------------------------------


def test_an_image_is_no_video() -> None:
    encoder, params = model()
    image = random_video(2, 1, 48, 32)
    tokens = compiled(encoder, params, image)
    assert tokens.shape == (2, 6, 32)
    still = compiled(encoder, params, np.repeat(image, 2, axis=1))
    assert relative_error(tokens, still) > 1e-2


def test_each_modality_has_its_embedding() -> None:
    encoder, params = model()
    for frames, name, other in (
        (1, "image_embed", "video_embed"),
        (2, "video_embed", "image_embed"),
    ):
        clip = random_video(1, frames, 32, 32)
        before = compiled(encoder, params, clip, method="embed_patches")
        moved = {**params, name: params[name] + 1.0, other: params[other] + 5.0}
        after = compiled(encoder, moved, clip, method="embed_patches")
        np.testing.assert_allclose(after - before, np.ones_like(before), atol=1e-5)


def test_positions_span_the_grid_of_256_pixels_whatever_the_input() -> None:
    layout = rope.layout(CONFIG, 24, 9)
    places = rope.positions(jnp.arange(2 * 24 * 9), layout)
    np.testing.assert_allclose(places[-1], [1, 15, 15], rtol=1e-6)
    np.testing.assert_allclose(places[9], [0, 15 / 23, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (16, 16)])
def test_a_side_of_one_patch_is_no_division_by_zero(size: tuple[int, int]) -> None:
    encoder, params = model()
    tokens = compiled(encoder, params, random_video(1, 4, *size))
    assert np.isfinite(tokens).all()


def test_bfloat16() -> None:
    encoder = Encoder(CONFIG, dtype=jnp.bfloat16)
    params = random_params(encoder)
    for frames in (1, 4):
        clip = random_video(1, frames, 32, 48)
        tokens = compiled(encoder, params, clip)
        assert tokens.dtype == jnp.bfloat16
        exact = compiled(Encoder(CONFIG), params, clip)
        assert 1e-4 < relative_error(tokens.astype(jnp.float32), exact) < 0.1
