"""The V-JEPA 2 and 2.1 video encoders.

Reference: `VisionTransformer` of Meta's V-JEPA 2 (`src/models/vision_transformer.py`) and 2.1
(`app/vjepa_2_1/models/vision_transformer.py`), and `VJEPA2Encoder` of Hugging Face's
`modeling_vjepa2.py`; the paper is arXiv:2506.09985.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jvjepa import rope
from jvjepa.area import Areas, areas
from jvjepa.attention import Backend, check_backend
from jvjepa.cache import Cache
from jvjepa.config import EncoderConfig
from jvjepa.dense import Dense
from jvjepa.errors import InputError
from jvjepa.layers import (
    LayerNorm,
    LevelNorms,
    Remat,
    RopeTables,
    StreamPlan,
    make_blocks,
    run_blocks,
)
from jvjepa.selection import gather
from jvjepa.typing import Array, DType

modality_init = nn.initializers.normal(stddev=1e-6)


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
    `{"blocks_0": ..., "blocks_1": ...}`; `stack_layers` and `unstack_layers` of
    `jvjepa.parameters` convert.

    Args:
        config: the architecture.
        dtype: of the computation, float32 or bfloat16; norms' statistics, softmax and rotary
            tables are float32 in any case.
        param_dtype: of the parameters.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: run stacked blocks as one loop, which compiles once for all layers. False runs blocks
            of their own one after the other, which compiles longer and on a CPU runs faster: a
            loop there copies the weights of each layer out of the stack.
        remat: what training computes anew instead of keeping it, see `jvjepa.layers.make_blocks`.
    """

    config: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True
    remat: Remat = "none"

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.patch_embed = Dense(config.hidden_size, *dtypes)
        if config.image_tokenizer:
            self.patch_embed_image = Dense(config.hidden_size, *dtypes)
            shape = (config.hidden_size,)
            self.image_embed = self.param("image_embed", modality_init, shape, self.param_dtype)
            self.video_embed = self.param("video_embed", modality_init, shape, self.param_dtype)
        self.blocks = make_blocks(
            *(config.block, config.num_layers, dtypes, self.attention),
            scan=self.scan,
            remat=self.remat,
        )
        if config.levels:
            self.norms = LevelNorms(len(config.levels), config.layer_norm_eps, *dtypes)
        else:
            self.norm = LayerNorm(config.layer_norm_eps, *dtypes)

    def __call__(
        self,
        video: Array,
        keep: Array | None = None,
        valid: Array | None = None,
        *,
        window: int | None = None,
    ) -> Array:
        """Encodes a clip.

        Args:
            video: float [B, T, H, W, 3], ImageNet-normalised. T is a multiple of 2, or 1: with an
                image tokenizer that is an image, without one the frame is used twice. H and W are
                multiples of 16, not necessarily equal.
            keep: int [B, M], the ids of the tokens that the blocks see, others are dropped before
                the first block; each keeps its own position. Ids outside [0, N) and, within a clip,
                the same id twice raise; where `keep` is traced, those outside give NaN. (To drop
                tokens after the blocks, use `jvjepa.selection.gather` on the result.)
            valid: bool [B, M], False where `keep` is only padding: nobody sees such a token, and
                what it gives means nothing. None means that all are valid.
            window: tubelets that a token sees: those of its own tubelet and of the window-1 before,
                none of later ones (the banded block-causal mask). None means that all see all.

        Returns:
            [B, N, D] (or [B, M, D] with `keep`), after the final norm.

        Raises:
            InputError: the shape, dtype or value of an argument cannot be right.
        """
        patches, grid = self.embed_patches(video), token_grid(video, self.config)
        return self.encode(patches, grid, keep, valid, window=window)

    def encode(
        self,
        patches: Array,
        grid: tuple[int, int],
        keep: Array | None = None,
        valid: Array | None = None,
        *,
        window: int | None = None,
    ) -> Array:
        """Encodes a clip whose patches are embedded already.

        Args:
            patches: [B, N, D], from `embed_patches`.
            grid: (rows, columns) of the tokens of one tubelet.
            keep: as in a call.
            valid: as in a call.
            window: as in a call.

        Returns:
            As a call.
        """
        x, context = self._prepare(patches, grid, keep, valid, window)
        x = run_blocks(self.blocks, x, *context, self._in_areas)
        return self._last_norm(x if context.areas is None else context.areas.restore(x))

    def levels(
        self,
        video: Array,
        keep: Array | None = None,
        valid: Array | None = None,
        *,
        layers: tuple[int, ...] = (),
        window: int | None = None,
    ) -> Array:
        """Encodes a clip as a call does, and returns several layers, each after its norm.

        Args:
            video: as in a call.
            keep: as in a call.
            valid: as in a call.
            layers: which layers, counted from 0, ascending: with `config.levels` some of those,
                each of which has a norm of its own, else any, through the final norm. () means all
                of `config.levels`, or the last layer.
            window: as in a call.

        Returns:
            [n, B, N, D], or [n, B, M, D] with `keep`. `concatenate_levels` makes of it what Meta's
            code calls hierarchical and the multi-level predictors take.

        Raises:
            InputError: as a call, or a layer has no norm.
        """
        with_norm = self.config.levels or tuple(range(self.config.num_layers))
        layers = layers or self.config.levels or with_norm[-1:]
        if not set(layers) <= set(with_norm) or list(layers) != sorted(set(layers)):
            right = f"ascending, and among those with a norm, {list(with_norm)}"
            raise InputError(f"layers = {layers}; they must be {right}")
        patches, grid = self.embed_patches(video), token_grid(video, self.config)
        _, _, kept = self._collect(*self._prepare(patches, grid, keep, valid, window), layers)
        if not self.config.levels:
            return self.norm(kept)
        levels = [self.config.levels.index(layer) for layer in layers]
        return jnp.stack([self.norms(x, level) for x, level in zip(kept, levels, strict=True)])

    def layers(
        self,
        video: Array,
        keep: Array | None = None,
        valid: Array | None = None,
        *,
        window: int | None = None,
    ) -> LayerOutputs:
        """Encodes a clip as a call does, and returns what every layer gave.

        Args:
            video: as in a call.
            keep: as in a call.
            valid: as in a call.
            window: as in a call.

        Returns:
            Tokens and layers; `layers[-1]` is not normed, as in Hugging Face's `hidden_states`.
        """
        patches, grid = self.embed_patches(video), token_grid(video, self.config)
        prepared = self._prepare(patches, grid, keep, valid, window)
        first, last, kept = self._collect(*prepared, range(self.config.num_layers))
        return LayerOutputs(self._last_norm(last), jnp.concatenate([first[None], kept]))

    def embed_patches(self, video: Array) -> Array:
        """Cuts a clip into patches and embeds each: [B, T, H, W, 3] to [B, N, D].

        The released weights' 3-D convolution has its stride equal to its kernel, so it is this.
        """
        check_video(video, self.config)
        is_image = self.config.image_tokenizer and video.shape[1] == 1
        if video.shape[1] == 1 and not is_image:
            video = jnp.repeat(video, self.config.tubelet_size, axis=1)
        frames, side = (1 if is_image else self.config.tubelet_size), self.config.patch_size
        pattern = "b (t p) (h q) (w r) c -> b (t h w) (p q r c)"
        patches = rearrange(video, pattern, p=frames, q=side, r=side)
        if not self.config.image_tokenizer:
            return self.patch_embed(patches)
        if self.is_initializing():  # each kind of input leaves one of the two out
            self.patch_embed_image(patches[..., : side * side * 3])
        tokens = (self.patch_embed_image if is_image else self.patch_embed)(patches)
        modality = self.image_embed if is_image else self.video_embed
        return tokens + modality.astype(self.dtype)[None, None]

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
            flags = None if self._in_areas is None else jnp.asarray(self._in_areas)
            carry, _ = self.blocks.stream(carry, (layers, flags), plan)
        else:
            full = plan._replace(areas=None)
            for i, block in enumerate(self.blocks):
                has_areas = self._in_areas is not None and self._in_areas[i]
                carry, _ = block.stream(carry, (layers[i], None), plan if has_areas else full)
        x, cache = carry
        return self._last_norm(x), cache

    def _last_norm(self, x: Array) -> Array:
        if self.config.levels:
            return self.norms(x, len(self.config.levels) - 1)
        return self.norm(x)

    @property
    def _in_areas(self) -> list[bool] | None:
        """For each layer, whether its attention is over areas; None where no layer's is."""
        if not self.config.has_areas:
            return None
        return [layer in range(*self.config.area_layers) for layer in range(self.config.num_layers)]

    def _collect(
        self, x: Array, context: "_Context", layers: Sequence[int]
    ) -> tuple[Array, Array, Array]:
        """Runs all blocks; returns x, what the last block gives, and what `layers` give.

        All are [B, N, D], the last is [n, B, N, D], and their tokens are where they were.
        """
        in_areas = self._in_areas
        if not self.scan:
            outputs = [x]
            for i, block in enumerate(self.blocks):
                has_areas = in_areas is not None and in_areas[i]
                its = context if has_areas else context._replace(areas=None)
                outputs.append(block(outputs[-1], None, *its)[0])
            last, kept = outputs[-1], jnp.stack([outputs[layer + 1] for layer in layers])
        else:
            # Every layer writes into the place of the next one that is wanted; the wanted one is
            # the last to do so. Layers after the last wanted one write into a place that is cut
            # off.
            slots = [bisect.bisect_left(layers, i) for i in range(self.config.num_layers)]
            buffer = jnp.zeros((max(slots) + 1, *x.shape), x.dtype)
            flags = None if in_areas is None else jnp.asarray(in_areas)
            scanned = (jnp.asarray(slots), flags)
            (last, buffer), _ = self.blocks.collect((x, buffer), scanned, *context)
            kept = buffer[: len(layers)]
        if context.areas is None:
            return x, last, kept
        return tuple(context.areas.restore(tokens) for tokens in (x, last, kept))

    def _prepare(
        self,
        x: Array,
        grid: tuple[int, int],
        keep: Array | None,
        valid: Array | None,
        window: int | None,
    ) -> tuple[Array, "_Context"]:
        """The tokens that the blocks take, in the order of the areas where there are any."""
        rows, columns = grid
        ids = jnp.arange(x.shape[1])[None]  # [1, N]
        tubelets = x.shape[1] // (rows * columns)
        if keep is not None:
            x, ids = gather(x, keep, valid, name="keep"), jnp.asarray(keep)
        elif valid is not None:
            raise InputError("valid is given without keep, whose padding it marks")
        cut = areas(self.config, (tubelets, rows, columns), keep, valid)
        mask = None if valid is None else jnp.asarray(valid)
        if cut is not None:
            x, ids = cut.sort(x), cut.sort(ids)
            mask = None if mask is None else cut.sort(mask)
        places = rope.positions(ids, rope.layout(self.config, rows, columns))
        tables = rope.tables(places, self.config.head_width, self.config.rope)
        mask = None if mask is None else mask[:, None, None, :]
        if window is not None:
            band = banded_causal_mask(ids // (rows * columns), window)
            mask = band if mask is None else band & mask
        cut = None if cut is None else cut.under(mask)
        return x, _Context(RopeTables(*tables), mask, cut)


class _Context(NamedTuple):
    """What every block takes besides its input."""

    tables: RopeTables
    mask: Array | None
    areas: Areas | None


def concatenate_levels(levels: Array) -> Array:
    """Puts levels one after the other into the channels: [n, B, N, D] to [B, N, n·D]."""
    return rearrange(levels, "n b t d -> b t (n d)")


def token_grid(video: Array | jax.ShapeDtypeStruct, config: EncoderConfig) -> tuple[int, int]:
    """The (rows, columns) of the tokens of one tubelet of video [B, T, H, W, 3]."""
    rows, columns = (side // config.patch_size for side in video.shape[2:4])
    return rows, columns


def forward_flops(config: EncoderConfig, queries: int, keys: int) -> int:
    """Counts the floating-point operations of the matrix products, patch embedding included.

    Args:
        config: the encoder's.
        queries: tokens that are encoded.
        keys: tokens that each of them sees; in layers with areas it sees an even share of them.

    Returns:
        Operations; a multiplication and its addition are two.
    """
    width, with_areas = config.hidden_size, config.area_layers[1] - config.area_layers[0]
    areas = config.area_temporal_splits * config.area_spatial_splits
    seen = (config.num_layers - with_areas) * keys + with_areas * keys // areas
    layers = config.num_layers * (4 * width**2 + 2 * width * config.mlp_dim) + 2 * seen * width
    return 2 * queries * (config.patch_dim * width + layers)


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
