"""A live embedding of a video: one tubelet in, one embedding out, at a constant price.

`step`, repeated over a video, equals the encoder's forward pass over the whole video under the
banded block-causal mask (`Encoder(.., window=W)`: tubelet q sees tubelets q-W+1 to q), final norm
included, before, at and after the ring is full. It is not the same as encoding the last window
afresh: a cached key of a deeper layer still knows the tubelets that its own tubelet saw, so the
receptive field is up to L·(W-1) tubelets of the past, as in any cached transformer.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa import rope
from jvjepa.area import row_areas
from jvjepa.cache import Cache, CacheDType, make_cache
from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder, check_video, token_grid
from jvjepa.errors import ConfigError, InputError
from jvjepa.layers import RopeTables, StreamPlan
from jvjepa.typing import Array, Params

Positions = Literal["window", "absolute"]
Pool = Literal["tubelet", "window"]


class StreamState(NamedTuple):
    """What a stream remembers: a plain pytree of arrays, to be saved and restored as such.

    Args:
        cache: keys before rotation and values, [L, B, W, S, H, K] each, a ring over W; in 8 bits
            with a scale for each token and head, see `jvjepa.cache`, if it was made so.
        time: int32 [B], tubelets that each stream has seen since its reset.
        pooled: float32 [B, W, D], the mean token of each tubelet in the window, also a ring.
    """

    cache: Cache
    time: Array
    pooled: Array


class StepOutput(NamedTuple):
    """What a step gives.

    Args:
        tokens: [B, S, D], the new tubelet's tokens after the final norm.
        embedding: float32 [B, D], their mean, or the mean over the window (`pool`).
    """

    tokens: Array
    embedding: Array


def init_state(
    encoder: Encoder,
    batch_size: int,
    window: int,
    *,
    height: int | None = None,
    width: int | None = None,
    cache: CacheDType | None = None,
) -> StreamState:
    """Makes the state of streams that have seen nothing.

    Args:
        encoder: the encoder that will step.
        batch_size: independent streams B.
        window: tubelets W that a token sees, its own included.
        height: pixels H of the video; None means the encoder's `crop_size`.
        width: pixels W of the video; None means the encoder's `crop_size`.
        cache: round keys and values to "int8" or "fp8", see `jvjepa.cache`, which changes results a
            little; None keeps them in the encoder's dtype.

    Returns:
        The state, 2·L·B·W·S·D values in the encoder's dtype, or of a byte, and little more.

    Raises:
        InputError: a number is impossible, or the encoder has areas over time.
        ConfigError: `cache` is unknown, or the encoder takes positions from its config and the
            video has another grid.
    """
    config = encoder.config
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value < 1:
            raise InputError(f"{name} = {value}; it must be at least 1")
    sides = [config.crop_size if side is None else side for side in (height, width)]
    clip = jax.ShapeDtypeStruct((batch_size, config.tubelet_size, *sides, 3), jnp.float32)
    rows, columns = _grid(clip, config)
    row_areas(config, (rows, columns))  # may raise
    shape = (config.num_layers, batch_size, window, rows * columns)
    shape = (*shape, config.num_heads, config.head_width)
    return StreamState(
        cache=make_cache(shape, encoder.dtype, cache),
        time=jnp.zeros((batch_size,), jnp.int32),
        pooled=jnp.zeros((batch_size, window, config.hidden_size), jnp.float32),
    )


@functools.partial(
    jax.jit, static_argnames=("encoder", "positions", "pool"), donate_argnames=("state",)
)
def step(
    encoder: Encoder,
    params: Params,
    state: StreamState,
    tubelet: Array,
    *,
    positions: Positions = "window",
    pool: Pool = "tubelet",
) -> tuple[StreamState, StepOutput]:
    """Takes in one tubelet of every stream.

    Compiled once for a shape; every later call costs the same, however long the stream. The
    buffers of `state` are donated: use the returned state, the old one is gone.

    Args:
        encoder: the encoder.
        params: its parameters, `model.params["encoder"]`.
        state: from `init_state` or an earlier step; it holds the window.
        tubelet: float [B, 2, H, W, 3], ImageNet-normalised.
        positions: "window" counts the frame axis from the oldest tubelet in the window, so that
            positions stay in the trained range for ever; "absolute" counts from the stream's
            start, whose float32 angles are off by up to 6e-8 · time radians. With tiled rotary
            embeddings the two differ after the first W tubelets.
        pool: "tubelet" embeds the new tubelet, "window" all tubelets in the window, which with a
            full window means what the mean over a clip of W tubelets means.

    Returns:
        The new state, and the output.

    Raises:
        InputError: the tubelet does not fit the state.
        ConfigError: `positions` or `pool` is unknown.
    """
    grid = check_tubelet(encoder.config, state, tubelet)
    patches = encoder.apply({"params": params}, tubelet, method="embed_patches")
    return advance(encoder, params, state, patches, grid, positions=positions, pool=pool)


@functools.partial(
    jax.jit, static_argnames=("encoder", "positions", "pool"), donate_argnames=("state",)
)
def scan(
    encoder: Encoder,
    params: Params,
    state: StreamState,
    tubelets: Array,
    *,
    positions: Positions = "window",
    pool: Pool = "tubelet",
) -> tuple[StreamState, StepOutput]:
    """Takes in many tubelets in one compiled loop; the same as as many steps.

    Args:
        encoder: as in `step`.
        params: as in `step`.
        state: as in `step`; donated.
        tubelets: float [n, B, 2, H, W, 3].
        positions: as in `step`.
        pool: as in `step`.

    Returns:
        The new state, and the outputs with a leading axis n.

    Raises:
        InputError: the tubelets do not fit the state.
        ConfigError: `positions` or `pool` is unknown.
    """

    def body(state: StreamState, tubelet: Array) -> tuple[StreamState, StepOutput]:
        return step(encoder, params, state, tubelet, positions=positions, pool=pool)

    return jax.lax.scan(body, state, tubelets)


@functools.partial(jax.jit, donate_argnames=("state",))
def reset(state: StreamState, which: Array) -> StreamState:
    """Restarts some streams of a batch; the others go on undisturbed.

    Args:
        state: donated.
        which: bool [B], True for the streams to restart.

    Returns:
        The state in which those have seen nothing.

    Raises:
        InputError: `which` is not bool [B].
    """
    which = jnp.asarray(which)
    batch = state.time.shape[0]
    if which.shape != (batch,) or which.dtype != jnp.bool_:
        raise InputError(f"which is {which.dtype} {which.shape}; it must be bool [{batch}]")

    def clear(leaf: Array, axis: int) -> Array:
        shape = [1] * leaf.ndim
        shape[axis] = batch
        return jnp.where(which.reshape(shape), jnp.zeros((), leaf.dtype), leaf)

    # The cache is emptied too: masked values still meet a product with 0, which NaN survives.
    return StreamState(
        cache=jax.tree.map(lambda leaf: clear(leaf, 1), state.cache),
        time=clear(state.time, 0),
        pooled=clear(state.pooled, 0),
    )


def advance(
    encoder: Encoder,
    params: Params,
    state: StreamState,
    patches: Array,
    grid: tuple[int, int],
    *,
    positions: Positions,
    pool: Pool,
    commit: Array | None = None,
) -> tuple[StreamState, StepOutput]:
    """The step behind the patch embedding; `step` and the gate share it.

    Args:
        encoder: the encoder.
        params: its parameters.
        state: the state.
        patches: [B, S, D], patch tokens of the new tubelet.
        grid: (rows, columns) of its tokens.
        positions: see `step`.
        pool: see `step`.
        commit: bool [B]; a stream where it is False computes an output but forgets the tubelet.
            None commits all.

    Returns:
        The new state, and the output.
    """
    if pool not in ("tubelet", "window"):
        raise ConfigError(f"pool = {pool!r}; it must be 'tubelet' or 'window'")
    window = state.pooled.shape[1]
    age = _ages(state.time, window)
    plan = _plan(encoder.config, state.time, age, grid, positions)
    tokens, cache = encoder.apply({"params": params}, patches, state.cache, plan, method="stream")
    mean = jnp.mean(tokens.astype(jnp.float32), axis=1)
    pooled = jnp.where((age == 0)[..., None], mean[:, None], state.pooled)
    embedding = mean
    if pool == "window":
        filled = (age <= state.time[:, None]).astype(jnp.float32)[..., None]
        embedding = jnp.sum(pooled * filled, axis=1) / jnp.sum(filled, axis=1)
    # What a stream that does not commit has written lies in the slot of the tubelet that just fell
    # out of the window; its next step overwrites it before anything reads it.
    taken = jnp.ones_like(state.time) if commit is None else commit.astype(jnp.int32)
    return StreamState(cache, state.time + taken, pooled), StepOutput(tokens, embedding)


def check_tubelet(config: EncoderConfig, state: StreamState, tubelet: Array) -> tuple[int, int]:
    """Returns the tubelet's (rows, columns); raises InputError unless it fits the state.

    A state knows the number of tokens alone: of a tubelet with as many in another grid, as 32x128
    pixels in place of 64x64, nobody can tell that it is another stream's.
    """
    _, batch, _, tokens = state.cache.keys.shape[:4]
    rows, columns = _grid(tubelet, config)
    if tubelet.shape[:2] != (batch, config.tubelet_size) or rows * columns != tokens:
        raise InputError(
            f"tubelet has shape {tuple(tubelet.shape)}; the state was made for "
            f"[{batch}, {config.tubelet_size}, H, W, 3] of {tokens} tokens"
        )
    return rows, columns


def _grid(video: Array | jax.ShapeDtypeStruct, config: EncoderConfig) -> tuple[int, int]:
    check_video(video, config)
    rows, columns = token_grid(video, config)
    layout = rope.layout(config, rows, columns)
    if (layout.rows, layout.columns) != (rows, columns):
        raise ConfigError(
            f'rope_grid = "config" puts tokens of a {rows}x{columns} grid at places of a '
            f'{config.config_grid}x{config.config_grid} grid; streaming needs rope_grid = "input"'
        )
    return rows, columns


def _ages(time: Array, window: int) -> Array:
    """Int32 [B, W]: how many tubelets ago each slot of the ring was written; 0 is the new one."""
    return (time[:, None] - jnp.arange(window, dtype=jnp.int32)[None]) % window


def _plan(
    config: EncoderConfig, time: Array, age: Array, grid: tuple[int, int], positions: Positions
) -> StreamPlan:
    if positions not in ("window", "absolute"):
        raise ConfigError(f"positions = {positions!r}; it must be 'window' or 'absolute'")
    batch, window = age.shape
    newest = jnp.minimum(time, window - 1) if positions == "window" else time  # [B]
    tokens = grid[0] * grid[1]
    layout = rope.layout(config, *grid)
    places = rope.positions(jnp.arange(tokens, dtype=jnp.int32), layout)  # [S, 3]

    def tables(frames: Array) -> RopeTables:  # int32 [B, n] to [B, n·S, K]
        frames = frames.astype(jnp.float32)[..., None, None]
        frames = jnp.broadcast_to(frames, (*frames.shape[:2], tokens, 1))
        space = jnp.broadcast_to(places[None, None, :, 1:], (*frames.shape[:3], 2))
        full = jnp.concatenate([frames, space], axis=-1).reshape(batch, -1, 3)
        return RopeTables(*rope.tables(full, config.head_width, config.rope))

    sees = jnp.repeat(age <= time[:, None], tokens, axis=1)
    return StreamPlan(
        slot=time % window,
        sees=sees[:, None, None],
        query_rope=tables(newest[:, None]),
        key_rope=tables(newest[:, None] - age),
        areas=row_areas(config, grid),
    )


def nbytes(state: StreamState) -> int:
    """Bytes that the state holds."""
    return sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(state))
