import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_params, random_video, relative_error, tiny_config, tiny_model
from reference import ReferenceStream

from jvjepa import Encoder, streaming
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import unstack_layers

TOLERANCE = 1e-5
WINDOW = 3
COUNT = 8  # tubelets: more than two windows


def _stream(
    encoder: Encoder,
    params: dict,
    tubelets: np.ndarray,
    window: int = WINDOW,
    state: streaming.StreamState | None = None,
    **how: str,
) -> tuple[streaming.StreamState, list[streaming.StepOutput]]:
    """Steps over [n, B, 2, H, W, 3]."""
    if state is None:
        size = dict(zip(("height", "width"), tubelets.shape[3:5], strict=True))
        state = streaming.init_state(encoder, tubelets.shape[1], window, **size)
    outputs = []
    for tubelet in tubelets:
        state, out = streaming.step(encoder, params, state, tubelet, **how)
        outputs.append(out)
    return state, outputs


def _as_clip(tubelets: np.ndarray) -> np.ndarray:
    n, batch, frames = tubelets.shape[:3]
    return tubelets.swapaxes(0, 1).reshape(batch, n * frames, *tubelets.shape[3:])


@pytest.mark.parametrize("head_width", [24, 32, 64, 80])
def test_steps_equal_the_full_forward_under_the_banded_mask(head_width: int) -> None:
    encoder, params = tiny_model(head_width=head_width)
    tubelets = random_video(COUNT, 2, 2, 48, 32)
    full = encoder.apply({"params": params}, _as_clip(tubelets), window=WINDOW)
    _, outputs = _stream(encoder, params, tubelets, positions="absolute")
    steps = jnp.concatenate([out.tokens for out in outputs], axis=1)
    for q in range(COUNT):  # every tubelet: before, at and after eviction
        part = slice(q * 6, (q + 1) * 6)
        assert relative_error(steps[:, part], full[:, part]) <= TOLERANCE


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_steps_equal_the_reference_when_streams_restart_at_different_times(positions: str) -> None:
    encoder, params = tiny_model()
    batch, restarts = 3, {2: [False, True, False], 5: [True, False, True], 6: [True, False, False]}
    tubelets = random_video(COUNT + 3, batch, 2, 32, 48)
    state = streaming.init_state(encoder, batch, WINDOW, height=32, width=48)

    def fresh() -> ReferenceStream:
        return ReferenceStream(encoder.config, params, WINDOW, positions)

    references = [fresh() for _ in range(batch)]
    for i, tubelet in enumerate(tubelets):
        if i in restarts:
            state = streaming.reset(state, jnp.asarray(restarts[i]))
            references = [
                fresh() if restart else reference
                for restart, reference in zip(restarts[i], references, strict=True)
            ]
        state, out = streaming.step(encoder, params, state, tubelet, positions=positions)
        for b in range(batch):
            expected = references[b].step(tubelet[b])
            assert relative_error(out.tokens[b], expected) <= TOLERANCE
            assert relative_error(out.embedding[b], expected.mean(0)) <= TOLERANCE
    assert state.time.tolist() == [5, 9, 6]


def test_position_modes_agree_until_the_window_is_full_and_then_differ() -> None:
    encoder, params = tiny_model()
    tubelets = random_video(WINDOW + 1, 1, 2, 32, 32)
    _, window = _stream(encoder, params, tubelets, positions="window")
    _, absolute = _stream(encoder, params, tubelets, positions="absolute")
    errors = [relative_error(a.tokens, b.tokens) for a, b in zip(window, absolute, strict=True)]
    assert max(errors[:WINDOW]) <= TOLERANCE
    assert errors[WINDOW] > 1e-3


@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize("pool", ["tubelet", "window"])
def test_scan_equals_steps(positions: str, pool: str) -> None:
    encoder, params = tiny_model()
    tubelets = random_video(COUNT, 2, 2, 32, 32)
    how = {"positions": positions, "pool": pool}
    state, outputs = _stream(encoder, params, tubelets, **how)
    scanned_state = streaming.init_state(encoder, 2, WINDOW, height=32, width=32)
    scanned_state, scanned = streaming.scan(encoder, params, scanned_state, tubelets, **how)
    stepped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    for a, b in zip(
        jax.tree.leaves((scanned, scanned_state)), jax.tree.leaves((stepped, state)), strict=True
    ):
        assert relative_error(a, b) <= TOLERANCE


def test_scanned_and_unrolled_layers_agree() -> None:
    encoder, params = tiny_model()
    unrolled = Encoder(encoder.config, scan=False)
    tubelets = random_video(COUNT, 2, 2, 32, 32)
    _, a = _stream(encoder, params, tubelets)
    _, b = _stream(unrolled, unstack_layers(params), tubelets)
    for x, y in zip(a, b, strict=True):
        assert relative_error(x.tokens, y.tokens) <= TOLERANCE


def test_without_the_final_norm_it_is_what_saccadic_caches() -> None:
    # saccadic: keys rotated at absolute rows, the last W rows kept, no final norm, mean of the row.
    class NoFinalNorm(Encoder):
        def setup(self) -> None:
            super().setup()
            self.norm = lambda x: x

    config = tiny_config()
    params = random_params(Encoder(config))
    reference = ReferenceStream(config, params, WINDOW, "absolute", final_norm=False)
    tubelets = random_video(COUNT, 1, 2, 64, 64)
    _, outputs = _stream(NoFinalNorm(config), params, tubelets, positions="absolute")
    for tubelet, out in zip(tubelets, outputs, strict=True):
        assert relative_error(out.embedding[0], reference.step(tubelet[0]).mean(0)) <= TOLERANCE


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_the_future_does_not_change_the_past(positions: str) -> None:
    encoder, params = tiny_model()
    tubelets = random_video(COUNT, 1, 2, 32, 32)
    changed = tubelets.copy()
    changed[5, :, 1, 3, 3] += 100.0
    _, a = _stream(encoder, params, tubelets, positions=positions)
    _, b = _stream(encoder, params, changed, positions=positions)
    for i in range(COUNT):
        same = np.array_equal(a[i].tokens, b[i].tokens)
        assert same == (i < 5)  # bit for bit before, and the change is seen after


def test_the_future_does_not_change_the_past_of_the_full_forward() -> None:
    encoder, params = tiny_model()
    clip = random_video(1, 2 * COUNT, 32, 32)
    changed = clip.copy()
    changed[:, 10] += 100.0  # tubelet 5
    a, b = (encoder.apply({"params": params}, x, window=WINDOW) for x in (clip, changed))
    assert np.array_equal(a[:, : 5 * 4], b[:, : 5 * 4])
    assert not np.array_equal(a[:, 5 * 4 :], b[:, 5 * 4 :])


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_one_layer_forgets_what_left_the_window(positions: str) -> None:
    encoder, params = tiny_model(num_layers=1)
    tubelets = random_video(COUNT, 1, 2, 32, 32)
    changed = tubelets.copy()
    changed[2] += 100.0
    _, a = _stream(encoder, params, tubelets, positions=positions)
    _, b = _stream(encoder, params, changed, positions=positions)
    for i in range(COUNT):
        same = np.array_equal(a[i].tokens, b[i].tokens)
        assert same == (not 2 <= i < 2 + WINDOW)


def test_window_pooling_of_a_full_window_means_what_a_clip_means() -> None:
    encoder, params = tiny_model()
    tubelets = random_video(WINDOW, 2, 2, 32, 32)
    _, outputs = _stream(encoder, params, tubelets, pool="window")
    tokens = jnp.concatenate([out.tokens for out in outputs], axis=1)
    assert relative_error(outputs[-1].embedding, jnp.mean(tokens, axis=1)) <= TOLERANCE
    assert relative_error(outputs[0].embedding, jnp.mean(outputs[0].tokens, axis=1)) <= TOLERANCE


def test_window_pooling_forgets() -> None:
    encoder, params = tiny_model()
    tubelets = random_video(COUNT, 1, 2, 32, 32)
    _, outputs = _stream(encoder, params, tubelets, pool="window")
    newest = [out.tokens.mean(axis=1) for out in outputs[-WINDOW:]]
    assert relative_error(outputs[-1].embedding, sum(newest) / WINDOW) <= TOLERANCE


@pytest.mark.parametrize("num_layers", [1, 3])
def test_ten_million_tubelets_in_window_mode_are_as_good_as_a_fresh_window(num_layers: int) -> None:
    encoder, params = tiny_model(num_layers=num_layers)
    tubelets = random_video(COUNT, 1, 2, 32, 32)
    state, _ = _stream(encoder, params, tubelets)
    aged = jax.tree.map(jnp.copy, state)
    aged = aged._replace(time=aged.time + 3_333_333 * WINDOW)  # the same slots of the ring
    assert aged.time[0] > 9_999_999
    more = random_video(COUNT, 1, 2, 32, 32, seed=1)
    _, young = _stream(encoder, params, more, state=state)
    _, old = _stream(encoder, params, more, state=aged)
    for a, b in zip(young, old, strict=True):
        assert relative_error(b.tokens, a.tokens) <= TOLERANCE
    if num_layers == 1:  # where only the window matters, a stream that begins with it says the same
        _, fresh = _stream(encoder, params, more[-WINDOW:])
        assert relative_error(old[-1].tokens, fresh[-1].tokens) <= TOLERANCE


def test_many_steps_compile_once_and_keep_nothing(compilations: Callable[[], int]) -> None:
    encoder, params = tiny_model(head_width=6, num_layers=1)
    tubelets = [jnp.asarray(random_video(1, 2, 16, 16, seed=i)) for i in range(7)]
    state = streaming.init_state(encoder, 1, 2, height=16, width=16)
    pointer = state.cache.keys.unsafe_buffer_pointer()
    before = (state.cache.keys, state.cache.values, state.pooled)
    state, out = streaming.step(encoder, params, state, tubelets[0])
    assert all(buffer.is_deleted() for buffer in before)
    assert state.cache.keys.unsafe_buffer_pointer() == pointer
    gc.collect()
    compiled, alive = compilations(), len(jax.live_arrays())
    for i in range(10_000):
        state, out = streaming.step(encoder, params, state, tubelets[i % 7])
    assert compilations() == compiled
    assert len(jax.live_arrays()) <= alive
    assert state.cache.keys.unsafe_buffer_pointer() == pointer
    assert state.time[0] == 10_001
    assert np.isfinite(out.tokens).all()


def test_the_second_call_of_scan_and_reset_compiles_nothing(
    compilations: Callable[[], int],
) -> None:
    encoder, params = tiny_model()
    tubelets = jnp.asarray(random_video(2, 2, 2, 32, 32))
    which = jnp.asarray([True, False])
    state = streaming.init_state(encoder, 2, WINDOW, height=32, width=32)
    for call in range(3):
        state, _ = streaming.scan(encoder, params, state, tubelets)
        state = streaming.reset(state, which)
        if call == 0:
            compiled = compilations()
    assert compilations() == compiled


@pytest.mark.parametrize("scan", [True, False])
def test_cache_is_written_in_place(scan: bool) -> None:
    # A copy of the cache in every layer or step would show as temporary memory of its size.
    encoder, params = tiny_model(num_layers=4)
    if not scan:
        encoder, params = Encoder(encoder.config, scan=False), unstack_layers(params)
    state = streaming.init_state(encoder, 2, 64, height=32, width=32)
    tubelet = jnp.asarray(random_video(2, 2, 32, 32))
    memory = streaming.step.lower(encoder, params, state, tubelet).compile().memory_analysis()
    layer = streaming.nbytes(state) / 4  # keys and values of one layer
    assert memory.alias_size_in_bytes >= streaming.nbytes(state)
    # what is left are float32 rotations of one layer's keys, and tables; a copy would add 4 layers
    assert memory.temp_size_in_bytes < 4 * layer


def test_state_is_saved_and_goes_on_in_another_process(tmp_path: Path) -> None:
    script = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_default_matmul_precision", "float32")
sys.path.insert(0, sys.argv[1])
from models import random_video, tiny_model
from jvjepa import streaming
encoder, params = tiny_model()
saved = np.load(sys.argv[2])
like = streaming.init_state(encoder, 2, 3, height=32, width=32)
leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(jax.tree.leaves(like)))]
state = jax.tree.unflatten(jax.tree.structure(like), leaves)
state, out = streaming.step(encoder, params, state, random_video(2, 2, 32, 32, seed=9))
np.savez(sys.argv[3], tokens=out.tokens, embedding=out.embedding, time=state.time)
"""
    encoder, params = tiny_model()
    state, _ = _stream(encoder, params, random_video(COUNT, 2, 2, 32, 32))
    leaves = {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(tmp_path / "state.npz", **leaves)
    here, there = Path(__file__).parent, tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, "-c", script, str(here), str(tmp_path / "state.npz"), str(there)],
        check=True,
    )
    state, out = streaming.step(encoder, params, state, random_video(2, 2, 32, 32, seed=9))
    with np.load(there) as restored:
        assert np.array_equal(restored["tokens"], out.tokens)
        assert np.array_equal(restored["embedding"], out.embedding)
        assert np.array_equal(restored["time"], state.time)


def test_bfloat16_state_and_steps() -> None:
    encoder, params = tiny_model()
    half = Encoder(encoder.config, dtype=jnp.bfloat16)
    tubelets = random_video(COUNT, 1, 2, 32, 32)
    state, outputs = _stream(half, params, tubelets)
    _, exact = _stream(encoder, params, tubelets)
    assert state.cache.keys.dtype == outputs[-1].tokens.dtype == jnp.bfloat16
    assert outputs[-1].embedding.dtype == jnp.float32
    assert relative_error(outputs[-1].embedding, exact[-1].embedding) <= 0.05  # 8 bits of mantissa


def test_reset_recovers_from_nan() -> None:
    encoder, params = tiny_model()
    tubelets = random_video(2, 2, 2, 32, 32)
    bad = tubelets[:1].copy()
    bad[0, 0, 0, 0, 0] = np.nan
    state, outputs = _stream(encoder, params, bad)
    assert np.isnan(outputs[0].embedding[0]).any()
    assert np.isfinite(outputs[0].embedding[1]).all()
    state = streaming.reset(state, jnp.asarray([True, False]))
    _, outputs = _stream(encoder, params, tubelets[1:], state=state)
    _, fresh = _stream(encoder, params, tubelets[1:])
    assert relative_error(outputs[0].tokens[0], fresh[0].tokens[0]) <= TOLERANCE


@pytest.mark.parametrize(("batch_size", "window"), [(0, 4), (1, 0), (1, -1)])
def test_impossible_numbers_are_refused(batch_size: int, window: int) -> None:
    encoder, _ = tiny_model()
    with pytest.raises(InputError, match=r"(batch_size|window) = (0|-1); it must be at least 1"):
        streaming.init_state(encoder, batch_size, window)


def test_wrong_tubelets_and_options_are_refused() -> None:
    encoder, params = tiny_model()
    state = streaming.init_state(encoder, 1, WINDOW)
    for shape in [(1, 2, 32, 64, 3), (2, 2, 64, 64, 3), (1, 4, 64, 64, 3)]:
        with pytest.raises(InputError, match="the state was made for"):
            streaming.step(encoder, params, state, np.zeros(shape, np.float32))
    with pytest.raises(InputError, match="channels-first"):
        streaming.step(encoder, params, state, np.zeros((1, 3, 2, 64, 64), np.float32))
    good = np.zeros((1, 2, 64, 64, 3), np.float32)
    with pytest.raises(ConfigError, match="positions = 'relative'"):
        streaming.step(encoder, params, state, good, positions="relative")
    with pytest.raises(ConfigError, match="pool = 'max'"):
        streaming.step(encoder, params, state, good, pool="max")
    with pytest.raises(InputError, match=r"which is bool \(2,\); it must be bool \[1\]"):
        streaming.reset(state, jnp.asarray([True, False]))


def test_positions_of_another_grid_are_refused() -> None:
    config = tiny_config()
    encoder = Encoder(type(config)(**{**vars(config), "rope_grid": "config"}))
    assert streaming.init_state(encoder, 1, 2).pooled.shape == (1, 2, 48)
    with pytest.raises(ConfigError, match="streaming needs rope_grid"):
        streaming.init_state(encoder, 1, 2, height=32, width=32)


def test_a_stream_runs_with_64_bit_numbers() -> None:
    encoder, params = tiny_model()
    tubelets = random_video(WINDOW + 2, 2, 2, 32, 32)
    _, expected = _stream(encoder, params, tubelets)
    with jax.enable_x64(True):
        state, outputs = _stream(encoder, params, tubelets)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    for out, same in zip(outputs, expected, strict=True):
        assert relative_error(out.tokens, same.tokens) <= TOLERANCE
