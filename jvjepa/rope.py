"""Rotary position embedding in three axes: tubelet, row, column.

Reference: `rotate_queries_or_keys` of Meta's V-JEPA 2 (`src/models/utils/modules.py`) and V-JEPA
2.1 (`app/vjepa_2_1/models/utils/modules.py`); Hugging Face's `modeling_vjepa2.py` does as the
first.
"""

import jax.numpy as jnp
import numpy as np

from jvjepa.config import EncoderConfig, Rope
from jvjepa.typing import Array

_BASE = 10_000.0


def positions(ids: Array, rows: int, columns: int) -> Array:
    """Splits flat token ids into (tubelet, row, column).

    Args:
        ids: int [...], ids into the (t, h, w) grid, t slowest.
        rows: h, rows of the grid.
        columns: w, columns of the grid.

    Returns:
        float32 [..., 3].
    """
    in_tubelet = ids % (rows * columns)
    axes = (ids // (rows * columns), in_tubelet // columns, in_tubelet % columns)
    return jnp.stack(axes, axis=-1).astype(jnp.float32)


def rope_grid(config: EncoderConfig, rows: int, columns: int) -> tuple[int, int]:
    """Returns the (rows, columns) by which ids become positions: the input's, or the config's."""
    if config.rope_grid == "config":
        return config.config_grid, config.config_grid
    return rows, columns


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
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = jnp.asarray(np.float32(1) / np.float32(_BASE) ** exponents)
    angles = positions[..., None] * frequencies.reshape((1,) * positions.ndim + (half,))
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
