"""Area attention (ST-A²): a token sees those of its own area of the clip, not the whole clip.

The clip is cut into `temporal_splits` x `spatial_splits` areas, by tubelet and by row of the token
grid. A of them need A times fewer scores than full attention, with the same weights.

Tokens are put in the order of their areas once, before the first layer, and put back once, after
the last: attention over areas is then a reshape, and nothing else, full attention included, minds
the order. Of a whole clip the areas are known when the program is traced; of visible tokens, other
ones in each sample, when it runs.

Reference: `RoPEAreaAttention` of the ST-A² fork of V-JEPA 2 (`src/models/utils/modules.py`), which
sorts, pads and puts back in every layer.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa.attention import Backend, attention, attention_over_spans, is_one_cpu, resolve
from jvjepa.config import EncoderConfig
from jvjepa.errors import InputError
from jvjepa.typing import Array

# Capacities that visible tokens may have, as multiples of an area's even share of them.
_HEADROOMS = (1.25, 1.75)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a token grid is cut into areas.

    A side that does not divide leaves the rest to its last area, as the original does.

    Args:
        grid: (t, h, w), tubelets, rows and columns.
        temporal_splits: areas along t, 1 to t.
        spatial_splits: areas along h, 1 to h.
    """

    grid: tuple[int, int, int]
    temporal_splits: int
    spatial_splits: int

    @property
    def num_areas(self) -> int:
        """A."""
        return self.temporal_splits * self.spatial_splits

    def area(self, ids: Array | NDArray[np.int64]) -> Array | NDArray[np.int64]:
        """The area, 0 to A-1, of each token id; temporal slowest."""
        tubelets, rows, columns = self.grid
        tubelet, row = ids // (rows * columns), ids // columns % rows
        late = (tubelet // (tubelets // self.temporal_splits)).clip(0, self.temporal_splits - 1)
        low = (row // (rows // self.spatial_splits)).clip(0, self.spatial_splits - 1)
        return late * self.spatial_splits + low

    @functools.cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each area, [A]."""
        return np.bincount(self.area(np.arange(math.prod(self.grid))), minlength=self.num_areas)

    @functools.cached_property
    def order(self) -> NDArray[np.int64]:
        """The token ids, [N], area by area; areas of the same size lie side by side."""
        ids = np.arange(math.prod(self.grid))
        area = self.area(ids)
        return np.lexsort((ids, area, self.sizes[area]))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(areas, tokens of each) in that order: areas of one size are one batch."""
        by_size = itertools.groupby(sorted(self.sizes.tolist()))
        return [(len(list(same)), size) for size, same in by_size]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAreas:
    """The areas of whole clips.

    Args:
        tiling: the areas.
        scale: of what attention gives, before its projection.
        masks: for each run of the tiling bool [1, areas, 1, n, n], what may be seen within an area;
            None means all.
    """

    tiling: Tiling = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    masks: tuple[Array, ...] | None = None

    def sort(self, x: Array) -> Array:
        """Puts tokens [B, N, ..] in the order of the areas."""
        return x[:, self.tiling.order]

    def restore(self, x: Array) -> Array:
        """Puts tokens [.., N, D] back where they were."""
        return x[..., np.argsort(self.tiling.order), :]

    def under(self, mask: Array | None) -> "DenseAreas":
        """These areas under a mask, bool [1, 1, N, N] in their order."""
        if mask is None:
            return self
        masks, start = [], 0
        for areas, size in self.tiling.runs:
            begins = range(start, start + areas * size, size)
            blocks = [mask[:, :, at : at + size, at : at + size] for at in begins]
            masks.append(jnp.stack(blocks, axis=1))
            start += areas * size
        return dataclasses.replace(self, masks=tuple(masks))

    def attend(self, q: Array, k: Array, v: Array, backend: Backend) -> Array:
        """Attends within each area; all [B, N, H, K], in the order of the areas."""
        outputs, start = [], 0
        batch, _, *heads = q.shape
        for i, (areas, size) in enumerate(self.tiling.runs):
            stop = start + areas * size
            parts = [x[:, start:stop].reshape(batch * areas, size, *heads) for x in (q, k, v)]
            mask = None
            if self.masks is not None:
                mask = jnp.broadcast_to(self.masks[i], (batch, areas, 1, size, size))
                mask = mask.reshape(batch * areas, 1, size, size)
            out = attention(*parts, mask=mask, backend=backend)
            outputs.append(out.reshape(batch, stop - start, *heads))
            start = stop
        return _scaled(jnp.concatenate(outputs, axis=1), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAreas:
    """The areas of some tokens of each clip, other ones in each sample.

    Args:
        tiling: the areas.
        scale: as in `DenseAreas`.
        order: int [B, M], the token at each place; those that nobody sees come last.
        area: int [B, M], the area at each place, and A for those that nobody sees.
        counts: int [B, A], how many of each area are seen.
        mask: bool [B, 1, M, M] in that order, what else may be seen; None means all of an area.
    """

    tiling: Tiling = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    order: Array
    area: Array
    counts: Array
    mask: Array | None = None

    def sort(self, x: Array) -> Array:
        """Puts tokens [B, M, ..] in the order of the areas."""
        return _take(x, self.order)

    def restore(self, x: Array) -> Array:
        """Puts tokens [B, M, D], or layers of them [n, B, M, D], back where they were."""
        places = jnp.argsort(self.order, axis=1)
        if x.ndim == 3:
            return _take(x, places)
        return jax.vmap(_take, in_axes=(0, None))(x, places)

    def under(self, mask: Array | None) -> "SparseAreas":
        """These areas under a mask, bool [B, 1, 1 or M, M] in their order."""
        if mask is None or mask.shape[2] == 1:  # who is seen by nobody is in no area already
            return self
        return dataclasses.replace(self, mask=mask)

    def attend(self, q: Array, k: Array, v: Array, backend: Backend) -> Array:
        """Attends within each area; all [B, M, H, K], in the order of the areas.

        On a single CPU the `chunked` backend takes from each query's area what is there. Elsewhere,
        where that would be a long loop or bring all clips to every device, and for other backends
        all areas have the same capacity, and the fullest one of the batch decides which of a few it
        is; where that would cost more than full attention, it is full attention under a mask.
        Gradients compute the attention anew.
        """
        batch, tokens, heads, _ = q.shape
        areas = self.tiling.num_areas
        chunked = resolve(backend, (batch, heads, tokens, tokens)) == "chunked"
        if self.mask is None and chunked and is_one_cpu():
            ends = jnp.pad(
                jnp.cumsum(self.counts, axis=1), ((0, 0), (1, 1))
            )  # [B, 1 + A + 1], 0 last
            first, end = (jnp.take_along_axis(ends, self.area + i, axis=1) for i in (0, 1))
            return _scaled(attention_over_spans(q, k, v, first, end), self.scale)
        most = min(int(self.tiling.sizes.max()), tokens)
        shares = (math.ceil(headroom * tokens / areas) for headroom in _HEADROOMS)
        capacities = sorted({min(share, most) for share in shares} | {most})

        def branch(capacity: int, *qkv: Array) -> Array:
            if areas * capacity**2 > tokens**2:
                return self._masked(*qkv, backend)
            return self._padded(*qkv, capacity, backend)

        @jax.checkpoint  # else every branch keeps what the gradient of each would need
        def switch(*qkv: Array) -> Array:
            branches = [functools.partial(branch, capacity) for capacity in capacities]
            too_small = jnp.max(self.counts) > jnp.asarray(capacities[:-1], self.counts.dtype)
            return jax.lax.switch(jnp.sum(too_small), branches, *qkv)

        return _scaled(switch(q, k, v), self.scale)

    def _masked(self, q: Array, k: Array, v: Array, backend: Backend) -> Array:
        seen = (self.area < self.tiling.num_areas)[:, None, :]
        mask = ((self.area[:, :, None] == self.area[:, None, :]) & seen)[:, None]
        mask = mask if self.mask is None else mask & self.mask
        return attention(q, k, v, mask=mask, backend=backend)

    def _padded(self, q: Array, k: Array, v: Array, capacity: int, backend: Backend) -> Array:
        batch, tokens, *heads = q.shape
        areas = self.tiling.num_areas
        starts = jnp.cumsum(self.counts, axis=1) - self.counts  # [B, A]

        def cut(x: Array) -> Array:
            """[B, M, ..] to [B·A, capacity, ..]; beyond its own an area holds its neighbours'."""
            x = jnp.pad(x, ((0, 0), (0, capacity)) + ((0, 0),) * (x.ndim - 2))
            one = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=capacity)
            parts = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(x, starts)
            return parts.reshape(batch * areas, capacity, *x.shape[2:])

        own = jnp.arange(capacity)[None, None, :] < self.counts[:, :, None]  # [B, A, capacity]
        mask = own.reshape(batch * areas, 1, 1, capacity)
        if self.mask is not None:
            padded = jnp.pad(self.mask[:, 0], ((0, 0), (0, capacity), (0, capacity)))
            sides = (capacity, capacity)
            block = jax.vmap(lambda m, at: jax.lax.dynamic_slice(m, (at, at), sides), (None, 0))
            mask = mask & jax.vmap(block)(padded, starts).reshape(batch * areas, 1, *sides)
        out = attention(*(cut(x) for x in (q, k, v)), mask=mask, backend=backend)
        out = out.reshape(batch, areas * capacity, *heads)
        area = jnp.minimum(self.area, areas - 1)
        place = jnp.arange(tokens)[None] - jnp.take_along_axis(starts, area, axis=1)
        found = _take(out, area * capacity + jnp.minimum(place, capacity - 1))
        seen = (self.area < areas)[:, :, None, None]
        return jnp.where(seen, found, jnp.zeros((), found.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowAreas:
    """The areas of a stream: over rows only, so that a tubelet's are cut the same for ever.

    Args:
        sizes: tokens of each area within a tubelet, row by row.
        scale: as in `DenseAreas`.
    """

    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})

    def attend(self, q: Array, k: Array, v: Array, sees: Array, backend: Backend) -> Array:
        """Attends within each area.

        Args:
            q: [B, S, H, K], the new tubelet's.
            k: [B, W·S, H, K], the window's.
            v: as `k`.
            sees: bool [B, 1, 1, W·S], what of it each stream may see.
            backend: see `jvjepa.attention.resolve`.

        Returns:
            [B, S, H, K].
        """
        batch, tokens = q.shape[:2]
        window = (batch, k.shape[1] // tokens, tokens)
        outputs, start = [], 0
        for size in self.sizes:
            part = slice(start, start + size)
            keys, values, seen = (
                x.reshape(*window, *rest)[:, :, part].reshape(batch, window[1] * size, *rest)
                for x, rest in ((k, k.shape[2:]), (v, v.shape[2:]), (sees, ()))
            )
            mask = seen[:, None, None, :]
            outputs.append(attention(q[:, part], keys, values, mask=mask, backend=backend))
            start += size
        return _scaled(jnp.concatenate(outputs, axis=1), self.scale)


Areas = DenseAreas | SparseAreas


@dataclasses.dataclass(frozen=True, kw_only=True)
class AreaOptions:
    """Area attention to be put into an encoder; the weights stay the same.

    Args:
        spatial_splits: areas over the rows of a token grid.
        temporal_splits: areas over the tubelets of a clip.
        layers: (start, end) of the layers that have it; None means the first three quarters.
        residual_scale: as in `EncoderConfig`.
    """

    spatial_splits: int = 2
    temporal_splits: int = 2
    layers: tuple[int, int] | None = None
    residual_scale: float = 1.0

    def of(self, config: EncoderConfig) -> EncoderConfig:
        """Returns the encoder's configuration with these areas; raises ConfigError if it cannot."""
        layers = (0, 3 * config.num_layers // 4) if self.layers is None else self.layers
        return dataclasses.replace(
            config,
            area_layers=layers,
            area_spatial_splits=self.spatial_splits,
            area_temporal_splits=self.temporal_splits,
            area_residual_scale=self.residual_scale,
        )


def parse_areas(area: str | None, layers: str | None) -> AreaOptions | None:
    """Reads area attention from the words of a command line.

    Args:
        area: SPATIALxTEMPORAL splits, "2x2"; None means that none is asked for.
        layers: START:END of the layers, "0:18"; None means the first three quarters.

    Returns:
        The areas, or None.

    Raises:
        InputError: a word is not of that form, or there are layers without splits.
    """
    if area is None:
        if layers is not None:
            raise InputError(f"--area-layers {layers} needs --area, as --area 2x2")
        return None
    splits = re.fullmatch(r"(\d+)x(\d+)", area)
    if splits is None or "0" in splits.groups():
        raise InputError(f"--area {area}; it must be SPATIALxTEMPORAL splits, as 2x2")
    spatial, temporal = map(int, splits.groups())
    if layers is None:
        return AreaOptions(spatial_splits=spatial, temporal_splits=temporal)
    ends = re.fullmatch(r"(\d+):(\d+)", layers)
    if ends is None:
        raise InputError(f"--area-layers {layers}; it must be START:END, as 0:18")
    pair = (int(ends[1]), int(ends[2]))
    return AreaOptions(spatial_splits=spatial, temporal_splits=temporal, layers=pair)


def areas(
    config: EncoderConfig,
    grid: tuple[int, int, int],
    keep: Array | None = None,
    valid: Array | None = None,
) -> Areas | None:
    """Cuts a clip into the areas of an encoder.

    Args:
        config: the encoder's.
        grid: (t, h, w) of the clip's tokens.
        keep: int [B, M], the ids of the visible tokens; None means all of the clip.
        valid: bool [B, M], False where `keep` is only padding; None means that all are valid.

    Returns:
        The areas; None where no layer has any.

    Raises:
        InputError: there are more splits than tubelets or rows.
    """
    if not config.has_areas:
        return None
    tiling = Tiling(
        grid=grid,
        temporal_splits=config.area_temporal_splits,
        spatial_splits=config.area_spatial_splits,
    )
    _check_splits("area_temporal_splits", tiling.temporal_splits, grid[0], "tubelets")
    _check_splits("area_spatial_splits", tiling.spatial_splits, grid[1], "rows of tokens")
    if keep is None:
        return DenseAreas(tiling=tiling, scale=config.area_residual_scale)
    area = tiling.area(jnp.asarray(keep))
    area = area if valid is None else jnp.where(valid, area, tiling.num_areas)
    order = jnp.argsort(area, axis=1, stable=True)
    return SparseAreas(
        tiling=tiling,
        scale=config.area_residual_scale,
        order=order,
        area=_take(area, order),
        counts=jnp.sum(area[:, None] == jnp.arange(tiling.num_areas)[None, :, None], axis=-1),
    )


def row_areas(config: EncoderConfig, grid: tuple[int, int]) -> RowAreas | None:
    """Cuts the tubelets of a stream into the areas of an encoder.

    Args:
        config: the encoder's.
        grid: (h, w) of a tubelet's tokens.

    Returns:
        The areas; None where no layer has any.

    Raises:
        InputError: the encoder has areas over time, or more splits than rows.
    """
    if not config.has_areas:
        return None
    if config.area_temporal_splits != 1:
        raise InputError(
            f"area_temporal_splits = {config.area_temporal_splits}; a stream has no last tubelet "
            "to split before, so it must be 1: areas over rows only"
        )
    tiling = Tiling(grid=(1, *grid), temporal_splits=1, spatial_splits=config.area_spatial_splits)
    _check_splits("area_spatial_splits", tiling.spatial_splits, grid[0], "rows of tokens")
    return RowAreas(sizes=tuple(tiling.sizes.tolist()), scale=config.area_residual_scale)


def _check_splits(name: str, splits: int, size: int, of: str) -> None:
    if splits > size:
        raise InputError(f"{name} = {splits}; this video has {size} {of}, so take 1 to {size}")


def _take(x: Array, places: Array) -> Array:
    """Takes from x [B, M, ..] what is at places [B, n]."""
    return jax.vmap(lambda row, at: row[at])(x, places)


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)
