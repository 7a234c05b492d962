"""The models once more, in operations that become few nodes of a graph that a compiler knows.

`jvjepa.encoder` is written for XLA: scanned layers, a ring that is updated in place, attention in
blocks. Here layers stand one after the other, positions are constants, attention is two products
and a softmax, and a step selects its slot of the ring instead of writing it. The weights are the
same, by their names; every export is compared with the library's own model before it is kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvjepa import gating, rope
from jvjepa.area import areas, row_areas
from jvjepa.config import ClassifierConfig, EncoderConfig
from jvjepa.encoder import token_grid
from jvjepa.layers import normalize
from jvjepa.streaming import Positions
from jvjepa.typing import Array, DType

Params = Mapping[str, Any]
CacheForm = Literal["host", "graph"]

_UNSEEN = -1e9  # added to a score in float32: its weight is exactly 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """How a graph computes.

    Args:
        dtype: of products, kernels and the cache; norms, softmax, rotations, inputs and outputs
            are float32.
        native_norm: write a LayerNorm so that jax2onnx makes one node of it.
    """

    dtype: DType = jnp.float32
    native_norm: bool = False

    def dense(self, p: Params, x: Array) -> Array:
        """Maps x to x @ kernel + bias."""
        kernel, bias = (p[name].astype(self.dtype) for name in ("kernel", "bias"))
        return jnp.matmul(x.astype(self.dtype), kernel) + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    def norm(self, p: Params, x: Array, epsilon: float) -> Array:
        """LayerNorm over the last axis, in float32."""
        x = x.astype(jnp.float32)
        scale, bias = (p[name].astype(jnp.float32) for name in ("scale", "bias"))
        if self.native_norm:
            module = nn.LayerNorm(epsilon=epsilon, use_fast_variance=True)
            return module.apply({"params": {"scale": scale, "bias": bias}}, x)
        shape = (1,) * (x.ndim - 1) + (-1,)
        return normalize(x, epsilon) * scale.reshape(shape) + bias.reshape(shape)

    def mlp(self, p: Params, x: Array) -> Array:
        """Two layers with the exact GELU between."""
        return self.dense(p["fc2"], jax.nn.gelu(self.dense(p["fc1"], x), approximate=False))

    def attend(self, q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
        """Softmax(q kᵀ + bias) v; q is scaled already.

        Args:
            q: [B, n, H, K].
            k: [B, m, H, K].
            v: as `k`.
            bias: float32 [B, 1, 1, m] or None.

        Returns:
            [B, n, H·K].
        """
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        scores = jnp.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1)).astype(jnp.float32)
        weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
        out = jnp.matmul(weights.astype(self.dtype), v.transpose(0, 2, 1, 3))
        return out.transpose(0, 2, 1, 3).reshape(-1, q.shape[1], q.shape[2] * q.shape[3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """An encoder, and perhaps the classifier on it, as functions of (params, inputs).

    Params are nested dictionaries of the arrays that `jvjepa.export.artefact.weights_of` lists.

    Args:
        config: the encoder's.
        numerics: how to compute.
    """

    config: EncoderConfig
    numerics: Numerics

    def clip(self, params: Params, video: Array) -> tuple[Array, Array]:
        """Encodes a clip.

        Args:
            params: {"encoder": ..}.
            video: float32 [B, T, H, W, 3].

        Returns:
            float32 tokens [B, N, D] after the final norm, and their mean [B, D].
        """
        tokens = self._clip(params["encoder"], video, ())[0]
        return tokens, _mean(tokens)

    def classify(self, params: Params, video: Array, classifier: ClassifierConfig) -> Array:
        """Classifies a clip: float32 logits [B, labels]."""
        levels = self._clip(params["encoder"], video, classifier.layers)
        p, numerics = params["classifier"], self.numerics
        pooler, epsilon, heads = p["pooler"], classifier.layer_norm_eps, classifier.num_heads
        x = levels[0] if len(levels) == 1 else jnp.concatenate(levels, axis=1)
        scale = (self.config.hidden_size // heads) ** -0.5
        for i in range(classifier.num_layers):
            block = pooler[f"blocks_{i}"]
            q, k, v = self._qkv(
                block["attention"], numerics.norm(block["norm1"], x, epsilon), heads
            )
            x = self._close(block, x, numerics.attend(q * scale, k, v), epsilon)
        block, query = pooler["cross_attention"], pooler["query_tokens"].astype(jnp.float32)[None]
        tokens, attention = numerics.norm(block["norm1"], x, epsilon), block["attention"]
        q = _heads(numerics.dense(attention["query"], query), heads).astype(jnp.float32) * scale
        k, v = (_heads(numerics.dense(attention[name], tokens), heads) for name in ("key", "value"))
        x = query.astype(numerics.dtype) + numerics.attend(q, k, v)
        x = x + numerics.mlp(block["mlp"], numerics.norm(block["norm2"], x, epsilon))
        return numerics.dense(p["linear"], x)[:, 0].astype(jnp.float32)

    def gate(self, params: Params, tubelet: Array, reference: Array) -> tuple[Array, Array]:
        """Compares a tubelet with one before, as `jvjepa.gating` does.

        Args:
            params: {"encoder": ..}.
            tubelet: float32 [B, 2, H, W, 3].
            reference: float32 [B, S, D], a descriptor.

        Returns:
            float32 surprise [B], 0 to 2, NaN where a pixel is not finite; and the tubelet's own
            descriptor [B, S, D].
        """
        found = self._embed(params["encoder"], tubelet).astype(jnp.float32)
        return gating.distance(found, reference), found

    def step(
        self,
        params: Params,
        tubelet: Array,
        keys: Array,
        values: Array,
        time: Array,
        *,
        positions: Positions,
        cache: CacheForm,
    ) -> tuple[Array, Array, Array, Array]:
        """Takes in one tubelet of every stream, as `jvjepa.streaming.step` does.

        Args:
            params: {"encoder": ..}.
            tubelet: float32 [B, 2, H, W, 3].
            keys: [L, B, W, S, H, K], a ring, keys before rotation.
            values: as `keys`.
            time: int32 [B], tubelets that each stream has seen; slot time % W is the new one's.
            positions: see `jvjepa.streaming.step`.
            cache: "host" gives the new tubelet's keys and values alone, [L, B, S, H, K], for the
                caller to write into the slot; "graph" gives the whole ring with them in it.

        Returns:
            float32 embedding [B, D], float32 tokens [B, S, D], and the keys and the values.
        """
        numerics, p = self.numerics, params["encoder"]
        grid = token_grid(tubelet, self.config)
        window, epsilon = keys.shape[2], self.config.layer_norm_eps
        # time % W and its like as differences: TensorRT's list has no Mod.
        slot = time - jax.lax.div(time, jnp.full_like(time, window)) * window
        slots = np.arange(window, dtype=np.int32)[None]
        age = slot[:, None] - slots  # [B, W]
        age = jnp.where(age < 0, age + window, age)
        newest = jnp.minimum(time, window - 1) if positions == "window" else time
        seen = jnp.repeat(jnp.where(age <= time[:, None], 0.0, _UNSEEN), grid[0] * grid[1], axis=1)
        bias = seen[:, None, None, :].astype(jnp.float32)
        of_query = self._stream_tables(newest[:, None], grid)
        of_keys = self._stream_tables(newest[:, None] - age, grid)
        here = (age == 0)[:, :, None, None, None]
        cut = row_areas(self.config, grid)

        x, news = self._embed(p, tubelet), ([], [])
        for i in range(self.config.num_layers):
            block = p[f"blocks_{i}"]
            q, k, v = self._qkv(block["attention"], numerics.norm(block["norm1"], x, epsilon))
            k, v = k.astype(keys.dtype), v.astype(values.dtype)
            rings = [jnp.where(here, n[:, None], ring[i]) for n, ring in ((k, keys), (v, values))]
            flat = [ring.reshape(-1, *_merged(ring)) for ring in rings]
            q, k_all = self._rotate(q, of_query) * self._scale, self._rotate(flat[0], of_keys)
            if cut is None or i not in range(*self.config.area_layers):
                out = numerics.attend(q, k_all, flat[1], bias)
            else:
                out = self._over_rows(q, k_all, flat[1], bias, cut.sizes, window)
                out = out * jnp.asarray(cut.scale, out.dtype)
            x = self._close(block, x, out, epsilon)
            for kept, new, ring in zip(news, (k, v), rings, strict=True):
                kept.append(new if cache == "host" else ring)
        tokens = numerics.norm(self._norm(p), x, epsilon)
        new_keys, new_values = (jnp.stack(kept) for kept in news)
        return _mean(tokens), tokens, new_keys, new_values

    @property
    def _scale(self) -> float:
        return self.config.head_width**-0.5

    def _clip(self, p: Params, video: Array, layers: tuple[int, ...]) -> list[Array]:
        """The normed tokens, float32 [B, N, D], of `layers`, or else of the last one."""
        numerics, epsilon = self.numerics, self.config.layer_norm_eps
        rows, columns = token_grid(video, self.config)
        x = self._embed(p, video)
        tubelets = x.shape[1] // (rows * columns)
        order = np.arange(x.shape[1])
        cut = areas(self.config, (tubelets, rows, columns))
        if cut is not None:
            order = cut.tiling.order
            x = jnp.take(x, order, axis=1)
        layout = rope.layout(self.config, rows, columns)
        tables = self._tables(rope.positions(order, layout))
        last = self.config.num_layers - 1
        kept = {}
        for i in range(self.config.num_layers):
            block = p[f"blocks_{i}"]
            q, k, v = self._qkv(block["attention"], numerics.norm(block["norm1"], x, epsilon))
            q, k = self._rotate(q, tables) * self._scale, self._rotate(k, tables)
            if cut is None or i not in range(*self.config.area_layers):
                out = numerics.attend(q, k, v)
            else:
                out = self._over_areas(q, k, v, cut.tiling.runs) * jnp.asarray(cut.scale, q.dtype)
            x = self._close(block, x, out, epsilon)
            if i in (layers or (last,)):
                tokens = numerics.norm(self._norm(p, i), x, epsilon)
                kept[i] = tokens if cut is None else jnp.take(tokens, np.argsort(order), axis=1)
        return list(kept.values())

    def _norm(self, p: Params, layer: int | None = None) -> Params:
        """The norm of a layer, counted from 0; of the last one if none is named."""
        if not self.config.levels:
            return p["norm"]
        layer = self.config.num_layers - 1 if layer is None else layer
        return p[f"norms_{self.config.levels.index(layer)}"]

    def _embed(self, p: Params, video: Array) -> Array:
        frames, side = self.config.tubelet_size, self.config.patch_size
        is_image = self.config.image_tokenizer and video.shape[1] == 1
        if video.shape[1] == 1:
            frames = 1 if is_image else frames
            video = video if is_image else jnp.repeat(video, frames, axis=1)
        rows, columns = token_grid(video, self.config)
        tubelets = video.shape[1] // frames
        # Six axes at a time, batch and tubelets as one, pixels and channels as one: LiteRT's limit.
        patches = video.reshape(-1, frames, rows, side, columns, side * 3)
        patches = patches.transpose(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, tubelets * rows * columns, frames * side * side * 3)
        if not self.config.image_tokenizer:
            return self.numerics.dense(p["patch_embed"], patches)
        tokens = self.numerics.dense(p["patch_embed_image" if is_image else "patch_embed"], patches)
        modality = p["image_embed" if is_image else "video_embed"]
        return tokens + modality.astype(tokens.dtype)[None, None]

    def _qkv(self, p: Params, x: Array, heads: int | None = None) -> tuple[Array, Array, Array]:
        heads = self.config.num_heads if heads is None else heads
        return tuple(
            _heads(self.numerics.dense(p[name], x), heads) for name in ("query", "key", "value")
        )

    def _close(self, block: Params, x: Array, out: Array, epsilon: float) -> Array:
        """What follows attention in a block."""
        numerics = self.numerics
        x = x + numerics.dense(block["attention"]["proj"], out)
        return x + numerics.mlp(block["mlp"], numerics.norm(block["norm2"], x, epsilon))

    def _over_areas(self, q: Array, k: Array, v: Array, runs: list[tuple[int, int]]) -> Array:
        """Attends within (areas, tokens of each) that lie one after the other."""
        outputs, start = [], 0
        for count, size in runs:
            stop = start + count * size
            parts = [x[:, start:stop].reshape(-1, size, *x.shape[2:]) for x in (q, k, v)]
            outputs.append(
                self.numerics.attend(*parts).reshape(-1, stop - start, self.config.hidden_size)
            )
            start = stop
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)

    def _over_rows(
        self, q: Array, k: Array, v: Array, bias: Array, sizes: tuple[int, ...], window: int
    ) -> Array:
        """Attends within the areas of a stream; k and v are [B, W·S, H, K]."""
        outputs, start = [], 0
        tokens = q.shape[1]
        seen = bias.reshape(-1, window, tokens)
        k, v = (x.reshape(-1, window, tokens, *x.shape[2:]) for x in (k, v))
        for size in sizes:
            part = slice(start, start + size)
            parts = [x[:, :, part].reshape(-1, window * size, *x.shape[3:]) for x in (k, v)]
            mask = seen[:, :, part].reshape(-1, 1, 1, window * size)
            outputs.append(self.numerics.attend(q[:, part], *parts, mask))
            start += size
        return jnp.concatenate(outputs, axis=1)

    def _tables(self, places: np.ndarray) -> tuple[Array, Array]:
        """Cosines and signed sines, float32 [1, N, 1, K], of constant places [N, 3]."""
        angles = places @ self._frequencies
        return np.cos(angles)[None, :, None], (np.sin(angles) * self._sign)[None, :, None]

    def _stream_tables(self, frames: Array, grid: tuple[int, int]) -> tuple[Array, Array]:
        """The same, [B, n·S, 1, K], of tubelets at int32 frames [B, n]."""
        tokens = np.arange(grid[0] * grid[1])
        places = rope.positions(tokens, rope.layout(self.config, *grid))
        in_tubelet = (places[:, 1:] @ self._frequencies[1:])[None, None]  # [1, 1, S, K]
        in_time = frames.astype(jnp.float32)[:, :, None, None] * self._frequencies[None, None, :1]
        angles = (in_time + in_tubelet).reshape(
            -1, frames.shape[1] * len(tokens), 1, self.config.head_width
        )
        return jnp.cos(angles), jnp.sin(angles) * self._sign[None, None, None]

    @property
    def _frequencies(self) -> np.ndarray:
        return rope.frequencies(self.config.head_width, self.config.rope)

    @property
    def _sign(self) -> np.ndarray:
        return np.resize(np.float32([-1, 1]), self.config.head_width)

    def _rotate(self, x: Array, tables: tuple[Array, Array]) -> Array:
        """As `rope.rotate`, in float32; neighbouring channels change places in one gather."""
        x = x.astype(jnp.float32)
        partner = jnp.take(x, np.arange(x.shape[-1]) ^ 1, axis=-1)
        return x * tables[0] + partner * tables[1]


def _heads(x: Array, heads: int) -> Array:
    return x.reshape(-1, x.shape[1], heads, x.shape[2] // heads)


def _merged(ring: Array) -> tuple[int, int, int]:
    """The shape of ring [B, W, S, H, K] as a sequence, without B."""
    _, window, tokens, heads, width = ring.shape
    return window * tokens, heads, width


def _mean(tokens: Array) -> Array:
    # Of a mean jax2onnx makes a node of a later opset.
    return jnp.sum(tokens, axis=1) * (1.0 / tokens.shape[1])
