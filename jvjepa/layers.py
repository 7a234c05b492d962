"""The pieces of a transformer block."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvjepa import rope
from jvjepa.attention import Backend, attention
from jvjepa.config import BlockConfig
from jvjepa.typing import Array, DType

_MLP_BLOCK = 1024  # tokens

kernel_init = nn.initializers.truncated_normal(stddev=0.02)


class Dense(nn.Module):
    """x @ kernel + bias.

    Args:
        features: output channels.
        dtype: of the computation and the output.
        param_dtype: of kernel [in, features] and bias [features].
    """

    features: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (self.features,))


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


class Cache(NamedTuple):
    """Keys before rotation, and values, of the window: [L, B, W, S, H, K] each."""

    keys: Array
    values: Array


class StreamPlan(NamedTuple):
    """Where one streaming step writes and what it sees; the same in every layer.

    Args:
        slot: int32 [B], the place in the ring that each stream writes.
        sees: bool [B, 1, 1, W·S], the cached tokens that each stream may see.
        query_rope: tables of the new tubelet, [B, S, K].
        key_rope: tables of the ring, [B, W·S, K].
    """

    slot: Array
    sees: Array
    query_rope: RopeTables
    key_rope: RopeTables


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

    def __call__(self, x: Array, tables: RopeTables | None, mask: Array | None) -> Array:
        """Attends within x: [B, N, D] to [B, N, D]."""
        q, k, v = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        if tables is not None:
            q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)
        out = attention(q, k, v, mask=mask, backend=self.backend)
        return self.proj(out.reshape(x.shape))

    def stream(self, x: Array, cache: Cache, layer: Array, plan: StreamPlan) -> tuple[Array, Cache]:
        """Writes x [B, S, D] into the ring of `layer` and attends over that ring."""
        q = rope.rotate(self._heads(self.query(x)), *plan.query_rope)
        keys = _write(cache.keys, self._heads(self.key(x)), layer, plan.slot)
        values = _write(cache.values, self._heads(self.value(x)), layer, plan.slot)
        k = rope.rotate(_window(keys, layer), *plan.key_rope)
        out = attention(q, k, _window(values, layer), mask=plan.sees, backend=self.backend)
        return self.proj(out.reshape(x.shape)), Cache(keys, values)


def _write(ring: Array, new: Array, layer: Array, slot: Array) -> Array:
    """Puts new [B, S, H, K] into ring [L, B, W, S, H, K]; in place, as the ring is carried."""
    for b in range(new.shape[0]):  # each stream has a slot of its own
        index = (layer, b, slot[b], 0, 0, 0)
        ring = jax.lax.dynamic_update_slice(ring, new[None, b : b + 1, None], index)
    return ring


def _window(ring: Array, layer: Array) -> Array:
    """The ring of one layer as a sequence: [B, W·S, H, K]."""
    window = jax.lax.dynamic_index_in_dim(ring, layer, keepdims=False)
    batch, tubelets, tokens, heads, width = window.shape
    return window.reshape(batch, tubelets * tokens, heads, width)


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
        self, x: Array, tables: RopeTables | None, mask: Array | None
    ) -> tuple[Array, None]:
        """One layer over [B, N, D]."""
        x = x + self.attention(self.norm1(x), tables, mask)
        return x + self.mlp(self.norm2(x)), None

    def collect(
        self, carry: tuple[Array, Array], slot: Array, tables: RopeTables, mask: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        """As a call, and writes the output into place `slot` of a buffer [n, B, N, D]."""
        x, kept = carry
        x, _ = self(x, tables, mask)
        return (x, jax.lax.dynamic_update_index_in_dim(kept, x, slot, axis=0)), None

    def stream(
        self, carry: tuple[Array, Cache], layer: Array, plan: StreamPlan
    ) -> tuple[tuple[Array, Cache], None]:
        """One layer of a streaming step: x [B, S, D] against the cache of this layer."""
        x, cache = carry
        out, cache = self.attention.stream(self.norm1(x), cache, layer, plan)
        x = x + out
        return (x + self.mlp(self.norm2(x)), cache), None


def make_blocks(
    config: BlockConfig, length: int, dtypes: tuple[DType, DType], backend: Backend, *, scan: bool
) -> Block | list[Block]:
    """Makes the blocks of one part of a model; to be assigned in a module's `setup`.

    Args:
        config: what each block is.
        length: how many there are.
        dtypes: of the computation, and of the parameters.
        backend: the attention backend.
        scan: one loop over parameters stacked [length, ...] in all forms of `Block`, or a list.

    Returns:
        The loop or the list; `run_blocks` takes both.
    """
    part = (config, *dtypes, backend)
    if not scan:
        return [Block(*part) for _ in range(length)]
    stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": length}
    over_tokens = {**stacked, "in_axes": nn.broadcast}
    collecting = {**stacked, "in_axes": (0, nn.broadcast, nn.broadcast)}
    streaming = {**stacked, "in_axes": (0, nn.broadcast)}
    methods = {"__call__": over_tokens, "collect": collecting, "stream": streaming}
    return nn.scan(Block, methods=methods)(*part)


def run_blocks(
    blocks: Block | list[Block], x: Array, tables: RopeTables | None, mask: Array | None
) -> Array:
    """Runs all blocks of `make_blocks` on x: [B, N, D] to [B, N, D]."""
    if not isinstance(blocks, list | tuple):
        return blocks(x, tables, mask)[0]
    for block in blocks:
        x, _ = block(x, tables, mask)
    return x
