"""Rotary position embedding in three axes: tubelet, row, column.

Reference: `rotate_queries_or_keys` of Meta's V-JEPA 2 (`src/models/utils/modules.py`) and V-JEPA
2.1 (`app/vjepa_2_1/models/utils/modules.py`); Hugging Face's `modeling_vjepa2.py` does as the
first.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa.config import EncoderConfig, Rope
from jvjepa.typing import Array

_BASE = 10_000.0
_INTERPOLATED_PIXELS = 256


class Layout(NamedTuple):
    """How the flat id of a token becomes its place.

    Args:
        rows: h, rows of the grid of a tubelet.
        columns: w, its columns.
        row_scale: what a row counts on the row axis.
        column_scale: what a column counts on the column axis.
    """

    rows: int
    columns: int
    row_scale: float = 1.0
    column_scale: float = 1.0


def layout(config: EncoderConfig, rows: int, columns: int) -> Layout:
    """Returns how an encoder places the tokens of a grid.

    Args:
        config: `rope_grid` says whether the grid is the input's or that of `crop_size`;
            `interpolate` scales it to the grid of 256 pixels, ends to ends (a side of one patch
            stays at 0, where Meta's code divides by 0).
        rows: h, rows of the input's grid.
        columns: w, its columns.

    Returns:
        The layout.
    """
    if config.rope_grid == "config":
        rows = columns = config.config_grid
    if not config.interpolate:
        return Layout(rows, columns)
    last = _INTERPOLATED_PIXELS // config.patch_size - 1
    return Layout(rows, columns, *(last / (n - 1) if n > 1 else 1.0 for n in (rows, columns)))


def positions(ids: Array | NDArray[np.integer], layout: Layout) -> Array:
    """Splits flat token ids into places on the axes tubelet, row, column.

    Args:
        ids: int [...], ids into the (t, h, w) grid, t slowest; of JAX or NumPy.
        layout: from `layout`.

    Returns:
        float32 [..., 3], of the same.
    """
    in_tubelet = ids % (layout.rows * layout.columns)
    tubelet = ids // (layout.rows * layout.columns)
    axes = (tubelet, in_tubelet // layout.columns, in_tubelet % layout.columns)
    tubelet, row, column = (axis.astype(jnp.float32) for axis in axes)
    scaled = (tubelet, row * layout.row_scale, column * layout.column_scale)
    return ids.__array_namespace__().stack(scaled, axis=-1)


def frequencies(head_width: int, variant: Rope) -> NDArray[np.float32]:
    """What a place adds to the angle of each channel: angles are `positions @ frequencies`.

    Args:
        head_width: K.
        variant: see `tables`.

    Returns:
        float32 [3, K]; a channel turns with one axis, or with none.
    """
    half = (head_width // 3) // 2
    each = _frequencies(half)
    each = np.tile(each, 2) if variant == "tiled" else np.repeat(each, 2)
    table = np.zeros((3, head_width), np.float32)
    for axis in range(3):
        table[axis, axis * 2 * half : (axis + 1) * 2 * half] = each
    return table


def _frequencies(half: int) -> NDArray[np.float32]:
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    return np.float32(1) / np.float32(_BASE) ** exponents


def tables(positions: Array, head_width: int, variant: Rope) -> tuple[Array, Array]:
    """Cosines and sines of every token's angles, always in float32.

    Each axis takes `a = 2·((K//3)//2)` of the K channels, in the order tubelet, row, column; the
    rest are not rotated (cosine 1, sine 0).

    Args:
        positions: float32 [..., 3] of tubelet, row, column.
        head_width: K.
        variant: "tiled" repeats the a/2 angles as a whole, `[θ0..θn, θ0..θn]`, although `rotate`
            pairs neighbouring channels: the two members of a pair turn by different angles, so
            that it is no rotation. V-JEPA 2 was trained with this slip and its weights need it.
            "interleaved" repeats each angle, `[θ0, θ0, θ1, θ1, ..]`: a true rotation (V-JEPA 2.1).

    Returns:
        cos, sin: float32 [..., K].
    """
    half = (head_width // 3) // 2
    each = jnp.asarray(_frequencies(half)).reshape((1,) * positions.ndim + (half,))
    angles = positions[..., None] * each
    if variant == "tiled":
        angles = jnp.concatenate([angles, angles], axis=-1)
    else:
        angles = jnp.repeat(angles, 2, axis=-1)
    angles = angles.reshape(*positions.shape[:-1], 6 * half)  # [..., 3a]
    rest = [(0, 0)] * (angles.ndim - 1) + [(0, head_width - 6 * half)]
    angles = jnp.pad(angles, rest)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns queries or keys: `x·cos + (-x1, x0, -x3, x2, ..)·sin`, computed in float32.

    Args:
        x: [B, N, H, K].
        cos: float32 [B or 1, N, K], from `tables`.
        sin: as `cos`.

    Returns:
        [B, N, H, K] in the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    pairs = wide.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    partner = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    turned = wide * cos[:, :, None, :] + partner * sin[:, :, None, :]
    return turned.astype(x.dtype)
