import dataclasses

import hfcheckpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from models import compiled, random_video, relative_error, tiny_config, tiny_model

import jvjepa
from jvjepa import Encoder, Model
from jvjepa.convert import convert
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import unstack_layers

MODULE = 1e-5  # these encoders are small enough for the tolerance of one module


@pytest.fixture(scope="module", params=[24, 32, 64, 80])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, hfcheckpoints.HFModel]:
    """Ours and transformers', the same weights."""
    folder = tmp_path_factory.mktemp(f"width{request.param}")
    config = hfcheckpoints.tiny_config(head_width=request.param, layers=3)
    theirs = hfcheckpoints.save_checkpoint(folder / "theirs", config)
    convert(str(folder / "theirs"), folder / "ours")
    return jvjepa.load(folder / "ours"), theirs


def _theirs(model: torch.nn.Module, video: np.ndarray, **options: bool) -> dict:
    with torch.inference_mode():
        return model(torch.from_numpy(video).movedim(-1, 2), skip_predictor=True, **options)


def _apply(model: Model, video: np.ndarray, *args: object, **options: object) -> jax.Array:
    return model.encoder.apply({"params": model.params["encoder"]}, video, *args, **options)


@pytest.mark.parametrize("frames", [1, 2, 8, 10])
def test_parity_with_transformers(pair: tuple, frames: int) -> None:
    ours, theirs = pair
    video = random_video(2, frames, 64, 64)
    tokens = _apply(ours, video)
    assert tokens.shape == (2, max(1, frames // 2) * 16, ours.config.encoder.hidden_size)
    assert relative_error(tokens, _theirs(theirs, video).last_hidden_state) <= MODULE


def test_parity_of_every_layer(pair: tuple) -> None:
    ours, theirs = pair
    video = random_video(2, 4, 64, 64)
    outputs = _apply(ours, video, method="layers")
    expected = _theirs(theirs, video, output_hidden_states=True)
    assert len(outputs.layers) == len(expected.hidden_states) == 4
    for layer, state in zip(outputs.layers, expected.hidden_states, strict=True):
        assert relative_error(layer, state) <= MODULE
    assert np.array_equal(outputs.tokens, _apply(ours, video))


@pytest.mark.parametrize("size", [(48, 80), (32, 32), (96, 64)])
def test_positions_on_other_grids(pair: tuple, size: tuple[int, int]) -> None:
    ours, theirs = pair
    video = random_video(2, 6, *size)
    expected = _theirs(theirs, video).last_hidden_state
    config = dataclasses.replace(ours.config.encoder, rope_grid="config")
    as_theirs = dataclasses.replace(ours, encoder=dataclasses.replace(ours.encoder, config=config))
    assert relative_error(_apply(as_theirs, video), expected) <= MODULE
    # Meta's positions, the default, are the input's own: those that a model for this grid has.
    if size[0] == size[1]:
        theirs.config.crop_size, crop = size[0], theirs.config.crop_size
        for layer in theirs.encoder.layer:
            layer.attention.grid_size = size[0] // 16
        expected = _theirs(theirs, video).last_hidden_state
        for layer in theirs.encoder.layer:
            layer.attention.grid_size = crop // 16
        theirs.config.crop_size = crop
        assert relative_error(_apply(ours, video), expected) <= MODULE
    else:
        assert relative_error(_apply(ours, video), expected) > 1e-3


def test_masked_tokens_keep_their_positions(pair: tuple) -> None:
    ours, theirs = pair
    video = random_video(2, 8, 64, 64)
    rng = np.random.default_rng(0)
    keep = np.stack([rng.permutation(64)[:23] for _ in range(2)])
    with torch.inference_mode():
        x = theirs.encoder.embeddings(torch.from_numpy(video).movedim(-1, 2))
        ids = torch.from_numpy(keep)
        x = torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))
        for layer in theirs.encoder.layer:
            out = layer(x, position_mask=ids)
            x = out[0] if isinstance(out, tuple) else out
        expected = theirs.encoder.layernorm(x)
    assert relative_error(_apply(ours, video, jnp.asarray(keep)), expected) <= MODULE


def test_the_other_rope_fails_parity(pair: tuple) -> None:
    ours, theirs = pair
    video = random_video(1, 4, 64, 64)
    config = dataclasses.replace(ours.config.encoder, rope="interleaved")
    other = dataclasses.replace(ours, encoder=dataclasses.replace(ours.encoder, config=config))
    error = relative_error(_apply(other, video), _theirs(theirs, video).last_hidden_state)
    assert error > 100 * MODULE


def test_keeping_all_tokens_in_any_order_changes_nothing() -> None:
    encoder, params = tiny_model()
    video = random_video(2, 4, 48, 32)
    order = np.random.default_rng(0).permutation(12)
    keep = jnp.asarray(np.stack([order, order[::-1]]))
    tokens = encoder.apply({"params": params}, video)
    kept = encoder.apply({"params": params}, video, keep)
    expected = jnp.take_along_axis(tokens, keep[..., None], axis=1)
    assert relative_error(kept, expected) <= MODULE


def test_scanned_and_unrolled_layers_agree() -> None:
    encoder, params = tiny_model()
    unrolled, layers = Encoder(encoder.config, scan=False), unstack_layers(params)
    video = random_video(2, 4, 48, 32)
    for method in ("__call__", "layers"):
        a = encoder.apply({"params": params}, video, method=method)
        b = unrolled.apply({"params": layers}, video, method=method)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert relative_error(x, y) <= 1e-6


@pytest.mark.parametrize("scan", [True, False])
def test_computing_anew_saves_memory_and_changes_no_gradient(scan: bool) -> None:
    encoder, params = tiny_model(num_layers=4)
    params = params if scan else unstack_layers(params)
    video = random_video(1, 4, 64, 64)

    def gradient(remat: str) -> tuple[dict, int]:
        model = Encoder(encoder.config, scan=scan, remat=remat)
        loss = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, video) ** 3))
        program = jax.jit(loss).lower(params).compile()
        return program(params), program.memory_analysis().temp_size_in_bytes

    expected, most = gradient("none")
    sizes = []
    for remat in ("block", "products"):
        found, size = gradient(remat)
        sizes.append(size)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert relative_error(x, y) <= 1e-5
    if scan:  # without a loop XLA decides itself what to compute anew
        assert sizes[0] < sizes[1] < most


def test_an_unknown_remat_is_refused() -> None:
    encoder = Encoder(tiny_config(), remat="all")
    with pytest.raises(ConfigError, match=r"remat = 'all'; it must be one of \('none', 'block'"):
        encoder.init(jax.random.key(0), random_video(1, 2, 32, 32))


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_attention_backends_agree(attention: str) -> None:
    encoder, params = tiny_model()
    other = Encoder(encoder.config, attention=attention)
    video = random_video(2, 4, 48, 32)
    for window in (None, 1, 2):
        a, b = (e.apply({"params": params}, video, window=window) for e in (encoder, other))
        assert relative_error(a, b) <= MODULE


def test_a_window_of_one_is_every_tubelet_alone() -> None:
    encoder, params = tiny_model()
    video = random_video(1, 6, 32, 32)
    banded = encoder.apply({"params": params}, video, window=1)
    # alone, but at its own time: keep only that tubelet's tokens
    for q in range(3):
        keep = jnp.arange(4 * q, 4 * q + 4)[None]
        alone = encoder.apply({"params": params}, video, keep)
        assert relative_error(banded[:, 4 * q : 4 * q + 4], alone) <= MODULE


def test_bfloat16_is_close_to_float32_and_stays_bfloat16() -> None:
    encoder, params = tiny_model()
    video = random_video(2, 4, 48, 32)
    half = Encoder(encoder.config, dtype=jnp.bfloat16)
    tokens = half.apply({"params": params}, video)
    assert tokens.dtype == jnp.bfloat16
    error = relative_error(tokens, encoder.apply({"params": params}, video))
    assert error <= 0.05  # 8 bits of mantissa, three layers


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 64, 64, 3), r"must be \[B, T, H, W, 3\]"),
        ((1, 4, 3, 64, 64), "channels-first, move the axis of size 3 to the end"),
        ((1, 3, 4, 64, 64), "channels-first"),
        ((1, 4, 64, 64, 4), r"must be \[B, T, H, W, 3\]"),
        ((1, 5, 64, 64, 3), "T = 5 frames; take 1, or a multiple of 2: 4 or 6"),
        ((1, 0, 64, 64, 3), "T = 0 frames; take 1, or a multiple of 2: 2"),
        ((1, 4, 60, 64, 3), "H = 60; take a multiple of 16: 48 or 64"),
        ((1, 4, 64, 7, 3), "W = 7; take a multiple of 16: 16"),
    ],
)
def test_wrong_shapes_are_refused_with_what_would_be_right(shape: tuple, message: str) -> None:
    encoder, params = tiny_model()
    with pytest.raises(InputError, match=message):
        encoder.apply({"params": params}, np.zeros(shape, np.float32))


def test_pixels_that_are_not_normalised_are_refused() -> None:
    encoder, params = tiny_model()
    with pytest.raises(InputError, match=r"uint8; it must be float and ImageNet-normalised"):
        encoder.apply({"params": params}, np.zeros((1, 2, 64, 64, 3), np.uint8))


def test_wrong_ids_are_refused_and_never_clamped() -> None:
    encoder, params = tiny_model()
    video = random_video(2, 2, 32, 32)

    def apply(keep: jax.Array) -> jax.Array:
        return encoder.apply({"params": params}, video, keep)

    with pytest.raises(InputError, match="ids from 0 to 4; this clip has tokens 0 to 3"):
        apply(jnp.asarray([[0, 1], [2, 4]]))
    with pytest.raises(InputError, match="ids from -1 to 2"):
        apply(jnp.asarray([[0, 1], [2, -1]]))
    with pytest.raises(InputError, match=r"int \[2, M\]"):
        apply(jnp.asarray([0, 1]))
    with pytest.raises(InputError, match=r"int \[2, M\]"):
        apply(jnp.asarray([[0.0], [1.0]]))
    traced = jax.jit(apply)(jnp.asarray([[0, 1], [2, 4]]))
    assert np.isfinite(traced[0]).all()
    assert np.isnan(traced[1]).any()


def test_a_mesh_with_explicit_axes_is_left_alone() -> None:
    encoder, params = tiny_model()
    video = random_video(2, 4, 32, 32)
    expected = compiled(encoder, params, video)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))):
        found = encoder.apply({"params": params}, jnp.asarray(video))
    assert relative_error(found, expected) <= MODULE
