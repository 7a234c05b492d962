"""Skipping what is not new: a gate before the encoder's blocks.

The gate compares the patch tokens of what arrives with those of the last tubelet (or clip) that was
*encoded*, so that slow drift triggers as soon as it has added up. Decisions are made per stream. A
batch runs the blocks if any of its streams needs them, and `lax.cond` really skips them otherwise.

What a skipped tubelet does: nothing. The stream's time and cache stay as they are, as if it had
never arrived, and its last embedding is given again. So a gated stream equals the ungated stream of
the tubelets that it encoded, and its window holds the last W *encoded* tubelets, which may span
more time than W tubelets do.

A tubelet with NaN or infinite values is encoded and flagged (`finite`), its own output shows it,
and then the stream forgets it: neither the cache nor the reference is spoilt.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa import streaming
from jvjepa.cache import CacheDType
from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder, check_video, forward_flops, token_grid
from jvjepa.errors import InputError
from jvjepa.gate import Gate, Reference
from jvjepa.streaming import Pool, Positions, StepOutput, StreamState
from jvjepa.typing import Array, Params

_S = TypeVar("_S")


class Numbers(NamedTuple):
    """The numbers of a `Gate`, which are traced, so that changing them compiles nothing."""

    tau: Array
    max_hold: Array
    settle: Array


def _numbers(gate: Gate) -> Numbers:
    whole = (np.int32(gate.max_hold), np.int32(gate.settle))
    return Numbers(np.float32(gate.tau), *whole)


class GateState(NamedTuple):
    """What a gate remembers.

    Args:
        reference: float32 [B, n, D], the patch tokens to compare with; n is S or N.
        ready: bool [B], whether there is a reference yet.
        held: int32 [B], how many were skipped since the last one that was encoded.
        settling: int32 [B], how many are still to be encoded after the last surprise.
        output: the last good output of each stream, given again while it skips.
        seen: int32 [B], tubelets or clips that came.
        encoded: int32 [B], those of them that were encoded.
        steps: int32, calls.
        runs: int32, calls in which the blocks ran.
    """

    reference: Array
    ready: Array
    held: Array
    settling: Array
    output: StepOutput
    seen: Array
    encoded: Array
    steps: Array
    runs: Array


class GatedStream(NamedTuple):
    """State of a gated stream."""

    stream: StreamState
    gate: GateState


class GatedOutput(NamedTuple):
    """What a gated step gives.

    Args:
        tokens: [B, n, D], new, or the last ones again.
        embedding: float32 [B, D], new, or the last one again.
        is_new: bool [B], whether it was encoded now.
        surprise: float32 [B], 1 - cosine to the reference; infinite where there is none, NaN where
            the input is not finite.
        finite: bool [B], whether the input was finite.
    """

    tokens: Array
    embedding: Array
    is_new: Array
    surprise: Array
    finite: Array


class Statistics(NamedTuple):
    """What a gate has done so far.

    Args:
        seen: int [B], tubelets or clips that came.
        encoded: int [B].
        skipped: int [B].
        compute: floating-point operations spent, as a share of those that encoding everything
            would have taken; a batch skips only where all its streams do. NaN before the first.
    """

    seen: np.ndarray
    encoded: np.ndarray
    skipped: np.ndarray
    compute: float


def init_state(
    encoder: Encoder,
    batch_size: int,
    window: int,
    *,
    height: int | None = None,
    width: int | None = None,
    cache: CacheDType | None = None,
) -> GatedStream:
    """Makes the state of gated streams that have seen nothing.

    Args:
        encoder: as in `jvjepa.streaming.init_state`.
        batch_size: as there.
        window: as there.
        height: as there.
        width: as there.
        cache: as there.

    Returns:
        The state.

    Raises:
        InputError: as there.
    """
    how = {"height": height, "width": width, "cache": cache}
    stream = streaming.init_state(encoder, batch_size, window, **how)
    tokens = stream.cache.keys.shape[3]
    return GatedStream(stream, _init_gate(encoder, batch_size, tokens))


def init_clip_state(
    encoder: Encoder,
    batch_size: int,
    frames: int,
    *,
    height: int | None = None,
    width: int | None = None,
) -> GateState:
    """Makes the state of a gate for whole clips.

    Args:
        encoder: the encoder.
        batch_size: independent streams B of clips.
        frames: frames T of a clip.
        height: pixels H; None means the encoder's `crop_size`.
        width: pixels W; None means the encoder's `crop_size`.

    Returns:
        The state.

    Raises:
        InputError: a number is impossible.
    """
    config = encoder.config
    sides = [config.crop_size if side is None else side for side in (height, width)]
    check_video(jax.ShapeDtypeStruct((batch_size, frames, *sides, 3), jnp.float32), config)
    tubelets = max(1, frames // config.tubelet_size)
    return _init_gate(encoder, batch_size, tubelets * math.prod(sides) // config.patch_size**2)


def step(
    encoder: Encoder,
    params: Params,
    state: GatedStream,
    tubelet: Array,
    gate: Gate,
    *,
    positions: Positions = "window",
    pool: Pool = "tubelet",
) -> tuple[GatedStream, GatedOutput]:
    """Takes in one tubelet of every stream and encodes it where it is new.

    Args:
        encoder: the encoder.
        params: its parameters, `model.params["encoder"]`.
        state: from `init_state` or an earlier step; donated.
        tubelet: float [B, 2, H, W, 3], ImageNet-normalised.
        gate: when to encode; changing `tau` or `max_hold` compiles nothing.
        positions: see `jvjepa.streaming.step`.
        pool: see `jvjepa.streaming.step`.

    Returns:
        The new state, and the output.

    Raises:
        InputError: the tubelet does not fit the state.
    """
    how = {"reference": gate.reference, "positions": positions, "pool": pool}
    return _step(encoder, params, state, tubelet, _numbers(gate), **how)


def scan(
    encoder: Encoder,
    params: Params,
    state: GatedStream,
    tubelets: Array,
    gate: Gate,
    *,
    positions: Positions = "window",
    pool: Pool = "tubelet",
) -> tuple[GatedStream, GatedOutput]:
    """Takes in many tubelets, float [n, B, 2, H, W, 3], in one compiled loop.

    Args:
        encoder: as in `step`.
        params: as in `step`.
        state: as in `step`; donated.
        tubelets: float [n, B, 2, H, W, 3].
        gate: as in `step`.
        positions: as in `step`.
        pool: as in `step`.

    Returns:
        The new state, and the outputs with a leading axis n.

    Raises:
        InputError: the tubelets do not fit the state.
    """
    how = {"reference": gate.reference, "positions": positions, "pool": pool}
    return _scan(encoder, params, state, tubelets, _numbers(gate), **how)


def step_clip(
    encoder: Encoder, params: Params, state: GateState, video: Array, gate: Gate
) -> tuple[GateState, GatedOutput]:
    """Takes in one whole clip of every stream and encodes it where it is new.

    Args:
        encoder: the encoder.
        params: its parameters.
        state: from `init_clip_state` or an earlier call; donated.
        video: float [B, T, H, W, 3].
        gate: when to encode.

    Returns:
        The new state, and the output: tokens [B, N, D] and their mean.

    Raises:
        InputError: the clip does not fit the state.
    """
    return _step_clip(encoder, params, state, video, _numbers(gate), reference=gate.reference)


def reset(state: GatedStream, which: Array) -> GatedStream:
    """Restarts some streams of a batch, counters included; `state` is donated.

    Args:
        state: the state.
        which: bool [B], True for the streams to restart.

    Returns:
        The state in which those have seen nothing.

    Raises:
        InputError: `which` is not bool [B].
    """
    stream = streaming.reset(state.stream, which)
    gate, which = state.gate, jnp.asarray(which)
    kept = {
        name: jnp.where(which, jnp.zeros((), field.dtype), field)
        for name, field in gate._asdict().items()
        if name in ("ready", "held", "settling", "seen", "encoded")
    }
    return GatedStream(stream, gate._replace(**kept))


def statistics(state: GateState, config: EncoderConfig, *, window: int | None = None) -> Statistics:
    """Reads a gate's counters.

    Args:
        state: the gate; of a gated stream, its `.gate`.
        config: the encoder's.
        window: the stream's window; None for whole clips, whose tokens see each other.

    Returns:
        The counts, and the share of compute.
    """
    tokens = state.reference.shape[1]
    keys = tokens if window is None else tokens * window
    full = forward_flops(config, tokens, keys)
    patches = 2 * tokens * config.patch_dim * config.hidden_size
    seen, encoded = np.asarray(state.seen), np.asarray(state.encoded)
    steps, runs = int(state.steps), int(state.runs)
    spent = runs * full + (steps - runs) * patches
    return Statistics(seen, encoded, seen - encoded, spent / (steps * full) if steps else math.nan)


_STATIC = ("encoder", "reference", "positions", "pool")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def _step(
    encoder: Encoder,
    params: Params,
    state: GatedStream,
    tubelet: Array,
    numbers: Numbers,
    *,
    reference: Reference,
    positions: Positions,
    pool: Pool,
) -> tuple[GatedStream, GatedOutput]:
    grid = streaming.check_tubelet(encoder.config, state.stream, tubelet)
    patches = encoder.apply({"params": params}, tubelet, method="embed_patches")

    def encode(stream: StreamState, commit: Array) -> tuple[StreamState, StepOutput]:
        how = {"positions": positions, "pool": pool}
        return streaming.advance(encoder, params, stream, patches, grid, **how, commit=commit)

    stream, gate, out = _gated(
        encode, state.stream, state.gate, patches, numbers, reference=reference
    )
    return GatedStream(stream, gate), out


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def _scan(
    encoder: Encoder,
    params: Params,
    state: GatedStream,
    tubelets: Array,
    numbers: Numbers,
    *,
    reference: Reference,
    positions: Positions,
    pool: Pool,
) -> tuple[GatedStream, GatedOutput]:
    how = {"reference": reference, "positions": positions, "pool": pool}

    def body(state: GatedStream, tubelet: Array) -> tuple[GatedStream, GatedOutput]:
        return _step(encoder, params, state, tubelet, numbers, **how)

    return jax.lax.scan(body, state, tubelets)


@functools.partial(jax.jit, static_argnames=("encoder", "reference"), donate_argnames=("state",))
def _step_clip(
    encoder: Encoder,
    params: Params,
    state: GateState,
    video: Array,
    numbers: Numbers,
    *,
    reference: Reference,
) -> tuple[GateState, GatedOutput]:
    patches = encoder.apply({"params": params}, video, method="embed_patches")
    if patches.shape != state.reference.shape:
        raise InputError(
            f"video {tuple(video.shape)} makes tokens {patches.shape}; the state was made for "
            f"{state.reference.shape}"
        )
    grid = token_grid(video, encoder.config)

    def encode(nothing: tuple[()], commit: Array) -> tuple[tuple[()], StepOutput]:
        tokens = encoder.apply({"params": params}, patches, grid, method="encode")
        return nothing, StepOutput(tokens, jnp.mean(tokens.astype(jnp.float32), axis=1))

    _, gate, out = _gated(encode, (), state, patches, numbers, reference=reference)
    return gate, out


def _init_gate(encoder: Encoder, batch: int, tokens: int) -> GateState:
    width = encoder.config.hidden_size

    def count() -> Array:  # each its own buffer: the state is donated
        return jnp.zeros((batch,), jnp.int32)

    return GateState(
        reference=jnp.zeros((batch, tokens, width), jnp.float32),
        ready=jnp.zeros((batch,), jnp.bool_),
        held=count(),
        settling=count(),
        output=StepOutput(
            tokens=jnp.zeros((batch, tokens, width), encoder.dtype),
            embedding=jnp.zeros((batch, width), jnp.float32),
        ),
        seen=count(),
        encoded=count(),
        steps=jnp.zeros((), jnp.int32),
        runs=jnp.zeros((), jnp.int32),
    )


def _gated(
    encode: Callable[[_S, Array], tuple[_S, StepOutput]],
    inner: _S,
    gate: GateState,
    patches: Array,
    numbers: Numbers,
    *,
    reference: Reference,
) -> tuple[_S, GateState, GatedOutput]:
    """Decides per stream, and runs `encode(inner, commit)` if any stream needs it."""
    tau, max_hold, settle = numbers
    descriptor = patches.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(descriptor), axis=(1, 2))
    surprise = jnp.where(gate.ready, distance(descriptor, gate.reference), jnp.inf)
    surprise = jnp.where(finite, surprise, jnp.nan)
    surprising = finite & (surprise >= tau)
    is_new = ~finite | surprising | (gate.settling > 0) | (gate.held >= max_hold)
    commit = is_new & finite
    runs = jnp.any(is_new)

    def run(inner: _S) -> tuple[_S, StepOutput]:
        return encode(inner, commit)

    def hold(inner: _S) -> tuple[_S, StepOutput]:
        return inner, gate.output

    inner, fresh = jax.lax.cond(runs, run, hold, inner)
    out = _where(is_new, fresh, gate.output)
    compare_with = commit if reference == "encoded" else finite
    gate = GateState(
        reference=_where(compare_with, descriptor, gate.reference),
        ready=gate.ready | commit,
        held=jnp.where(commit, jnp.zeros((), jnp.int32), gate.held + 1),
        settling=jnp.where(
            surprising, settle, jnp.maximum(gate.settling - finite.astype(jnp.int32), 0)
        ),
        output=_where(commit, fresh, gate.output),
        seen=gate.seen + 1,
        encoded=gate.encoded + is_new.astype(jnp.int32),
        steps=gate.steps + 1,
        runs=gate.runs + runs.astype(jnp.int32),
    )
    return inner, gate, GatedOutput(out.tokens, out.embedding, is_new, surprise, finite)


def distance(a: Array, b: Array) -> Array:
    """1 - cosine of [B, n, D] with [B, n, D], per stream, without the cancellation of 1 - cos."""

    def unit(x: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True))
        return x / jnp.where(norm > 0.0, norm, 1.0)

    return 0.5 * jnp.sum(jnp.square(unit(a) - unit(b)), axis=(1, 2))


def _where(which: Array, yes: Any, no: Any) -> Any:
    """Takes the streams of `which` from one tree of [B, ...] arrays, the others from another."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(which.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, yes, no)
