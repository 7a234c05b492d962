"""Scaled dot-product attention behind one function, with a choice of backends.

`chunked` maps plain matrix products over (batch, head, block of queries): its memory does not
depend on N², and on a CPU it is several times faster than the batched product. `xla` and `cudnn`
are `jax.nn.dot_product_attention`, `splash` is JAX's kernel for TPUs (`jvjepa.splash`).
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.errors import ConfigError, InputError
from jvjepa.typing import Array, DType

Backend = Literal["auto", "xla", "chunked", "cudnn", "splash"]

_QUERY_BLOCK = 512  # queries at most that `chunked` takes at a time
_MAX_BLOCK_BYTES = 1 << 28  # the largest float32 scores of one clip and block of queries
_SPAN_BLOCK = 128  # queries at most that `attention_over_spans` takes at a time
_SPAN_PARTS, _SPAN_SHARES = 8, (1, 2, 3, 4, 6, 8)  # its numbers of keys, in eighths of all of them
_NEEDS = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
_MAX_SCORE_BYTES = 1 << 30  # the largest float32 [B, H, N, M] that `auto` lets XLA make
_CUDNN_DTYPES = ("bfloat16", "float16")
_CUDNN_MAX_WIDTH = 128  # newer GPUs than the oldest that JAX supports take 256


def check_backend(backend: str) -> None:
    """Raises ConfigError unless `backend` is one of the names in `Backend`."""
    if backend not in get_args(Backend):
        raise ConfigError(f"attention = {backend!r}; it must be one of {get_args(Backend)}")


def available(platform: str) -> tuple[str, ...]:
    """Names the backends of a platform.

    Args:
        platform: as `jax.default_backend()` names it: "cpu", "gpu" or "tpu".

    Returns:
        Those in `Backend` that run there.
    """
    return tuple(
        name for name in get_args(Backend) if name not in _NEEDS or _NEEDS[name][0] == platform
    )


def check_platform(backend: Backend, platform: str) -> None:
    """Raises ConfigError where `backend` does not run on `platform`; see `available`."""
    here = available(platform)
    if backend not in here:
        names = ", ".join(here)
        raise ConfigError(
            f"attention = {backend!r} needs {_NEEDS[backend][1]}; on {platform} there are {names}"
        )


def check_cudnn(dtype: DType, head_width: int) -> None:
    """Checks what cuDNN's flash attention asks of its inputs.

    Args:
        dtype: of q, k and v.
        head_width: K.

    Raises:
        ConfigError: cuDNN cannot take them.
    """
    name = jnp.dtype(dtype).name
    if name not in _CUDNN_DTYPES:
        raise ConfigError(
            f"attention = 'cudnn' computes in {' or '.join(_CUDNN_DTYPES)}, and the model in {name}"
        )
    if head_width % 8 or head_width > _CUDNN_MAX_WIDTH:
        raise ConfigError(
            f"attention = 'cudnn' takes heads of a multiple of 8 channels up to {_CUDNN_MAX_WIDTH}"
            f", and these have {head_width}"
        )


def resolve(backend: Backend, score_shape: tuple[int, int, int, int]) -> Backend:
    """Names the backend that runs on this process's platform, `jax.default_backend()`.

    `auto` takes `chunked` on a CPU; elsewhere `xla`, and `chunked` where the float32 scores
    [B, H, N, M] would take more than 1 GiB. It never takes `cudnn`, whose results depend on the
    version of cuDNN and which not all dtypes and head widths have, nor `splash`, which nobody has
    run on a TPU yet: these are asked for by name.

    Args:
        backend: the wish.
        score_shape: (B, H, N queries, M keys).

    Returns:
        "xla", "chunked", "cudnn" or "splash".

    Raises:
        ConfigError: there is no such backend, or not on this platform.
    """
    check_backend(backend)
    platform = jax.default_backend()
    check_platform(backend, platform)
    if backend != "auto":
        return backend
    batch, heads, queries, keys = score_shape
    too_large = batch * heads * queries * keys * 4 > _MAX_SCORE_BYTES
    return "chunked" if too_large or platform == "cpu" else "xla"


def attention(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, backend: Backend = "auto"
) -> Array:
    """Softmax(q kᵀ / √K) v, the softmax in float32.

    JAX's own function lacks two gradients, and says so: `cudnn` has none under a mask where N or M
    is odd, and `xla` none in bfloat16 where dtype promotion is strict.

    Args:
        q: [B, N, H, K].
        k: [B, M, H, K], of the dtype of `q`.
        v: [B, M, H, K], of the dtype of `q`.
        mask: bool [B or 1, 1 or H, 1 or N, M], True where a query may see a key. A query that may
            see none gets zeros, and has no gradient. None means that all see all.
        backend: see `resolve`.

    Returns:
        [B, N, H, K] in the dtype of `q`.

    Raises:
        InputError: shapes or dtypes that do not fit together.
        ConfigError: there is no such backend, or it does not take these inputs.
    """
    _check_inputs(q, k, v, mask)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    chosen = resolve(backend, (batch, heads, queries, keys))
    if chosen == "chunked":
        return _chunked(q, k, v, mask)
    if chosen == "splash":
        from jvjepa.splash import splash_attention  # Pallas takes a second to import

        return splash_attention(q, k, v, mask)
    full = mask
    if chosen == "cudnn":
        check_cudnn(q.dtype, width)
        if mask is not None:  # JAX does not broadcast it for cuDNN under vmap
            full = jnp.broadcast_to(mask, (batch, heads, queries, keys))
    # JAX's own function mixes bfloat16 and float32, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(q, k, v, mask=full, implementation=chosen)
    if mask is None:
        return out
    sees_any = jnp.any(mask, axis=-1).swapaxes(1, 2)[..., None]  # [B or 1, 1 or N, 1 or H, 1]
    return jnp.where(sees_any, out, jnp.zeros((), out.dtype))


def attention_over_spans(q: Array, k: Array, v: Array, first: Array, end: Array) -> Array:
    """Attention where each query sees neighbouring keys alone, `first` to `end` - 1.

    As `chunked`, block by block of queries; and a block takes no more keys than the next of a few
    sizes above what its queries see. So it costs what is seen, wherever that lies.

    Args:
        q: [B, N, H, K].
        k: [B, M, H, K].
        v: [B, M, H, K].
        first: int32 [B, N].
        end: int32 [B, N]; a query with `end` <= `first` sees nothing and gets zeros.

    Returns:
        [B, N, H, K] in the dtype of `q`.
    """
    heads, keys = q.shape[2], k.shape[1]
    sizes = sorted({-(-keys * share // _SPAN_PARTS) for share in _SPAN_SHARES})
    places = jnp.arange(keys)

    def attend(size: int, rows: Array, k: Array, v: Array, first: Array, end: Array) -> Array:
        start = jnp.clip(jnp.min(first), 0, keys - size)
        part = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (k, v, places))
        some_k, some_v, place = part
        seen = (place[None] >= first[:, None]) & (place[None] < end[:, None])
        return _attend(rows, some_k, some_v, seen)

    def one_block(index: Array, start: Array, rows: Array, k: Array, v: Array) -> Array:
        spans = (
            jax.lax.dynamic_slice_in_dim(x[index // heads], start, len(rows)) for x in (first, end)
        )
        low, high = spans
        sees = low < high
        low = jnp.where(sees, low, keys)  # who sees nothing widens nothing
        longest = jnp.max(jnp.where(sees, high, 0)) - jnp.min(low)
        which = jnp.sum(longest > jnp.asarray(sizes[:-1], longest.dtype))
        branches = [functools.partial(attend, size) for size in sizes]
        return jax.lax.switch(which, branches, rows, k, v, low, high)

    return _map_blocks(q, k, v, _SPAN_BLOCK, one_block)


def _check_inputs(q: Array, k: Array, v: Array, mask: Array | None) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    of_q, of_k = (x.shape[:1] + x.shape[2:] for x in (q, k))  # without the length
    if q.ndim != 4 or of_q != of_k or k.shape != v.shape:
        raise InputError(f"{shapes}; they must be [B, N, H, K], [B, M, H, K] and [B, M, H, K]")
    if 0 in q.shape or 0 in k.shape:
        raise InputError(f"{shapes}; there is nothing to attend to")
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise InputError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must have the same floating dtype"
        )
    if mask is None:
        return
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    sizes = [{1, batch}, {1, heads}, {1, queries}, {keys}]
    fits = mask.ndim == 4 and all(n in of for n, of in zip(mask.shape, sizes, strict=True))
    if not fits or mask.dtype != jnp.bool_:
        raise InputError(
            f"mask is {mask.dtype} {mask.shape}; it must be bool [{batch} or 1, 1 or {heads}, "
            f"1 or {queries}, {keys}]"
        )


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    if not is_one_cpu():
        return _by_queries(q, k, v, mask)
    heads = q.shape[2]

    def one_block(index: Array, start: Array, rows: Array, k: Array, v: Array) -> Array:
        return _attend(rows, k, v, _mask_block(mask, index, heads, start, len(rows)))

    return _map_blocks(q, k, v, _QUERY_BLOCK, one_block)


def is_one_cpu() -> bool:
    """Whether a loop over clips and heads costs nothing: no other device has some of them."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _by_queries(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Maps over blocks of queries alone, of all clips and heads.

    A loop over clips or heads would bring those of all devices to each, where they are divided.
    """
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    most = max(1, min(_QUERY_BLOCK, _MAX_BLOCK_BYTES // (4 * heads * keys)))
    block = -(-queries // -(-queries // most))
    starts = np.minimum(np.arange(-(-queries // block)) * block, queries - block)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, N, K]
    attend = jax.vmap(jax.vmap(_attend))
    if mask is None:
        mask = jnp.ones((1, 1, 1, keys), bool)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def from_query(start: Array) -> Array:
        rows, seen = jax.lax.dynamic_slice_in_dim(q, start, block, axis=2), mask
        if mask.shape[2] > 1:
            seen = jax.lax.dynamic_slice_in_dim(mask, start, block, axis=2)
        return attend(rows, k, v, jnp.broadcast_to(seen, (batch, heads, *seen.shape[2:])))

    out = jax.lax.map(from_query, jnp.asarray(starts))  # [blocks, B, H, block, K]
    out = out.transpose(1, 0, 3, 2, 4)
    rest = queries - block * (len(starts) - 1)  # of the last block, which begins earlier
    whole, last = out[:, :-1], out[:, -1, block - rest :]
    return jnp.concatenate([whole.reshape(batch, -1, *out.shape[3:]), last], axis=1)


def _map_blocks(q: Array, k: Array, v: Array, most: int, one_block: Callable[..., Array]) -> Array:
    """Calls one_block(batch · H + head, first query, queries [n, K], k [M, K], v) for all queries.

    The gradient computes each block anew.
    """
    batch, queries, heads, width = q.shape
    block = -(-queries // -(-queries // most))  # even blocks: 1,152 are 3 of 384
    blocks = -(-queries // block)
    # Where they do not come out even, the last block begins a little earlier: nothing is padded.
    starts = jnp.minimum(jnp.arange(blocks) * block, queries - block)
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, -1, width) for x in (q, k, v))

    def one_head(head: tuple[Array, Array, Array, Array]) -> Array:
        index, q, k, v = head

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def from_query(start: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(q, start, block)
            return one_block(index, start, rows, k, v)

        return jax.lax.map(from_query, starts)

    out = jax.lax.map(one_head, (jnp.arange(batch * heads), q, k, v))  # [B·H, blocks, block, K]
    whole, last = out[:, :-1], out[:, -1, blocks * block - queries :]
    out = jnp.concatenate([whole.reshape(batch * heads, -1, width), last], axis=1)
    return out.reshape(batch, heads, queries, width).swapaxes(1, 2)


def _mask_block(
    mask: Array | None, index: Array, heads: int, start: Array, block: int
) -> Array | None:
    """The part [1 or block, M] of the mask for the queries from `start` of one (batch, head)."""
    if mask is None:
        return None
    place = (index // heads, index % heads, start)
    corner = [i if size > 1 else 0 for i, size in zip(place, mask.shape, strict=False)]
    rows = min(block, mask.shape[2])
    return jax.lax.dynamic_slice(mask, (*corner, 0), (1, 1, rows, mask.shape[3]))[0, 0]


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of one head: q [n, K], k and v [M, K], mask bool [1 or n, M]."""
    scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # it cancels
    if mask is not None:
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if mask is not None:
        total = jnp.where(total == 0.0, 1.0, total)
    # Dividing [n, K] instead of [n, M] leaves one pass over the scores out.
    return (out / total).astype(q.dtype)
