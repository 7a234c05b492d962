"""The V-JEPA 2 video encoder.

Reference: `VisionTransformer` of Meta's V-JEPA 2 (`src/models/vision_transformer.py`) and
`VJEPA2Encoder` of Hugging Face's `modeling_vjepa2.py`; the paper is arXiv:2506.09985.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvjepa import rope
from jvjepa.attention import Backend, check_backend
from jvjepa.config import EncoderConfig
from jvjepa.errors import InputError
from jvjepa.layers import Block, Cache, Dense, LayerNorm, RopeTables, StreamPlan
from jvjepa.typing import Array, DType


class LayerOutputs(NamedTuple):
    """What `Encoder.layers` returns.

    Args:
        tokens: [B, N, D], after the final norm.
        layers: [L+1, B, N, D]: the patch tokens, then what each block gives, before the final norm.
    """

    tokens: Array
    layers: Array


class Encoder(nn.Module):
    """Turns video into tokens.

    Its parameters hold either all blocks stacked, `{"blocks": [L, ...]}`, or each of its own,
    `{"blocks_0": ..., "blocks_1": ...}`; `stack_layers` and `unstack_layers` of `jvjepa.weights`
    convert.

    Args:
        config: the architecture.
        dtype: of the computation, float32 or bfloat16; norms' statistics, softmax and rotary
            tables are float32 in any case.
        param_dtype: of the parameters.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: run stacked blocks as one loop, which compiles once for all layers. False runs blocks
            of their own one after the other, which compiles longer and on a CPU runs faster: a
            loop there copies the weights of each layer out of the stack.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        part = (self.config, self.dtype, self.param_dtype, self.attention)
        if self.scan:
            self.blocks = _scanned(Block, self.config.num_layers)(*part)
        else:
            self.blocks = [Block(*part) for _ in range(self.config.num_layers)]
        self.patch_embed = Dense(self.config.hidden_size, self.dtype, self.param_dtype)
        self.norm = LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype)

    def __call__(
        self, video: Array, keep: Array | None = None, *, window: int | None = None
    ) -> Array:
        """Encodes a clip.

        Args:
            video: float [B, T, H, W, 3], ImageNet-normalised. T is 1 (the frame is used twice) or a
                multiple of 2; H and W are multiples of 16, not necessarily equal.
            keep: int [B, M], the ids of the tokens that the blocks see, others are dropped before
                the first block; each keeps its own position. Ids outside [0, N) raise, or give NaN
                where `keep` is traced.
            window: tubelets that a token sees: those of its own tubelet and of the window-1 before,
                none of later ones (the banded block-causal mask). None means that all see all.

        Returns:
            [B, N, D] (or [B, M, D] with `keep`), after the final norm.

        Raises:
            InputError: the shape or dtype of an argument cannot be right.
        """
        patches = self.embed_patches(video)
        return self.encode(patches, token_grid(video, self.config), keep, window=window)

    def encode(
        self,
        patches: Array,
        grid: tuple[int, int],
        keep: Array | None = None,
        *,
        window: int | None = None,
    ) -> Array:
        """Encodes a clip whose patches are embedded already.

        Args:
            patches: [B, N, D], from `embed_patches`.
            grid: (rows, columns) of the tokens of one tubelet.
            keep: as in a call.
            window: as in a call.

        Returns:
            As a call.
        """
        x, tables, mask = self._prepare(patches, grid, keep, window)
        if self.scan:
            x, _ = self.blocks(x, tables, mask)
        else:
            for block in self.blocks:
                x, _ = block(x, tables, mask)
        return self.norm(x)

    def layers(
        self, video: Array, keep: Array | None = None, *, window: int | None = None
    ) -> LayerOutputs:
        """Encodes a clip as a call does, and returns what every layer gave.

        Args:
            video: as in a call.
            keep: as in a call.
            window: as in a call.

        Returns:
            Tokens and layers; `layers[-1]` is not normed, as in Hugging Face's `hidden_states`.
        """
        patches, grid = self.embed_patches(video), token_grid(video, self.config)
        x, tables, mask = self._prepare(patches, grid, keep, window)
        if self.scan:
            last, outputs = self.blocks.keep(x, tables, mask)
            return LayerOutputs(self.norm(last), jnp.concatenate([x[None], outputs]))
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1], tables, mask)[0])
        return LayerOutputs(self.norm(outputs[-1]), jnp.stack(outputs))

    def embed_patches(self, video: Array) -> Array:
        """Cuts a clip into patches and embeds each: [B, T, H, W, 3] to [B, N, D].

        The released weights' 3-D convolution has its stride equal to its kernel, so it is this.
        """
        check_video(video, self.config)
        if video.shape[1] == 1:
            video = jnp.repeat(video, self.config.tubelet_size, axis=1)
        sides = {"p": self.config.tubelet_size, "q": self.config.patch_size}
        patches = rearrange(
            video, "b (t p) (h q) (w r) c -> b (t h w) (p q r c)", **sides, r=sides["q"]
        )
        return self.patch_embed(patches)

    def stream(self, x: Array, cache: Cache, plan: StreamPlan) -> tuple[Array, Cache]:
        """Runs all blocks on a new tubelet; `jvjepa.streaming.step` is the way to call it.

        Args:
            x: [B, S, D], the patch tokens of the tubelet.
            cache: the ring, [L, B, W, S, H, K].
            plan: where to write and what to see.

        Returns:
            tokens [B, S, D] after the final norm, and the cache with the tubelet in it.
        """
        carry = (x, cache)
        layers = jnp.arange(self.config.num_layers)
        if self.scan:
            carry, _ = self.blocks.stream(carry, layers, plan)
        else:
            for layer, block in enumerate(self.blocks):
                carry, _ = block.stream(carry, layers[layer], plan)
        x, cache = carry
        return self.norm(x), cache

    def _prepare(
        self, x: Array, grid: tuple[int, int], keep: Array | None, window: int | None
    ) -> tuple[Array, RopeTables, Array | None]:
        rows, columns = grid
        ids = jnp.arange(x.shape[1])[None]  # [1, N]
        if keep is not None:
            check_ids(keep, x.shape[0], x.shape[1])
            ids = jnp.asarray(keep)
            x = jnp.take_along_axis(x, ids[..., None], axis=1, mode="fill", fill_value=jnp.nan)
        places = rope.positions(ids, *rope.rope_grid(self.config, rows, columns))
        tables = rope.tables(places, self.config.head_width, self.config.rope)
        mask = None if window is None else banded_causal_mask(ids // (rows * columns), window)
        return x, RopeTables(*tables), mask


def token_grid(video: Array | jax.ShapeDtypeStruct, config: EncoderConfig) -> tuple[int, int]:
    """The (rows, columns) of the tokens of one tubelet of video [B, T, H, W, 3]."""
    rows, columns = (side // config.patch_size for side in video.shape[2:4])
    return rows, columns


def _scanned(block: type[Block], length: int) -> type[Block]:
    """The block as a loop over stacked parameters, in all its forms."""
    stacked = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
        "length": length,
    }
    over_tokens = {**stacked, "in_axes": nn.broadcast}
    over_layers = {**stacked, "in_axes": (0, nn.broadcast)}
    methods = {"__call__": over_tokens, "keep": over_tokens, "stream": over_layers}
    return nn.scan(block, methods=methods)


def forward_flops(config: EncoderConfig, queries: int, keys: int) -> int:
    """Counts the floating-point operations of the matrix products, patch embedding included.

    Args:
        config: the encoder's.
        queries: tokens that are encoded.
        keys: tokens that each of them sees.

    Returns:
        Operations; a multiplication and its addition are two.
    """
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width * config.mlp_dim + 2 * keys * width
    return 2 * queries * (config.patch_dim * width + config.num_layers * layer)


def banded_causal_mask(tubelets: Array, window: int) -> Array:
    """The mask under which a token sees its own tubelet and the window-1 before.

    Args:
        tubelets: int [B or 1, N], the tubelet of each token.
        window: W, at least 1.

    Returns:
        bool [B or 1, 1, N, N].

    Raises:
        InputError: the window is below 1.
    """
    if window < 1:
        raise InputError(f"window = {window}; it must be at least 1 tubelet")
    age = tubelets[:, :, None] - tubelets[:, None, :]
    return ((age >= 0) & (age < window))[:, None]


def check_video(video: Array, config: EncoderConfig) -> None:
    """Raises InputError, with the numbers that would be right, unless `video` can be encoded.

    Args:
        video: should be float [B, T, H, W, 3].
        config: gives the sizes of patch and tubelet.

    Raises:
        InputError: rank, channels, dtype or a size is wrong.
    """
    shape = tuple(video.shape)
    if len(shape) != 5:
        raise InputError(f"video has shape {shape}; it must be [B, T, H, W, 3]")
    if shape[-1] != 3:
        hint = "; this looks channels-first, move the axis of size 3 to the end"
        hint = hint if 3 in shape[1:3] else ""
        raise InputError(f"video has shape {shape}; it must be [B, T, H, W, 3]{hint}")
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise InputError(
            f"video is {video.dtype}; it must be float and ImageNet-normalised, "
            "as jvjepa.video.preprocess returns it"
        )
    frames, patch = config.tubelet_size, config.patch_size
    if shape[1] != 1 and (shape[1] == 0 or shape[1] % frames):
        near = _near(shape[1], frames)
        raise InputError(
            f"video has T = {shape[1]} frames; take 1, or a multiple of {frames}: {near}"
        )
    for name, size in zip("HW", shape[2:4], strict=True):
        if size == 0 or size % patch:
            near = _near(size, patch)
            raise InputError(f"video has {name} = {size}; take a multiple of {patch}: {near}")


def _near(size: int, unit: int) -> str:
    """The multiples of `unit` around `size`, 0 left out."""
    below = size // unit * unit
    return " or ".join(str(x) for x in (below, below + unit) if x > 0)


def check_ids(ids: Array, batch: int, num_tokens: int) -> None:
    """Raises InputError unless `ids` are int [batch, M] within [0, num_tokens).

    JAX clamps or fills out-of-range indices without a word, so values are checked here wherever
    they are known, that is outside of jit.
    """
    if ids.ndim != 2 or ids.shape[0] != batch or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"keep is {ids.dtype} {ids.shape}; it must be int [{batch}, M]")
    if isinstance(ids, jax.core.Tracer):
        return
    values = np.asarray(ids)
    if values.size and (values.min() < 0 or values.max() >= num_tokens):
        raise InputError(
            f"keep holds ids from {values.min()} to {values.max()}; "
            f"this clip has tokens 0 to {num_tokens - 1}"
        )
