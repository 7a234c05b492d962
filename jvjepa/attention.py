"""Scaled dot-product attention behind one function, with a choice of backends.

`chunked` maps plain matrix products over (batch, head, block of queries): its memory does not
depend on N², and on a CPU it is several times faster than the batched product. `xla` and `cudnn`
are `jax.nn.dot_product_attention`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jvjepa.errors import ConfigError
from jvjepa.typing import Array

Backend = Literal["auto", "xla", "chunked", "cudnn"]

_QUERY_BLOCK = 512
_MAX_SCORE_BYTES = 1 << 30  # the largest float32 [B, H, N, M] that `auto` lets XLA make


def check_backend(backend: str) -> None:
    """Raises ConfigError unless `backend` is one of the names in `Backend`."""
    if backend not in get_args(Backend):
        raise ConfigError(f"attention = {backend!r}; it must be one of {get_args(Backend)}")


def resolve(backend: Backend, score_shape: tuple[int, int, int, int]) -> Backend:
    """Names the backend that runs.

    `auto` takes `chunked` on a CPU; elsewhere `xla`, and `chunked` where the float32 scores would
    take more than 1 GiB.

    Args:
        backend: the wish.
        score_shape: (B, H, N queries, M keys).

    Returns:
        "xla", "chunked" or "cudnn".

    Raises:
        ConfigError: there is no such backend.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    batch, heads, queries, keys = score_shape
    too_large = batch * heads * queries * keys * 4 > _MAX_SCORE_BYTES
    return "chunked" if too_large or jax.default_backend() == "cpu" else "xla"


def attention(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, backend: Backend = "auto"
) -> Array:
    """Softmax(q kᵀ / √K) v, the softmax in float32.

    Args:
        q: [B, N, H, K].
        k: [B, M, H, K].
        v: [B, M, H, K].
        mask: bool [B or 1, 1 or H, 1 or N, M], True where a query may see a key. A query that may
            see none gets zeros. None means that all see all.
        backend: see `resolve`.

    Returns:
        [B, N, H, K] in the dtype of `q`.

    Raises:
        ConfigError: there is no such backend.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    chosen = resolve(backend, (batch, heads, queries, keys))
    if chosen == "chunked":
        return _chunked(q, k, v, mask)
    if mask is None:
        return _fused(q, k, v, None, chosen)
    # cuDNN takes no mask that still has to be broadcast.
    full = (batch, heads if chosen == "cudnn" else mask.shape[1], queries, keys)
    out = _fused(q, k, v, jnp.broadcast_to(mask, full), chosen)
    sees_any = jnp.any(mask, axis=-1).swapaxes(1, 2)[..., None]  # [B or 1, 1 or N, 1 or H, 1]
    return jnp.where(sees_any, out, jnp.zeros((), out.dtype))


def _fused(q: Array, k: Array, v: Array, mask: Array | None, implementation: str) -> Array:
    # JAX's own function mixes bfloat16 and float32, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    batch, queries, heads, width = q.shape
    block = min(_QUERY_BLOCK, queries)
    blocks = -(-queries // block)
    padding = blocks * block - queries
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(batch, blocks, block, heads, width).transpose(
        0, 3, 1, 2, 4
    )  # [B, H, blocks, block, K]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, H, M, K]
    if mask is not None and mask.shape[2] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=True)

    def one_head(index: Array) -> Array:
        b, h = index // heads, index % heads
        head_k, head_v = k[b, h], v[b, h]

        @jax.checkpoint
        def one_block(i: Array) -> Array:
            return _attend(q[b, h, i], head_k, head_v, _mask_block(mask, b, h, i, block))

        return jax.lax.map(one_block, jnp.arange(blocks))

    out = jax.lax.map(one_head, jnp.arange(batch * heads))  # [B·H, blocks, block, K]
    out = out.reshape(batch, heads, blocks * block, width)[:, :, :queries]
    return out.swapaxes(1, 2)


def _mask_block(mask: Array | None, b: Array, h: Array, i: Array, block: int) -> Array | None:
    """The part [1 or block, M] of the mask for query block `i` of head `h` of batch row `b`."""
    if mask is None:
        return None
    rows = mask[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0]
    if rows.shape[0] == 1:
        return rows
    return jax.lax.dynamic_slice_in_dim(rows, i * block, block)


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of one head: q [n, K], k and v [M, K], mask bool [1 or n, M]."""
    scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    if mask is not None:
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if mask is not None:
        total = jnp.where(total == 0.0, 1.0, total)
    # Dividing [n, K] instead of [n, M] leaves one pass over the scores out.
    return (out / total).astype(q.dtype)
