import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from models import compiled, random_video, relative_error, tiny_model

from jvjepa import Encoder
from jvjepa.dense import Dense
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import stack_layers, unstack_layers
from jvjepa.quantization import (
    SCHEMES,
    Scheme,
    SmallKernel,
    dequantize,
    int8_parts,
    is_quantized,
    nbytes,
    plan,
    quantize,
)
from jvjepa.streaming import init_state, step
from jvjepa.typing import Params

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


def only(
    kernel: np.ndarray, scheme: Scheme, *, tile: int | None = None, largest: float = 3.0
) -> SmallKernel:
    params = {"encoder": {"blocks_0": {"fc1": {"kernel": jnp.asarray(kernel)}}}}
    ranges = {"encoder": {"blocks_0": {"fc1": jnp.float32(largest)}}}
    ranges = ranges if scheme == "int8-static" else None
    small = quantize(params, scheme, tile=tile, ranges=ranges)
    return small["encoder"]["blocks_0"]["fc1"]["kernel"]


def integers(kernel: SmallKernel) -> np.ndarray:
    """Of "int8" and "int4"; of the latter the first half of the inputs is in the lower halves."""
    values = np.asarray(kernel.values)
    if kernel.scheme != "int4":
        return values.astype(np.int64)
    nibbles = np.concatenate([values & 15, values >> 4]).astype(np.int64)
    return np.where(nibbles < 8, nibbles, nibbles - 16)


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Float32 to int8, half to even."""
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int64)


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


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
def test_a_layer_multiplies_with_what_its_kernel_stands_for(kind: Scheme) -> None:
    small, x = only(kernel(), kind), random_video(2, 128)[..., 0]
    given = {"kernel": small, "bias": jnp.arange(24.0)}
    found = compiled(Dense(24), given, x)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(small), np.float64)
    assert relative_error(found, expected + np.arange(24.0)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("int8", 1e-4, 0.05),
        ("int8-dynamic", 1e-4, 0.05),
        ("fp8", 1e-3, 0.1),
        ("int4", 1e-3, 0.4),
        ("nf4", 1e-3, 0.4),
    ],
)
def test_stacked_blocks_are_quantized_layer_by_layer(
    kind: Scheme, least: float, most: float
) -> None:
    encoder, params = tiny_model(head_width=32)
    video = random_video(2, 4, 32, 32)
    stacked = quantize({"encoder": params}, kind)["encoder"]
    apart = quantize({"encoder": unstack_layers(params)}, kind)["encoder"]
    found = compiled(encoder, stacked, video)
    unrolled = compiled(Encoder(encoder.config, scan=False), apart, video)
    assert relative_error(found, unrolled) < 1e-5
    whole = compiled(encoder, params, video)
    assert least < relative_error(found, whole) < most


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


@pytest.mark.parametrize(("scheme", "steps"), [("int8", 127.5), ("int4", 7.5)])
@pytest.mark.parametrize("tile", [2, 32])
def test_integers_are_those_of_numpy(scheme: Scheme, steps: float, tile: int) -> None:
    weights = kernel()
    tiles = tile if scheme == "int4" else len(weights)
    parts = weights.reshape(-1, tiles, 24)
    scale = np.abs(parts).max(1, keepdims=True) / np.float32(steps)
    small = only(weights, scheme, tile=tile if scheme == "int4" else None)
    np.testing.assert_allclose(small.scale, scale[:, 0], rtol=2e-7)
    exact = parts.astype(np.float64) / np.asarray(small.scale)[:, None]
    found = integers(small).reshape(parts.shape)
    assert np.abs(found - exact).max() <= 0.5 + 1e-4
    # The largest value of an output lies between two integers: qwix's step is 1 / (n + 0.5) of it.
    between = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4
    np.testing.assert_array_equal(found[~between], np.rint(exact[~between]))
    assert between.sum() < 1.1 * scale.size + 5
    assert len(np.unique(found)) > 2 * steps - 30


def test_fp8_is_that_of_ml_dtypes() -> None:
    weights = kernel()
    small = only(weights, "fp8")
    scale = np.asarray(small.scale)
    np.testing.assert_allclose(scale, np.abs(weights).max(0, keepdims=True) / 448, rtol=2e-7)
    expected = np.clip(weights / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(small.values, expected.view(np.uint8))
    error = np.abs(np.asarray(dequantize(small)) - weights)
    assert (error <= np.abs(weights) / 16 + scale / 1024 * 1.01).all()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integer_products_are_those_of_numpy(scheme: Scheme, dtype: jnp.dtype) -> None:
    weights = only(kernel(), scheme)
    x = np.asarray(jnp.asarray(random_video(2, 5, 128)[..., 0], dtype), np.float32)
    given = {"kernel": weights, "bias": jnp.arange(24.0)}
    found = compiled(Dense(24, dtype=dtype), given, jnp.asarray(x, dtype))
    scale = np.float32(3) * np.float32(1 / 127)
    if scheme == "int8-dynamic":
        scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    sums = rounded(x, scale) @ integers(weights)
    expected = sums * scale * np.asarray(weights.scale)[0]
    expected = np.asarray(jnp.asarray(expected, dtype), np.float64) + np.arange(24.0)
    assert relative_error(found, expected) < (1e-6 if dtype == jnp.float32 else 1e-2)
    whole = x.astype(np.float64) @ kernel() + np.arange(24.0)
    assert 1e-4 < relative_error(found, whole) < 5e-2


def test_sums_of_integers_do_not_round() -> None:
    """float32 would: the largest sum needs 27 bits."""
    rng = np.random.default_rng(0)
    weights = rng.choice([-127, 126, 127], size=(8192, 3)).astype(np.int8)
    weights[:, 0] = 127
    x = rng.choice([-127.0, 126.0, 127.0], size=(4, 8192)).astype(np.float32)
    x[0] = 127
    scales = jnp.full((1, 3), 0.5), jnp.float32(1.0)
    given = {"kernel": SmallKernel(jnp.asarray(weights), *scales, "int8-static")}
    given["bias"] = jnp.zeros(3)
    found = compiled(Dense(3), given, x)
    exact = x.astype(np.int64) @ weights.astype(np.int64)
    assert exact[0, 0] == 127 * 127 * 8192
    np.testing.assert_array_equal(found, (exact.astype(np.float32) * 0.5))


def test_a_token_of_zeros_stays_zero_and_nan_stays_nan() -> None:
    given = {"kernel": only(kernel(), "int8-dynamic"), "bias": jnp.zeros(24)}
    x = np.zeros((3, 128), np.float32)
    x[1], x[2, 5] = 1.0, np.nan
    found = np.asarray(compiled(Dense(24), given, x))
    assert (found[0] == 0).all()
    assert np.isfinite(found[1]).all()
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_reach_the_input(scheme: Scheme) -> None:
    small, x = only(kernel(), scheme), random_video(2, 128)[..., 0]
    given = {"params": {"kernel": small, "bias": jnp.zeros(24)}}
    gradient = jax.grad(lambda x: jnp.sum(Dense(24).apply(given, x)))(x)
    expected = np.broadcast_to(np.asarray(dequantize(small)).sum(1), x.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacking_and_unstacking_give_the_same_kernels(scheme: Scheme) -> None:
    _, params = tiny_model(head_width=32)
    layers = sorted(params["blocks"]["mlp"])
    ranges = {"encoder": {"blocks": {"mlp": {name: jnp.arange(3.0) + 1 for name in layers}}}}
    choice = {"layers": ".*/mlp/.*", "ranges": ranges if scheme == "int8-static" else None}
    small = quantize({"encoder": params}, scheme, **choice)
    apart = unstack_layers(small)
    choice["ranges"] = unstack_layers(ranges) if scheme == "int8-static" else None
    directly = quantize(unstack_layers({"encoder": params}), scheme, **choice)
    for a, b in ((apart, directly), (stack_layers(apart), small)):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    kernel = apart["encoder"]["blocks_2"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (64, 192)
    assert kernel.dtype == jnp.float32


def test_the_parts_for_export_say_what_a_layer_computes() -> None:
    weights, x = kernel(), random_video(5, 128)[..., 0]
    for scheme in ("int8", "int8-static", "int8-dynamic"):
        small = only(weights, scheme)
        parts = int8_parts(small)
        assert parts.values.dtype == np.int8
        assert parts.values.shape == (128, 24)
        assert parts.scale.shape == (24,)
        assert parts.is_dynamic == (scheme == "int8-dynamic")
        np.testing.assert_array_equal(parts.values * parts.scale, dequantize(small))
        if scheme == "int8-static":
            assert parts.input_scale == np.float32(3) * np.float32(1 / 127)
            seen = rounded(x, parts.input_scale) * parts.input_scale
            given = {"kernel": small, "bias": jnp.zeros(24)}
            found = compiled(Dense(24), given, x)
            assert relative_error(found, seen @ (parts.values * parts.scale)) < 1e-6
        else:
            assert parts.input_scale is None
    with pytest.raises(InputError, match=r"the kernel is nf4 \[128, 24\]; it must be int8"):
        int8_parts(only(weights, "nf4"))


def test_layers_can_be_left_out() -> None:
    _, params = tiny_model(head_width=32)
    small = quantize({"encoder": params}, "int8", exclude=(".*/fc2", ".*/(query|key)"))["encoder"]
    found = {
        name: is_quantized(leaf["kernel"])
        for part in ("attention", "mlp")
        for name, leaf in small["blocks"][part].items()
    }
    assert [name for name in sorted(found) if found[name]] == ["fc1", "proj", "value"]


SHAPES = {"encoder/blocks/fc1/kernel": (2, 96, 8), "encoder/blocks/fc1/bias": (2, 8)}
SHAPES |= {"encoder/patch_embed/kernel": (96, 8)}


@pytest.mark.parametrize(
    ("scheme", "choice", "message"),
    [
        ("int3", {}, r"scheme = 'int3'; it must be one of int8, int8-dynamic,"),
        ("nf4", {}, r"fc1 has 96 inputs; nf4 in tiles of 64 needs a multiple of 64: choose"),
        ("int4", {"tile": 20}, r"fc1 has 96 inputs; int4 in tiles of 20 needs a multiple of 20"),
        ("int4", {"tile": 3}, r"tile = 3; it must be an even number, 2 or more"),
        ("int4", {"tile": 0}, r"tile = 0; it must be an even number"),
        ("int8", {"tile": 32}, r"tile = 32 is for int4 and nf4; this is int8"),
        ("int8", {"layers": "decoder/.*"}, r"layers = 'decoder/.\*' matches none"),
        ("int8", {"layers": "("}, r"layers = '\(' is no regular expression: missing \)"),
        ("int8", {"exclude": ["x", "y"]}, r"exclude = 'x' matches none of .*: encoder/blocks/fc1"),
        ("int8", {"exclude": [".*patch_embed"]}, r"exclude = '.\*patch_embed' matches none of"),
        ("int8", {"exclude": [".*"]}, r"exclude = \('.\*',\) leaves no layer"),
    ],
)
def test_what_cannot_be_quantized(scheme: str, choice: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(SHAPES, scheme, **choice)
    params = unflatten_dict({name: jnp.ones(s) for name, s in SHAPES.items()}, sep="/")
    with pytest.raises(ConfigError, match=message):
        quantize(params, scheme, **choice)


def test_what_is_planned_is_done() -> None:
    names, tile = plan(SHAPES, "nf4", tile=32, layers=".*")
    assert names == ["encoder/blocks/fc1", "encoder/patch_embed"]
    assert tile == 32
    assert plan(SHAPES, "int4", tile=16)[1] == 16
    assert plan(SHAPES, "fp8") == (["encoder/blocks/fc1"], None)


def test_ranges_must_be_there_for_static_and_for_nothing_else() -> None:
    params = {"encoder": {"blocks": {"fc1": {"kernel": jnp.ones((2, 8, 8))}}}}

    def of(value: object) -> dict:
        return {"encoder": {"blocks": {"fc1": value}}}

    with pytest.raises(ConfigError, match="int8-static needs ranges, see"):
        quantize(params, "int8-static")
    with pytest.raises(ConfigError, match="ranges are for int8-static; int8-dynamic measures"):
        quantize(params, "int8-dynamic", ranges=of(jnp.ones(2)))
    with pytest.raises(ConfigError, match=r"ranges has nothing for encoder/blocks/fc1"):
        quantize(params, "int8-static", ranges={"encoder": {}})
    for wrong in (jnp.ones(3), jnp.float32(1), jnp.asarray([1, jnp.inf])):
        with pytest.raises(ConfigError, match=r"ranges of encoder/blocks/fc1 are"):
            quantize(params, "int8-static", ranges=of(wrong))
    small = quantize(params, "int8-static", ranges=of(jnp.asarray([0.0, 2.0])))
    scale = small["encoder"]["blocks"]["fc1"]["kernel"].input_scale
    np.testing.assert_allclose(scale, np.array([1, 2]) / 127, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["nf4", "int8-dynamic"])
def test_what_is_quantized_is_not_quantized_again(scheme: Scheme) -> None:
    params = {"encoder": {"blocks": {"fc1": {"kernel": jnp.ones((2, 64, 8))}}}}
    small = quantize(params, scheme)
    with pytest.raises(InputError, match=r"encoder/blocks/fc1 is quantized already"):
        quantize(small, "int8")


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8", "int8-dynamic"])
def test_a_loop_over_layers_turns_back_one_at_a_time(scheme: Scheme) -> None:
    encoder, params = tiny_model(head_width=64, num_heads=4, num_layers=8)
    video = random_video(1, 2, 32, 32)

    def temporary(params: Params) -> int:
        """Bytes, besides arguments and results."""
        forward = jax.jit(lambda params: encoder.apply({"params": params}, video))
        return forward.lower(params).compile().memory_analysis().temp_size_in_bytes

    layer = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3) // 8
    small = quantize({"encoder": params}, scheme)["encoder"]
    assert temporary(small) < temporary(params) + 1.5 * layer


def test_without_qwix_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    small = only(kernel(), "int8")
    monkeypatch.setitem(sys.modules, "qwix", None)
    for call in (lambda: dequantize(small), lambda: only(kernel(64), "int8")):
        with pytest.raises(InputError, match=r"need qwix: pip install 'jvjepa\[quantize\]'"):
            call()
