"""Attention by JAX's own Splash kernels for TPUs, whose scores never leave the core's memory.

They take one head, lengths that are multiples of 128, and queries that were scaled before; what is
here brings any batch, heads, lengths and masks to that form. Kernels of a TPU cannot be divided
over devices by the compiler: where a mesh is set, each device is given its own clips and heads.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec

from jvjepa.typing import Array

_LANES = 128  # lengths are multiples of it
_BLOCKS = (512, 384, 256, 128)  # queries, and keys, at a time: the largest that divides a length
_CLIP_AXES, _HEAD_AXIS = ("data", "fsdp"), "model"  # of a mesh, as `jvjepa.train.mesh` has them


def splash_attention(
    q: Array, k: Array, v: Array, mask: Array | None, *, interpret: bool = False
) -> Array:
    """Softmax(q kᵀ / √K) v, as `jvjepa.attention.attention`, which checks the inputs.

    Queries are scaled before the product, in their own dtype: exact where √K is a power of two,
    and else one more rounding. A mask that is the same in all clips and heads is skipped over in
    whole blocks of keys that nobody sees; other ones make a loop over clips, or over clips and
    heads.

    Args:
        q: [B, N, H, K].
        k: [B, M, H, K].
        v: [B, M, H, K].
        mask: bool [B or 1, 1 or H, 1 or N, M], or None; a query that sees no key gets zeros.
        interpret: run the kernels step by step in JAX, on any platform, to test them.

    Returns:
        [B, N, H, K] in the dtype of `q`.
    """
    attend = functools.partial(_attend, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v, mask)
    clips = tuple(name for name in _CLIP_AXES if name in mesh.axis_names)
    heads = _HEAD_AXIS if q.shape[2] % mesh.shape.get(_HEAD_AXIS, 1) == 0 else None
    heads = heads if _HEAD_AXIS in mesh.axis_names else None
    each = PartitionSpec(clips or None, None, heads, None)
    if mask is None:
        seen = None
    else:
        of_mask = (clips if mask.shape[0] > 1 else None, heads if mask.shape[1] > 1 else None)
        seen = PartitionSpec(*of_mask, None, None)
    # What the kernels give is known to nobody but them, so it cannot be checked.
    divided = jax.shard_map(
        attend, in_specs=(each, each, each, seen), out_specs=each, check_vma=False
    )
    return divided(q, k, v, mask)


def _attend(q: Array, k: Array, v: Array, mask: Array | None, *, interpret: bool) -> Array:
    queries, keys, width = q.shape[1], k.shape[1], q.shape[3]
    q = (q * jnp.asarray(width**-0.5, q.dtype)).swapaxes(1, 2)  # [B, H, N, K]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    one_head = functools.partial(_one_head, interpret=interpret)
    if mask is None:
        out = jax.vmap(jax.vmap(functools.partial(one_head, sees=None)))(q, k, v)
        return out.swapaxes(1, 2)
    sees_any = jnp.any(mask, axis=-1, keepdims=True)  # [B or 1, 1 or H, 1 or N, 1]
    # Who sees nothing is given all, which is finite, and then zeros.
    sees = jnp.broadcast_to(mask | ~sees_any, (*mask.shape[:2], queries, keys))
    over_clips, over_heads = (0 if size > 1 else None for size in mask.shape[:2])
    sees = sees[tuple(slice(None) if size > 1 else 0 for size in mask.shape[:2])]
    by_head = jax.vmap(one_head, in_axes=(0, 0, 0, over_heads))
    out = jax.vmap(by_head, in_axes=(0, 0, 0, over_clips))(q, k, v, sees)
    return jnp.where(sees_any, out, jnp.zeros((), out.dtype)).swapaxes(1, 2)


def _one_head(q: Array, k: Array, v: Array, sees: Array | None, *, interpret: bool) -> Array:
    """Attention of queries [N, K] over keys [M, K] that they may see, bool [N, M]."""
    queries, keys = len(q), len(k)
    more_queries, more_keys = -queries % _LANES, -keys % _LANES
    q, (k, v) = _pad(q, more_queries), (_pad(x, more_keys) for x in (k, v))
    parts = None
    if sees is not None:
        # Added queries see what the last one does, so that they ask for no other block of keys.
        sees = jnp.pad(jnp.pad(sees, ((0, more_queries), (0, 0)), "edge"), ((0, 0), (0, more_keys)))
        seen = sees[None]
    else:
        seen = kernels.MultiHeadMask([kernels.FullMask((len(q), len(k)))])
        if more_keys:
            added = jnp.asarray(jnp.arange(len(k)) >= keys, jnp.int32)
            parts = kernels.SegmentIds(q=jnp.zeros(len(q), jnp.int32), kv=added)
    kernel = kernels.make_splash_mha_single_device(
        seen, block_sizes=_blocks(len(q), len(k)), interpret=interpret
    )
    if sees is not None:  # JAX makes an array of this flag, and then asks if it is true
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel(q[None], k[None], v[None], parts)[0, :queries]


def _pad(x: Array, more: int) -> Array:
    return jnp.pad(x, ((0, more), (0, 0)))


def _blocks(queries: int, keys: int) -> kernels.BlockSizes:
    of_queries, of_keys = (
        next(size for size in _BLOCKS if length % size == 0) for length in (queries, keys)
    )
    return kernels.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_q_dq=of_queries,
        block_kv_dq=of_keys,
    )
