"""The cache of a stream in 8 bits: how far it is from the float cache, and that nothing else is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import random_video, relative_error, tiny_config, tiny_model

from jvjepa import Encoder, gating, streaming
from jvjepa.cache import SmallRing, make_cache, window, write
from jvjepa.errors import ConfigError
from jvjepa.parameters import unstack_layers

SMALL = ("int8", "fp8")
WINDOW, COUNT = 3, 7


def run(
    encoder: Encoder, params: dict, tubelets: np.ndarray, cache: str | None
) -> tuple[streaming.StreamState, np.ndarray]:
    """Tokens [n, B, S, D] of a stream."""
    sides = {"height": tubelets.shape[3], "width": tubelets.shape[4]}
    state = streaming.init_state(encoder, tubelets.shape[1], WINDOW, **sides, cache=cache)
    outputs = []
    for tubelet in tubelets:
        state, out = streaming.step(encoder, params, state, tubelet)
        outputs.append(np.asarray(out.tokens))
    return state, np.stack(outputs)


def rounded(x: np.ndarray, cache: str) -> np.ndarray:
    """What a ring gives back of [.., K], in NumPy."""
    most = np.float32(127 if cache == "int8" else 448)
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / most)
    scale[scale == 0] = 1
    values = np.clip(x / scale, -most, most)
    if cache == "int8":
        return np.rint(values) * scale
    return values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("cache", SMALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_ring_gives_back_what_numpy_rounds(cache: str, dtype: jnp.dtype) -> None:
    layers, batch, tubelets, tokens, heads, width = shape = (2, 3, 4, 5, 2, 8)
    ring = make_cache(shape, dtype, cache).keys
    expected = np.zeros(shape, np.float32)
    put = jax.jit(write)
    rng = np.random.default_rng(0)
    for _ in range(12):
        new = rng.normal(size=(batch, tokens, heads, width)) * 10.0 ** rng.integers(-3, 4)
        new[0, 0] = 0
        new = np.asarray(jnp.asarray(new, dtype), np.float32)
        layer, slot = rng.integers(layers), rng.integers(tubelets, size=batch)
        ring = put(ring, jnp.asarray(new, dtype), jnp.int32(layer), jnp.asarray(slot, jnp.int32))
        expected[layer, np.arange(batch), slot] = rounded(new, cache)
    for layer in range(layers):
        found = window(ring, jnp.int32(layer), dtype)
        assert found.dtype == dtype
        right = np.asarray(jnp.asarray(expected[layer], dtype), np.float32)
        right = right.reshape(batch, -1, heads, width)
        np.testing.assert_allclose(np.asarray(found, np.float32), right, rtol=2e-6)


@pytest.mark.parametrize(("cache", "share"), [("int8", 0.5 / 127 * 1.01), ("fp8", 0.0626)])
def test_rounding_is_as_fine_as_promised(cache: str, share: float) -> None:
    x = np.random.default_rng(0).normal(size=(1, 500, 2, 16)).astype(np.float32)
    ring = write(
        make_cache((1, 1, 1, 500, 2, 16), jnp.float32, cache).keys,
        jnp.asarray(x),
        jnp.int32(0),
        jnp.zeros(1, jnp.int32),
    )
    error = np.abs(np.asarray(window(ring, jnp.int32(0), jnp.float32)) - x)
    largest = np.abs(x).max(-1, keepdims=True)
    allowed = share * (largest if cache == "int8" else np.abs(x)) + largest / 448 / 1000
    assert (error <= allowed).all()
    assert error.max() > share * 0.4


@pytest.mark.parametrize(("cache", "least", "most"), [("int8", 1e-5, 0.01), ("fp8", 1e-4, 0.05)])
@pytest.mark.parametrize("scan", [True, False])
def test_a_small_cache_changes_little_and_nothing_before_it_is_read(
    cache: str, least: float, most: float, scan: bool
) -> None:
    encoder, params = tiny_model(head_width=32)
    if not scan:
        encoder, params = Encoder(encoder.config, scan=False), unstack_layers(params)
    tubelets = random_video(COUNT, 2, 2, 32, 48)
    state, whole = run(encoder, params, tubelets, None)
    small_state, small = run(encoder, params, tubelets, cache)
    assert isinstance(state.cache.keys, jax.Array)
    assert isinstance(small_state.cache.keys, SmallRing)
    assert least < relative_error(small, whole) < most
    assert streaming.nbytes(small_state) < 0.4 * streaming.nbytes(state)


def test_bytes_are_flat_and_those_that_are_promised() -> None:
    encoder, params = tiny_model(head_width=32)
    tubelets = random_video(COUNT, 2, 2, 32, 48)
    config = encoder.config
    for cache in SMALL:
        state = streaming.init_state(encoder, 2, WINDOW, height=32, width=48, cache=cache)
        heads = config.num_layers * 2 * WINDOW * 6 * config.num_heads
        rest = 2 * 4 + 2 * WINDOW * config.hidden_size * 4
        assert streaming.nbytes(state) == 2 * heads * (config.head_width + 4) + rest
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        state, _ = streaming.scan(encoder, params, state, tubelets)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before


@pytest.mark.parametrize("cache", SMALL)
def test_scan_equals_steps_and_streams_restart_on_their_own(cache: str) -> None:
    encoder, params = tiny_model(head_width=32)
    tubelets = random_video(COUNT, 2, 2, 32, 32)
    state = streaming.init_state(encoder, 2, WINDOW, height=32, width=32, cache=cache)
    _, scanned = streaming.scan(encoder, params, state, tubelets)
    state, steps = run(encoder, params, tubelets, cache)
    assert relative_error(steps, scanned.tokens) <= 1e-5
    state = streaming.reset(state, jnp.asarray([False, True]))
    assert all((np.asarray(part[:, 1], np.float32) == 0).all() for part in state.cache.keys)
    assert (np.asarray(state.cache.keys.scale[:, 0]) > 0).all()
    again = []
    for tubelet in tubelets:
        state, out = streaming.step(encoder, params, state, tubelet)
        again.append(np.asarray(out.tokens))
    assert relative_error(np.stack(again)[:, 1], steps[:, 1]) <= 1e-5
    assert relative_error(np.stack(again)[:, 0], steps[:, 0]) > 1e-3


@pytest.mark.parametrize("cache", SMALL)
def test_a_gated_stream_skips_and_forgets_what_is_not_finite(cache: str) -> None:
    encoder, params = tiny_model(head_width=32)
    tubelets = random_video(3, 1, 2, 32, 32)
    state = gating.init_state(encoder, 1, WINDOW, height=32, width=32, cache=cache)
    gate, outputs = gating.Gate(tau=0.01), []
    broken = tubelets[0].copy()
    broken[:, 0, 0, 0] = np.nan
    for tubelet in (tubelets[0], tubelets[0], tubelets[1], broken, tubelets[2]):
        state, out = gating.step(encoder, params, state, tubelet, gate)
        outputs.append(jax.tree.map(np.asarray, out))
    assert [bool(out.is_new[0]) for out in outputs] == [True, False, True, True, True]
    assert np.isnan(outputs[3].tokens).any()
    _, steps = run(encoder, params, tubelets, cache)
    for out, right in zip([outputs[0], outputs[2], outputs[4]], steps, strict=True):
        assert relative_error(out.tokens, right) <= 1e-5


def test_steps_compile_once_and_the_state_is_a_plain_pytree(
    compilations: Callable[[], int],
) -> None:
    encoder, params = tiny_model(head_width=32)
    tubelets = random_video(4, 1, 2, 32, 32)
    state = streaming.init_state(encoder, 1, WINDOW, height=32, width=32, cache="int8")
    state, _ = streaming.step(encoder, params, state, tubelets[0])
    leaves, structure = jax.tree.flatten(jax.device_get(state))
    state = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    before = compilations()
    for tubelet in tubelets[1:]:
        donated = state
        state, out = streaming.step(encoder, params, state, tubelet)
        assert all(leaf.is_deleted() for leaf in donated.cache.keys)
    assert compilations() == before
    assert np.isfinite(out.tokens).all()


def test_an_unknown_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache = 'int4'; it must be None or one of \('int8'"):
        streaming.init_state(Encoder(tiny_config()), 1, 2, cache="int4")


@pytest.mark.parametrize("cache", SMALL)
def test_a_step_turns_back_one_layer_at_a_time(cache: str) -> None:
    encoder, params = tiny_model(head_width=32, num_layers=8)
    tubelet = random_video(1, 2, 64, 64)

    def temporary(kind: str | None) -> int:
        """Bytes, besides arguments and results."""
        state = streaming.init_state(encoder, 1, 16, cache=kind)
        program = streaming.step.lower(encoder, params, state, tubelet).compile()
        return program.memory_analysis().temp_size_in_bytes

    layer = 2 * 16 * 16 * encoder.config.hidden_size * 4
    assert temporary(cache) < temporary(None) + 1.5 * layer
