"""Masks for pretraining: blocks of a clip's token grid that are hidden and have to be predicted.

Reference: Meta's V-JEPA 2 (`src/masks/multiseq_multiblock3d.py`), whose statistics these have. The
original cuts all samples of a batch to the shortest of them, so that its lengths change from step
to step. Here lengths are fixed: longer samples are cut as there, and shorter ones are padded.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.errors import ConfigError, InputError
from jvjepa.typing import Array

Grid = tuple[int, int, int]

_DRAWS = 4096  # masks whose lengths `lengths` looks at
_LEAST_CHANCE = 1e-3  # that a draw leaves a context, so that 1000 draws are enough on average
_SLACK = 1 + 1e-6  # by how much float32 may make the side of a block longer


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How blocks are drawn; each pair is the range of a uniform draw, (lowest, highest).

    Args:
        num_blocks: blocks of a sample; they may overlap, their union is to be predicted.
        spatial_scale: the share of a tubelet's tokens that a block covers, above 0, at most 1.
        temporal_scale: the share of the tubelets that a block covers, above 0, at most 1.
        aspect_ratio: rows over columns of a block, above 0.

    Raises:
        ConfigError: a value is impossible.
    """

    num_blocks: int
    spatial_scale: tuple[float, float]
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        """Checks every field."""
        if not _is_count(self.num_blocks):
            right = "a whole number above 0"
            raise ConfigError(f"MaskConfig.num_blocks = {self.num_blocks!r}; it must be {right}")
        self._check_range("spatial_scale", 1.0)
        self._check_range("temporal_scale", 1.0)
        self._check_range("aspect_ratio", 1e6)

    def _check_range(self, name: str, highest: float) -> None:
        pair = getattr(self, name)
        numbers = isinstance(pair, tuple) and [isinstance(x, int | float) for x in pair]
        if numbers != [True, True] or not 0 < pair[0] <= pair[1] <= highest:
            right = f"a tuple (lowest, highest), both above 0 and at most {highest:g}"
            raise ConfigError(f"MaskConfig.{name} = {pair!r}; it must be {right}")


VIDEO_MASKS = (
    MaskConfig(num_blocks=8, spatial_scale=(0.15, 0.15)),
    MaskConfig(num_blocks=2, spatial_scale=(0.7, 0.7)),
)
IMAGE_MASKS = (MaskConfig(num_blocks=10, spatial_scale=(0.15, 0.15)),)


class Masks(NamedTuple):
    """Which tokens the encoder sees, and which are to be predicted.

    Ids run in raster order (tubelet, row, column), ascending. Padding comes last. It repeats the
    last valid id, so that it can be gathered; attention and the loss have to leave it out.

    Args:
        context_ids: int32 [B, num_context], what the encoder sees; one or more are valid.
        context_valid: bool [B, num_context], False for padding.
        target_ids: int32 [B, num_targets], what is to be predicted; one or more are valid.
        target_valid: bool [B, num_targets], False for padding.
    """

    context_ids: Array
    context_valid: Array
    target_ids: Array
    target_valid: Array


def sample(
    key: Array,
    config: MaskConfig,
    grid: Grid,
    batch_size: int,
    *,
    num_context: int,
    num_targets: int,
) -> Masks:
    """Draws masks for a batch.

    One size of blocks is drawn for the whole batch, and the places of `num_blocks` blocks for every
    sample. The union of the blocks is the sample's target, the rest its context. A sample whose
    context is empty has its places (not the size) drawn again. Of more than `num_context` or
    `num_targets` tokens the first in raster order stay, which drops late ones.

    Args:
        key: JAX random key; the same one gives the same masks.
        config: how blocks are drawn.
        grid: (t, h, w), the tubelets, rows and columns of a clip's tokens.
        batch_size: samples B.
        num_context: ids of context a sample, 1 to N; `lengths` proposes some, N cuts nothing.
        num_targets: ids of target a sample, likewise.

    Returns:
        The masks.

    Raises:
        InputError: a number is impossible.
        ConfigError: on this grid a block may be empty, or so large that it leaves a context never
            or hardly ever (the original loops for ever there).
    """
    grid = _check(config, grid)
    if not _is_count(batch_size):
        raise InputError(f"batch_size = {batch_size!r}; it must be a whole number above 0")
    num_tokens = math.prod(grid)
    for name, value in (("num_context", num_context), ("num_targets", num_targets)):
        if not _is_count(value) or value > num_tokens:
            raise InputError(f"{name} = {value!r}; it must be a whole number, 1 to {num_tokens}")
    return _sample(key, config, grid, batch_size, num_context, num_targets)


def lengths(config: MaskConfig, grid: Grid, *, quantile: float = 0.95) -> tuple[int, int]:
    """Proposes the fixed lengths of context and target, from the lengths of 4096 masks.

    Call it outside of jit. A long length pads most samples, and padding costs compute; a short one
    cuts most samples, whose late tokens are then neither seen nor predicted. The original cuts to
    the shortest of a batch of B, which is about `quantile=1/B`.

    Args:
        config: how blocks are drawn.
        grid: (t, h, w), the tubelets, rows and columns of a clip's tokens.
        quantile: the share of samples that are not cut, 0 to 1.

    Returns:
        num_context, num_targets: for `sample`; the same at every call.

    Raises:
        InputError: a number is impossible.
        ConfigError: as in `sample`.
    """
    grid = _check(config, grid)
    if not 0 <= quantile <= 1:
        raise InputError(f"quantile = {quantile!r}; it must be between 0 and 1")
    context = np.asarray(_context_lengths(jax.random.key(0), config, grid))
    num_tokens = math.prod(grid)
    num_context, num_targets = (
        int(np.quantile(values, quantile, method="inverted_cdf"))
        for values in (context, num_tokens - context)
    )
    return num_context, num_targets


class _Sizes(NamedTuple):
    """The ends of what is drawn, as float64 gives them: tokens (h·w), and (t, h, w) of a block."""

    areas: tuple[int, int]
    smallest: Grid
    largest: Grid


def _block_sizes(config: MaskConfig, grid: Grid) -> _Sizes:
    t, h, w = grid
    areas = [int(h * w * scale) for scale in config.spatial_scale]
    frames = [max(1, int(t * scale)) for scale in config.temporal_scale]
    low, high = config.aspect_ratio
    rows = [round(math.sqrt(n * ratio)) for n, ratio in zip(areas, (low, high), strict=True)]
    columns = [round(math.sqrt(n / ratio)) for n, ratio in zip(areas, (high, low), strict=True)]
    smallest, largest = zip(
        frames, [min(x, h) for x in rows], [min(x, w) for x in columns], strict=True
    )
    return _Sizes(tuple(areas), smallest, largest)


def _check(config: MaskConfig, grid: Grid) -> Grid:
    """Raises unless blocks are never empty and drawing again until there is a context ends."""
    sides = tuple(grid)
    if len(sides) != 3 or not all(_is_count(side) for side in sides):
        raise InputError(f"grid = {grid!r}; it must be (t, h, w), whole numbers above 0")
    if min(_block_sizes(config, sides).smallest) < 1:
        right = "take a larger grid, larger scales, or aspect ratios nearer to 1"
        raise ConfigError(f"{config} draws empty blocks on the grid {sides}; {right}")
    # A corner is covered by only one of a block's places, so it is context with this chance.
    chance = (1 - 1 / _fewest_places(config, sides)) ** config.num_blocks
    if chance < _LEAST_CHANCE:
        right = "take a larger grid, or fewer or smaller blocks"
        raise ConfigError(f"{config} leaves no context on the grid {sides}; {right}")
    return sides


def _fewest_places(config: MaskConfig, grid: Grid) -> int:
    """In how many places the block that fits the worst can be; 1 means that it covers the grid."""
    t, h, w = grid
    (_, area), smallest, largest = _block_sizes(config, grid)
    places = []
    for rows in range(smallest[1], largest[1] + 1):
        # of the blocks with so many rows, the one of the smallest ratio has the most columns
        ratio = max(config.aspect_ratio[0], (rows - 0.5) ** 2 / area)
        columns = min(math.floor(math.sqrt(area / ratio) * _SLACK + 0.5), w)
        places.append((h - rows + 1) * (w - columns + 1))
    return (t - largest[0] + 1) * min(places)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _sample(
    key: Array,
    config: MaskConfig,
    grid: Grid,
    batch_size: int,
    num_context: int,
    num_targets: int,
) -> Masks:
    context = _sample_context(key, config, grid, batch_size).reshape(batch_size, -1)
    return Masks(*_pack(context, num_context), *_pack(~context, num_targets))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _context_lengths(key: Array, config: MaskConfig, grid: Grid) -> Array:
    """Int32 [4096], the tokens of context of single samples, each with a block size of its own."""

    def count(key: Array) -> Array:
        return jnp.sum(_sample_context(key, config, grid, 1), dtype=jnp.int32)

    return jax.lax.map(count, jax.random.split(key, _DRAWS), batch_size=256)


def _sample_context(key: Array, config: MaskConfig, grid: Grid, batch_size: int) -> Array:
    """Bool [B, t, h, w], True for the context; never all False."""
    size_key, key = jax.random.split(key)
    size = _sample_size(size_key, config, grid)

    def is_empty(context: Array) -> Array:
        return ~jnp.any(context, axis=(1, 2, 3), keepdims=True)

    def draw(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key, context = carry
        key, draw_key = jax.random.split(key)
        blocks = _sample_blocks(draw_key, size, config.num_blocks, grid, batch_size)
        return key, jnp.where(is_empty(context), ~blocks, context)

    none = jnp.zeros((batch_size, *grid), bool)
    return jax.lax.while_loop(lambda carry: jnp.any(is_empty(carry[1])), draw, (key, none))[1]


def _sample_size(key: Array, config: MaskConfig, grid: Grid) -> Array:
    """Int32 [3], (t, h, w) of a block; clipped, because float32 may step over the true ends."""
    t, h, w = grid
    areas, smallest, largest = _block_sizes(config, grid)
    ranges = [config.temporal_scale, config.spatial_scale, config.aspect_ratio]
    low, high = jnp.asarray(ranges, jnp.float32).T
    temporal, spatial, ratio = low + jax.random.uniform(key, (3,), jnp.float32) * (high - low)
    area = jnp.clip(jnp.floor(h * w * spatial), *areas)
    sides = jnp.stack([jnp.floor(t * temporal), jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)])
    sides = jnp.round(sides).astype(jnp.int32)  # to even, as Python's
    return jnp.clip(sides, jnp.asarray(smallest, jnp.int32), jnp.asarray(largest, jnp.int32))


def _sample_blocks(key: Array, size: Array, num_blocks: int, grid: Grid, batch_size: int) -> Array:
    """Bool [B, t, h, w], True in any of the blocks, whose places are drawn uniformly."""
    shape = (batch_size, num_blocks, 3)
    places = jnp.broadcast_to(jnp.asarray(grid, jnp.int32) - size + 1, shape)
    # below `places` also after rounding; `randint` would take a second longer to compile
    drawn = jax.random.uniform(key, shape, jnp.float32) * places.astype(jnp.float32)
    first = jnp.floor(drawn).astype(jnp.int32)

    def covers(axis: int) -> Array:
        index = jnp.arange(grid[axis], dtype=jnp.int32).reshape(1, 1, -1)
        start = first[:, :, axis, None]
        return (index >= start) & (index < start + size[axis])  # [B, num_blocks, side]

    t, h, w = covers(0), covers(1), covers(2)
    blocks = t[:, :, :, None, None] & h[:, :, None, :, None] & w[:, :, None, None, :]
    return jnp.any(blocks, axis=1)


def _pack(chosen: Array, length: int) -> tuple[Array, Array]:
    """The ids of what is True in bool [B, N], ascending, and their validity: [B, length] each."""
    num_tokens = chosen.shape[1]
    ids = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    ids = jnp.sort(jnp.where(chosen, ids, num_tokens), axis=1)[:, :length]
    valid = ids < num_tokens
    last = jnp.max(jnp.where(valid, ids, 0), axis=1, keepdims=True)
    return jnp.where(valid, ids, last), valid
