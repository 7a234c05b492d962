from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_video, relative_error, tiny_model

from jvjepa import Encoder, gating, streaming
from jvjepa.encoder import forward_flops
from jvjepa.errors import ConfigError, InputError
from jvjepa.gating import Gate
from jvjepa.parameters import unstack_layers

TOLERANCE = 1e-5
WINDOW = 3


def _gated(
    encoder: Encoder, params: dict, tubelets: np.ndarray, gate: Gate
) -> tuple[gating.GatedStream, list[gating.GatedOutput]]:
    """Steps over [n, B, 2, H, W, 3]."""
    size = dict(zip(("height", "width"), tubelets.shape[3:5], strict=True))
    state = gating.init_state(encoder, tubelets.shape[1], WINDOW, **size)
    outputs = []
    for tubelet in tubelets:
        state, out = gating.step(encoder, params, state, tubelet, gate)
        outputs.append(out)
    return state, outputs


def _decisions(outputs: list[gating.GatedOutput]) -> np.ndarray:
    return np.stack([out.is_new for out in outputs])  # [n, B]


def _still(count: int, noise: float = 0.0, batch: int = 1) -> np.ndarray:
    """The same picture again and again, with sensor noise."""
    picture = random_video(1, batch, 1, 32, 32)
    return picture + noise * random_video(count, batch, 2, 32, 32, seed=1)


def _drift(count: int, step: float) -> np.ndarray:
    """One picture turning into another, by an angle of `step` a tubelet."""
    a, b = random_video(2, 1, 1, 32, 32)[:, None]
    angles = step * np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1, 1, 1)
    clip = np.cos(angles) * a + np.sin(angles) * b
    return np.repeat(clip, 2, axis=2).astype(np.float32)


def test_a_still_scene_is_encoded_once() -> None:
    encoder, params = tiny_model()
    state, outputs = _gated(encoder, params, _still(10), Gate(tau=1e-6))
    assert _decisions(outputs)[:, 0].tolist() == [True] + [False] * 9
    for out in outputs[1:]:
        assert np.array_equal(out.embedding, outputs[0].embedding)
        assert np.array_equal(out.tokens, outputs[0].tokens)
    assert np.isposinf(outputs[0].surprise[0])
    assert state.stream.time.tolist() == [1]


def test_noise_below_the_threshold_is_skipped_and_above_it_is_not() -> None:
    encoder, params = tiny_model()
    tubelets = _still(10, noise=0.02)
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.01))
    assert _decisions(outputs).sum() == 1
    assert 0 < float(outputs[-1].surprise[0]) < 0.01
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=1e-7))
    assert _decisions(outputs).all()


def test_slow_drift_triggers_as_soon_as_it_has_added_up() -> None:
    encoder, params = tiny_model()
    tubelets = _drift(40, step=0.02)
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.01))
    encoded = np.flatnonzero(_decisions(outputs)[:, 0])
    assert len(encoded) >= 4
    assert len(set(np.diff(encoded))) <= 2  # evenly, every so many steps
    skipped = [float(out.surprise[0]) for out in outputs if not out.is_new[0]]
    assert max(skipped) < 0.01
    # the reference of saccadic: no step is large, so nothing ever triggers
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.01, reference="previous"))
    assert _decisions(outputs).sum() == 1


def test_a_cut_is_encoded_at_once() -> None:
    encoder, params = tiny_model()
    tubelets = _still(8, noise=0.01)
    tubelets[4:] = random_video(1, 1, 1, 32, 32, seed=7) + 0.01 * tubelets[4:]
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.05))
    assert np.flatnonzero(_decisions(outputs)[:, 0]).tolist() == [0, 4]


def test_a_black_frame_is_a_cut_and_black_video_is_still() -> None:
    encoder, params = tiny_model()
    tubelets = _still(6, noise=0.01)
    tubelets[3] = -2.1  # what preprocessing makes of black
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.05))
    assert np.flatnonzero(_decisions(outputs)[:, 0]).tolist() == [0, 3, 4]
    black = np.zeros((5, 1, 2, 32, 32, 3), np.float32)
    bare = {**params, "patch_embed": jax.tree.map(jnp.zeros_like, params["patch_embed"])}
    _, outputs = _gated(encoder, bare, black, Gate(tau=0.05))  # tokens of norm zero
    assert np.flatnonzero(_decisions(outputs)[:, 0]).tolist() == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("reference", ["encoded", "previous"])
def test_a_bad_frame_is_encoded_flagged_and_forgotten(bad: float, reference: str) -> None:
    encoder, params = tiny_model()
    tubelets = _drift(8, step=0.3)
    spoilt = tubelets.copy()
    spoilt[4, 0, 1, 5, 5, 0] = bad
    gate = Gate(tau=0.03, reference=reference)
    _, outputs = _gated(encoder, params, spoilt, gate)
    _, without = _gated(encoder, params, np.delete(tubelets, 4, axis=0), gate)
    assert [bool(out.finite[0]) for out in outputs] == [i != 4 for i in range(8)]
    assert outputs[4].is_new[0]
    assert np.isnan(outputs[4].surprise[0])
    assert not np.isfinite(outputs[4].embedding).all()
    del outputs[4]
    for out, expected in zip(outputs, without, strict=True):
        assert np.array_equal(out.is_new, expected.is_new)
        assert relative_error(out.tokens, expected.tokens) <= TOLERANCE


def test_a_bad_first_frame_leaves_no_reference() -> None:
    encoder, params = tiny_model()
    tubelets = _still(3)
    tubelets[0, 0, 0, 0, 0, 0] = np.nan
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=1e-6))
    assert _decisions(outputs)[:, 0].tolist() == [True, True, False]
    assert np.isposinf(outputs[1].surprise[0])


def test_settling_encodes_until_the_window_is_full_of_what_is_new() -> None:
    encoder, params = tiny_model()
    tubelets = _still(14, noise=0.01)
    tubelets[7:] = random_video(1, 1, 1, 32, 32, seed=7) + 0.01 * tubelets[7:]
    gate = Gate(tau=0.05, settle=WINDOW - 1)
    _, settled = _gated(encoder, params, tubelets, gate)
    assert np.flatnonzero(_decisions(settled)[:, 0]).tolist() == [0, 1, 2, 7, 8, 9]
    _, held = _gated(encoder, params, tubelets, Gate(tau=0.05))
    _, exact = _gated(encoder, params, tubelets, Gate(tau=0.0))
    error, without = (
        relative_error(outputs[-1].embedding, exact[-1].embedding) for outputs in (settled, held)
    )
    assert error < 0.5 * without


@pytest.mark.parametrize("max_hold", [0, 1, 3])
def test_max_hold_bounds_how_old_an_embedding_gets(max_hold: int) -> None:
    encoder, params = tiny_model()
    tubelets = _still(13)
    _, outputs = _gated(encoder, params, tubelets, Gate(tau=0.5, max_hold=max_hold))
    encoded = np.flatnonzero(_decisions(outputs)[:, 0])
    assert encoded.tolist() == list(range(0, 13, max_hold + 1))


def test_streams_decide_for_themselves_and_equal_the_stream_of_what_they_encoded() -> None:
    encoder, params = tiny_model()
    rng = np.random.default_rng(0)
    batch, count = 3, 14
    tubelets = random_video(count, batch, 2, 32, 32)
    repeats = rng.random((count, batch)) < 0.5
    for i, b in zip(*np.nonzero(repeats), strict=True):
        if i:
            tubelets[i, b] = tubelets[i - 1, b] + 1e-3 * tubelets[i, b]
    state, outputs = _gated(encoder, params, tubelets, Gate(tau=0.1))
    decisions = _decisions(outputs)
    assert np.array_equal(decisions[1:], ~repeats[1:])
    for b in range(batch):
        stream = streaming.init_state(encoder, 1, WINDOW, height=32, width=32)
        for i in range(count):
            if decisions[i, b]:
                stream, fresh = streaming.step(encoder, params, stream, tubelets[i, b : b + 1])
            assert relative_error(outputs[i].tokens[b], fresh.tokens[0]) <= TOLERANCE
            assert relative_error(outputs[i].embedding[b], fresh.embedding[0]) <= TOLERANCE
        assert int(state.stream.time[b]) == decisions[:, b].sum() == int(state.gate.encoded[b])


@pytest.mark.parametrize("pool", ["tubelet", "window"])
def test_tau_zero_is_the_ungated_stream(pool: str) -> None:
    encoder, params = tiny_model()
    tubelets = _still(7)
    state = gating.init_state(encoder, 1, WINDOW, height=32, width=32)
    stream = streaming.init_state(encoder, 1, WINDOW, height=32, width=32)
    for tubelet in tubelets:
        state, out = gating.step(encoder, params, state, tubelet, Gate(tau=0.0), pool=pool)
        stream, expected = streaming.step(encoder, params, stream, tubelet, pool=pool)
        assert out.is_new.all()
        assert relative_error(out.embedding, expected.embedding) <= TOLERANCE


def test_scan_equals_steps() -> None:
    encoder, params = tiny_model()
    tubelets = _drift(12, step=0.1)
    gate = Gate(tau=0.02)
    state, outputs = _gated(encoder, params, tubelets, gate)
    scanned_state = gating.init_state(encoder, 1, WINDOW, height=32, width=32)
    scanned_state, scanned = gating.scan(encoder, params, scanned_state, tubelets, gate)
    assert np.array_equal(scanned.is_new, _decisions(outputs))
    assert 1 < scanned.is_new.sum() < 12
    stepped = jnp.stack([out.embedding for out in outputs])
    assert relative_error(scanned.embedding, stepped) <= TOLERANCE
    assert np.array_equal(scanned_state.gate.held, state.gate.held)


def test_another_threshold_compiles_nothing(compilations: Callable[[], int]) -> None:
    encoder, params = tiny_model()
    tubelet = jnp.asarray(_still(1, noise=0.1)[0])
    state = gating.init_state(encoder, 1, WINDOW, height=32, width=32)
    state, _ = gating.step(encoder, params, state, tubelet, Gate())
    compiled = compilations()
    for i in range(4):
        gate = Gate(tau=0.01 * i, max_hold=i, settle=i)
        state, _ = gating.step(encoder, params, state, tubelet, gate)
    assert compilations() == compiled


def test_statistics_count_what_happened() -> None:
    encoder, params = tiny_model()
    tubelets = _still(10, batch=2)
    tubelets[5:, 1] += random_video(1, 2, 32, 32, seed=3)
    state, _ = _gated(encoder, params, tubelets, Gate(tau=0.01))
    found = gating.statistics(state.gate, encoder.config, window=WINDOW)
    assert found.seen.tolist() == [10, 10]
    assert found.encoded.tolist() == [1, 2]
    assert found.skipped.tolist() == [9, 8]
    tokens, config = 4, encoder.config
    patch = 2 * tokens * config.patch_dim * config.hidden_size
    full = forward_flops(config, tokens, tokens * WINDOW)
    assert found.compute == pytest.approx((2 * full + 8 * patch) / (10 * full))


def test_forward_flops_are_what_xla_counts() -> None:
    encoder, params = tiny_model()
    encoder, params = Encoder(encoder.config, scan=False, attention="xla"), unstack_layers(params)
    clip = jnp.asarray(random_video(1, 4, 64, 64))
    compiled = jax.jit(encoder.apply).lower({"params": params}, clip).compile()
    counted = compiled.cost_analysis()["flops"]  # with norms, softmax and rotations
    ours = forward_flops(encoder.config, 32, 32)
    assert ours < counted < 1.25 * ours


def test_reset_restarts_one_stream() -> None:
    encoder, params = tiny_model()
    tubelets = _still(4, batch=2)
    state, _ = _gated(encoder, params, tubelets, Gate(tau=0.01))
    state = gating.reset(state, jnp.asarray([False, True]))
    state, out = gating.step(encoder, params, state, tubelets[0], Gate(tau=0.01))
    assert out.is_new.tolist() == [False, True]
    assert state.gate.seen.tolist() == [5, 1]
    assert state.stream.time.tolist() == [1, 1]


def test_a_gate_for_whole_clips() -> None:
    encoder, params = tiny_model()
    clips = random_video(3, 2, 4, 32, 48)
    clips[1, 0] = clips[0, 0]  # stream 0 stands still once
    gate = Gate(tau=0.1)
    state = gating.init_clip_state(encoder, 2, 4, height=32, width=48)
    decisions = []
    for clip in clips:
        state, out = gating.step_clip(encoder, params, state, clip, gate)
        decisions.append(out.is_new.tolist())
        expected = encoder.apply({"params": params}, clip)  # what stands still encodes alike
        for b in range(2):
            tokens = expected[b]
            assert relative_error(out.tokens[b], tokens) <= TOLERANCE
            assert relative_error(out.embedding[b], tokens.mean(0)) <= TOLERANCE
    assert decisions == [[True, True], [False, True], [True, True]]
    assert gating.statistics(state, encoder.config).skipped.tolist() == [1, 0]
    with pytest.raises(InputError, match="the state was made for"):
        gating.step_clip(encoder, params, state, clips[0][:, :2], gate)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tau": -0.1}, "tau = -0.1; it must be between 0 and 2"),
        ({"tau": float("nan")}, "tau = nan"),
        ({"max_hold": -1}, "max_hold = -1"),
        ({"max_hold": 2**31}, "max_hold = 2147483648; it must be 0 to 2147483647"),
        ({"settle": -1}, "settle = -1"),
        ({"reference": "last"}, "reference = 'last'"),
    ],
)
def test_impossible_gates_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gate(**values)
