import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from models import compiled, random_video, relative_error, tiny_model

from jvjepa import Encoder
from jvjepa.errors import ConfigError
from jvjepa.layers import Dense
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import dequantize, is_quantized, nbytes, quantize
from jvjepa.streaming import init_state, step

# The code book of QLoRA's appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def kernel(inputs: int = 128, outputs: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)


def only(kernel: np.ndarray, kind: str) -> qwix.QArray:
    params = {"encoder": {"blocks_0": {"fc1": {"kernel": jnp.asarray(kernel)}}}}
    return quantize(params, kind)["encoder"]["blocks_0"]["fc1"]["kernel"]


def test_int8_rounds_to_a_step_of_each_output() -> None:
    weights = kernel()
    scale = np.abs(weights).max(0) / 127.5
    error = np.abs(np.asarray(dequantize(only(weights, "int8"))) - weights)
    assert (error <= 0.51 * scale * 1.01).all()
    assert error.max() > 0.2 * scale.min()


def test_nf4_takes_the_nearest_of_sixteen_values() -> None:
    weights = kernel()
    tiles = weights.reshape(2, 64, 24)
    scale = np.abs(tiles).max(1, keepdims=True)
    nearest = np.abs((tiles / scale)[..., None] - NF4).argmin(-1)
    expected = (NF4[nearest] * scale).reshape(128, 24)
    np.testing.assert_allclose(dequantize(only(weights, "nf4")), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_layer_multiplies_with_what_its_kernel_stands_for(kind: str) -> None:
    small, x = only(kernel(), kind), random_video(2, 128)[..., 0]
    given = {"kernel": small, "bias": jnp.arange(24.0)}
    found = compiled(Dense(24), given, x)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(small), np.float64)
    assert relative_error(found, expected + np.arange(24.0)) < 1e-6


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_stacked_blocks_are_quantized_layer_by_layer(kind: str) -> None:
    encoder, params = tiny_model(head_width=32)
    video = random_video(2, 4, 32, 32)
    stacked = quantize({"encoder": params}, kind)["encoder"]
    apart = quantize({"encoder": unstack_layers(params)}, kind)["encoder"]
    found = compiled(encoder, stacked, video)
    unrolled = compiled(Encoder(encoder.config, scan=False), apart, video)
    assert relative_error(found, unrolled) < 1e-5
    whole = compiled(encoder, params, video)
    error = relative_error(found, whole)
    assert (1e-4 < error < 0.05) if kind == "int8" else (1e-3 < error < 0.4)


def test_only_chosen_kernels_change() -> None:
    _, params = tiny_model(head_width=32)
    pattern = "encoder/blocks/mlp/.*"
    small = quantize({"encoder": params}, "int8", layers=pattern)["encoder"]
    assert is_quantized(small["blocks"]["mlp"]["fc1"]["kernel"])
    for part in (small["patch_embed"], small["blocks"]["attention"]["query"]):
        assert not is_quantized(part["kernel"])
    assert small["blocks"]["mlp"]["fc1"]["bias"] is params["blocks"]["mlp"]["fc1"]["bias"]
    assert small["norm"]["scale"] is params["norm"]["scale"]


def test_small_weights_stream_and_take_few_bytes() -> None:
    encoder, params = tiny_model(head_width=32)
    sizes = {}
    for kind in ("int8", "nf4"):
        small = quantize({"encoder": params}, kind)["encoder"]
        sizes[kind] = nbytes(small["blocks"])
        tubelet = random_video(1, 2, 32, 32)
        state = init_state(encoder, 1, 2, height=32, width=32)
        _, out = step(encoder, small, state, tubelet)
        clip = compiled(encoder, small, tubelet)
        assert relative_error(out.tokens, clip) < 1e-5
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 3)
    assert sizes["nf4"] < sizes["int8"] < 1.2 * kernels < nbytes(params["blocks"]) / 3


def test_gradients_reach_the_input() -> None:
    small, x = only(kernel(), "nf4"), random_video(2, 128)[..., 0]
    given = {"params": {"kernel": small, "bias": jnp.zeros(24)}}
    gradient = jax.grad(lambda x: jnp.sum(Dense(24).apply(given, x)))(x)
    expected = np.broadcast_to(np.asarray(dequantize(small)).sum(1), x.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_quantized() -> None:
    params = {"encoder": {"blocks_0": {"fc1": {"kernel": jnp.ones((100, 8))}}}}
    with pytest.raises(ConfigError, match=r"fc1/kernel has 100 inputs; nf4 needs a multiple of 64"):
        quantize(params, "nf4")
    with pytest.raises(ConfigError, match=r"kind = 'int3'; it must be one of"):
        quantize(params, "int3")
    with pytest.raises(ConfigError, match=r"layers = 'decoder/.*' matches none"):
        quantize(params, "int8", layers="decoder/.*")
