"""The ring of keys and values that a stream keeps: as they are, or rounded to 8 bits.

A small ring holds for every token and head K values of 8 bits and one float32 scale, max|x| over
the largest value of the dtype: 127 of int8, 448 of fp8 (e4m3). What it gives back is off by at most
half a step, scale / 2, in int8, and in fp8 by 1/16 of each value, or scale / 1024 if that is more.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.errors import ConfigError
from jvjepa.typing import Array, DType

CacheDType = Literal["int8", "fp8"]
# fp8 lies in the uint8 of the same bits: XLA for CPUs would turn its own into float16, all of them.
_DTYPES = {"int8": jnp.int8, "fp8": jnp.uint8}


class SmallRing(NamedTuple):
    """Values of 8 bits and their scales.

    Args:
        values: int8, or of fp8 the uint8 of the same bits, [L, B, W, S, H, K].
        scale: float32 [L, B, W, S, H, 1].
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape


Ring = Array | SmallRing


class Cache(NamedTuple):
    """Keys before rotation, and values, of the window: [L, B, W, S, H, K] each."""

    keys: Ring
    values: Ring


def make_cache(shape: tuple[int, ...], dtype: DType, small: CacheDType | None) -> Cache:
    """Makes a cache of zeros.

    Args:
        shape: (L, B, W, S, H, K).
        dtype: of the keys and values that are kept as they are.
        small: the 8 bits to round them to, or None.

    Returns:
        The cache.

    Raises:
        ConfigError: `small` is unknown.
    """
    if small not in (None, *get_args(CacheDType)):
        raise ConfigError(f"cache = {small!r}; it must be None or one of {get_args(CacheDType)}")

    def ring() -> Ring:  # each its own buffer: the state is donated
        if small is None:
            return jnp.zeros(shape, dtype)
        scale = jnp.zeros((*shape[:-1], 1), jnp.float32)
        return SmallRing(jnp.zeros(shape, _DTYPES[small]), scale)

    return Cache(ring(), ring())


def write(ring: Ring, new: Array, layer: Array, slot: Array) -> Ring:
    """Puts a tubelet into the ring, in place where the ring is carried or donated.

    Args:
        ring: [L, B, W, S, H, K].
        new: [B, S, H, K].
        layer: int32, which layer's.
        slot: int32 [B], the place in the ring of each stream.

    Returns:
        The ring.
    """
    parts = _round(new, ring.values.dtype == jnp.int8) if isinstance(ring, SmallRing) else new
    return jax.tree.map(lambda whole, part: _put(whole, part, layer, slot), ring, parts)


def window(ring: Ring, layer: Array, dtype: DType) -> Array:
    """Takes the ring of one layer as a sequence.

    Args:
        ring: [L, B, W, S, H, K].
        layer: int32, which layer's.
        dtype: of the result, where the ring is a small one.

    Returns:
        [B, W·S, H, K].
    """
    if not isinstance(ring, SmallRing):
        return _sequence(ring, layer)
    values, scale = (_sequence(part, layer) for part in ring)
    if values.dtype != jnp.int8:
        values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    return (values.astype(jnp.float32) * scale).astype(dtype)


def _round(x: Array, to_int8: bool) -> SmallRing:
    """Rounds [B, S, H, K] to 8 bits; a token that is not finite stays so, by its scale."""
    x, most = x.astype(jnp.float32), 127 if to_int8 else 448
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, jnp.ones_like(largest), largest) * np.float32(1 / most)
    values = jnp.clip(x / scale, -most, most)
    if to_int8:
        return SmallRing(jnp.round(values).astype(jnp.int8), scale)
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8)
    return SmallRing(bits, scale)


def _put(ring: Array, new: Array, layer: Array, slot: Array) -> Array:
    for b in range(new.shape[0]):  # each stream has a slot of its own
        index = (jnp.asarray(i, jnp.int32) for i in (layer, b, slot[b], 0, 0, 0))
        ring = jax.lax.dynamic_update_slice(ring, new[None, b : b + 1, None], tuple(index))
    return ring


def _sequence(ring: Array, layer: Array) -> Array:
    window = jax.lax.dynamic_index_in_dim(ring, layer, keepdims=False)
    batch, tubelets, tokens, heads, width = window.shape
    return window.reshape(batch, tubelets * tokens, heads, width)
