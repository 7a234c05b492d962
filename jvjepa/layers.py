"""The pieces of a transformer block."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jvjepa import rope
from jvjepa.area import Areas, RowAreas
from jvjepa.attention import Backend, attention
from jvjepa.cache import Cache, window, write
from jvjepa.config import BlockConfig
from jvjepa.dense import PRODUCT, Dense
from jvjepa.errors import ConfigError
from jvjepa.reduced import proportional_attention
from jvjepa.typing import Array, DType

_MLP_BLOCK = 1024  # tokens


def by_clips(x: Array) -> Array:
    """Keeps [B, ..] divided by clips where a mesh is set, `jax.set_mesh`, that divides a batch.

    Without it XLA may rather gather all clips than the weights that are divided over "fsdp". Axes
    that are not `AxisType.Auto` are left alone: what is divided over them, JAX knows by the types.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in ("data", "fsdp") if kinds.get(name) == AxisType.Auto)
    if not axes:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))


def normalize(x: Array, epsilon: float) -> Array:
    """Takes the last axis to mean 0 and variance 1: a LayerNorm without parameters, in float32.

    Args:
        x: [..., D].
        epsilon: added to the variance.

    Returns:
        float32 [..., D].
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def _scale_and_shift(x: Array, scale: Array, bias: Array, dtype: DType) -> Array:
    shape = (1,) * (x.ndim - 1) + scale.shape
    scale, bias = (p.astype(jnp.float32).reshape(shape) for p in (scale, bias))
    return (x * scale + bias).astype(dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32.

    `flax.linen.LayerNorm` cannot run in bfloat16 under strict dtype promotion, and its default, the
    fast variance, loses three digits.

    Args:
        epsilon: added to the variance.
        dtype: of the output.
        param_dtype: of scale and bias [D].
    """

    epsilon: float
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., D] to [..., D]."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return _scale_and_shift(normalize(x, self.epsilon), scale, bias, self.dtype)


class LevelNorms(nn.Module):
    """One LayerNorm for each level of the encoder.

    Args:
        count: levels.
        epsilon: added to the variance.
        dtype: of the output.
        param_dtype: of scale and bias [count, D].
    """

    count: int
    epsilon: float
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, level: int) -> Array:
        """Maps [..., D] to [..., D] with the norm of `level`, counted from 0."""
        shape = (self.count, x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        x = normalize(x, self.epsilon)
        return _scale_and_shift(x, scale[level], bias[level], self.dtype)


class RopeTables(NamedTuple):
    """Cosines and sines, float32 [B or 1, N, K], of `rope.tables`."""

    cos: Array
    sin: Array


class StreamPlan(NamedTuple):
    """Where one streaming step writes and what it sees; the same in every layer.

    Args:
        slot: int32 [B], the place in the ring that each stream writes.
        sees: bool [B, 1, 1, W·S], the cached tokens that each stream may see.
        query_rope: tables of the new tubelet, [B, S, K].
        key_rope: tables of the ring, [B, W·S, K].
        areas: of the layers that have areas.
    """

    slot: Array
    sees: Array
    query_rope: RopeTables
    key_rope: RopeTables
    areas: RowAreas | None


class SelfAttention(nn.Module):
    """Multi-head self-attention; over its input, or over a cache.

    Rotary positions come as tables; without them there are none.
    """

    config: BlockConfig
    dtype: DType
    param_dtype: DType
    backend: Backend

    def setup(self) -> None:
        """Declares the four projections."""
        width = self.config.hidden_size
        self.query = Dense(width, self.dtype, self.param_dtype)
        self.key = Dense(width, self.dtype, self.param_dtype)
        self.value = Dense(width, self.dtype, self.param_dtype)
        self.proj = Dense(width, self.dtype, self.param_dtype)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_width)

    def __call__(
        self,
        x: Array,
        tables: RopeTables | None,
        mask: Array | None,
        areas: Areas | None,
        in_areas: Array | None,
    ) -> Array:
        """Attends within x, [B, N, D] to [B, N, D]; over areas if `in_areas` is None or True."""
        q, k, v = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        if tables is not None:
            q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)

        def over_all(q: Array, k: Array, v: Array) -> Array:
            return attention(q, k, v, mask=mask, backend=self.backend)

        def over_areas(q: Array, k: Array, v: Array) -> Array:
            return areas.attend(q, k, v, self.backend)

        out = _attend(areas, in_areas, over_areas, over_all, q, k, v)
        return self.proj(out.reshape(x.shape))

    def proportional(
        self, x: Array, tables: RopeTables | None, sizes: Array | None
    ) -> tuple[Array, Array]:
        """Attends within x [B, M, D], whose tokens stand for `sizes` [B, M] each, None for 1.

        Returns [B, M, D], and the keys before rotation, averaged over heads, float32 [B, M, K].
        """
        q, k, v = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        metric = jnp.mean(k.astype(jnp.float32), axis=2)
        if tables is not None:
            q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)
        if sizes is None:
            out = attention(q, k, v, backend=self.backend)
        else:
            out = proportional_attention(q, k, v, sizes, self.backend)
        return self.proj(out.reshape(x.shape)), metric

    def stream(
        self, x: Array, cache: Cache, layer: Array, plan: StreamPlan, in_areas: Array | None
    ) -> tuple[Array, Cache]:
        """Writes x [B, S, D] into the ring of `layer` and attends over that ring."""
        q = rope.rotate(self._heads(self.query(x)), *plan.query_rope)
        keys = write(cache.keys, self._heads(self.key(x)), layer, plan.slot)
        values = write(cache.values, self._heads(self.value(x)), layer, plan.slot)
        k = rope.rotate(window(keys, layer, self.dtype), *plan.key_rope)

        def over_all(q: Array, k: Array, v: Array) -> Array:
            return attention(q, k, v, mask=plan.sees, backend=self.backend)

        def over_areas(q: Array, k: Array, v: Array) -> Array:
            return plan.areas.attend(q, k, v, plan.sees, self.backend)

        v = window(values, layer, self.dtype)
        out = _attend(plan.areas, in_areas, over_areas, over_all, q, k, v)
        return self.proj(out.reshape(x.shape)), Cache(keys, values)


def _attend(
    areas: Areas | RowAreas | None,
    in_areas: Array | None,
    over_areas: Callable[..., Array],
    over_all: Callable[..., Array],
    *qkv: Array,
) -> Array:
    """Over areas or over all; a loop over layers decides when it runs, by a traced `in_areas`."""
    if areas is None:
        return over_all(*qkv)
    if in_areas is None:
        return over_areas(*qkv)
    return jax.lax.cond(in_areas, over_areas, over_all, *qkv)


class MLP(nn.Module):
    """Two layers with the exact (erf) GELU between."""

    config: BlockConfig
    dtype: DType
    param_dtype: DType

    def setup(self) -> None:
        """Declares the two layers."""
        self.fc1 = Dense(self.config.mlp_dim, self.dtype, self.param_dtype)
        self.fc2 = Dense(self.config.hidden_size, self.dtype, self.param_dtype)

    def __call__(self, x: Array) -> Array:
        """Maps [B, N, D] to [B, N, D].

        On a CPU in blocks of tokens, so that the hidden layer stays in the processor's cache.
        """
        block = _MLP_BLOCK if jax.default_backend() == "cpu" else x.shape[1]
        parts = [self._block(x[:, i : i + block]) for i in range(0, x.shape[1], block)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def _block(self, x: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nn.Module):
    """A pre-norm transformer block, in the forms that a scan over layers takes."""

    config: BlockConfig
    dtype: DType
    param_dtype: DType
    backend: Backend

    def setup(self) -> None:
        """Declares the parts."""
        dtypes = (self.dtype, self.param_dtype)
        self.norm1 = LayerNorm(self.config.layer_norm_eps, *dtypes)
        self.attention = SelfAttention(self.config, *dtypes, self.backend)
        self.norm2 = LayerNorm(self.config.layer_norm_eps, *dtypes)
        self.mlp = MLP(self.config, *dtypes)

    def __call__(
        self,
        x: Array,
        in_areas: Array | None,
        tables: RopeTables | None,
        mask: Array | None,
        areas: Areas | None,
    ) -> tuple[Array, None]:
        """One layer over [B, N, D]; with areas if `in_areas` is None or True."""
        x = by_clips(x)
        x = x + self.attention(self.norm1(x), tables, mask, areas, in_areas)
        return self.feed(x), None

    def attend(
        self, x: Array, tables: RopeTables | None, sizes: Array | None
    ) -> tuple[Array, Array]:
        """The first half of a layer, and its keys; see `SelfAttention.proportional`."""
        x = by_clips(x)
        out, metric = self.attention.proportional(self.norm1(x), tables, sizes)
        return x + out, metric

    def feed(self, x: Array) -> Array:
        """The second half of a layer, [B, M, D] to [B, M, D]."""
        x = by_clips(x)
        return x + self.mlp(self.norm2(x))

    def collect(
        self,
        carry: tuple[Array, Array],
        layer: tuple[Array, Array],
        tables: RopeTables,
        mask: Array | None,
        areas: Areas | None,
    ) -> tuple[tuple[Array, Array], None]:
        """As a call with layer = (slot, in_areas); puts the output into `slot` of [n, B, N, D]."""
        x, kept = carry
        slot, in_areas = layer
        x, _ = self(x, in_areas, tables, mask, areas)
        return (x, jax.lax.dynamic_update_index_in_dim(kept, x, slot, axis=0)), None

    def stream(
        self, carry: tuple[Array, Cache], layer: tuple[Array, Array], plan: StreamPlan
    ) -> tuple[tuple[Array, Cache], None]:
        """One layer, (index, in_areas), of a step: x [B, S, D] against the cache of this layer."""
        x, cache = carry
        out, cache = self.attention.stream(self.norm1(x), cache, layer[0], plan, layer[1])
        x = x + out
        return (x + self.mlp(self.norm2(x)), cache), None


Remat = Literal["none", "block", "products"]


def make_blocks(
    config: BlockConfig,
    length: int,
    dtypes: tuple[DType, DType],
    backend: Backend,
    *,
    scan: bool,
    remat: Remat = "none",
) -> Block | list[Block]:
    """Makes the blocks of one part of a model; to be assigned in a module's `setup`.

    Args:
        config: what each block is.
        length: how many there are.
        dtypes: of the computation, and of the parameters.
        backend: the attention backend.
        scan: one loop over parameters stacked [length, ...] in all forms of `Block`, or a list.
        remat: what the gradient keeps of a call: "none" computes nothing anew; "block" keeps the
            input of each block and computes the rest anew; "products" keeps the results of the
            matrix products with weights and computes norms, GELU and attention anew.

    Returns:
        The loop or the list; `run_blocks` takes both.

    Raises:
        ConfigError: `remat` is unknown.
    """
    if remat not in get_args(Remat):
        raise ConfigError(f"remat = {remat!r}; it must be one of {get_args(Remat)}")
    part = (config, *dtypes, backend)
    kind = Block
    if remat != "none":
        # By name: a policy for products without batch axes keeps those of `chunked` attention too.
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        policy = policy if remat == "products" else None
        # In a loop nothing could be found to be computed twice anyway.
        how = {"policy": policy, "prevent_cse": not scan}
        kind = nn.remat(Block, methods=["__call__", "collect"], **how)
    if not scan:
        return [kind(*part) for _ in range(length)]
    stacked = {
        "variable_axes": {"params": 0, "lora": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": length,
    }
    over_tokens = {**stacked, "in_axes": (0, *[nn.broadcast] * 3)}
    streaming = {**stacked, "in_axes": (0, nn.broadcast)}
    methods = {"__call__": over_tokens, "collect": over_tokens, "stream": streaming}
    return nn.scan(kind, methods=methods)(*part)


def run_blocks(
    blocks: Block | list[Block],
    x: Array,
    tables: RopeTables | None,
    mask: Array | None,
    areas: Areas | None = None,
    in_areas: Sequence[bool] | None = None,
) -> Array:
    """Runs all blocks of `make_blocks`.

    Args:
        blocks: the loop or the list.
        x: [B, N, D].
        tables: rotary positions; None means none.
        mask: what may be seen, as `jvjepa.attention.attention` takes it.
        areas: areas of the clip, in whose order x, tables and mask are.
        in_areas: for each block, whether its attention is over areas; None means that none is.

    Returns:
        [B, N, D].
    """
    if not isinstance(blocks, list | tuple):
        flags = None if in_areas is None else jnp.asarray(in_areas)
        return blocks(x, flags, tables, mask, areas)[0]
    for i, block in enumerate(blocks):
        has_areas = in_areas is not None and in_areas[i]
        x, _ = block(x, None, tables, mask, areas if has_areas else None)
    return x
