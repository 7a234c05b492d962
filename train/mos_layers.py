"""An encoder cut in two at a block: the lower part stays as it is, the upper part is trained.

    lower, upper = cut(params, config, depth)
    tokens = upper_tokens(encoder, upper, lower_tokens(encoder, lower, video, depth), grid, depth)

is what the encoder gives, and what the lower part gives can be kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder, token_grid
from jvjepa.layers import run_blocks
from jvjepa.typing import Array, Params

_NORMS = ("norm", "norms")


def cut(params: Params, config: EncoderConfig, depth: int) -> tuple[Params, Params]:
    """Divides an encoder's parameters.

    Args:
        params: the encoder's, blocks stacked.
        config: its architecture.
        depth: blocks of the lower part, 0 to L - 1.

    Returns:
        The lower part: embeddings, the first blocks, and norms of levels in them; and the upper
        part: the other blocks and norms.
    """
    blocks = params["blocks"]
    lower = {name: leaf for name, leaf in params.items() if name not in ("blocks", *_NORMS)}
    upper: dict[str, Any] = {"blocks": jax.tree.map(lambda leaf: leaf[depth:], blocks)}
    if depth:
        lower["blocks"] = jax.tree.map(lambda leaf: leaf[:depth], blocks)
    below = sum(level < depth for level in config.levels)
    if below:
        lower["norms"] = jax.tree.map(lambda leaf: leaf[:below], params["norms"])
    for name in _NORMS:
        if name in params:
            upper[name] = jax.tree.map(lambda leaf: leaf[below:], params[name])
    return lower, upper


def join(lower: Params, upper: Params) -> Params:
    """Puts the two parts of `cut` together again."""
    whole = {**lower, **upper}
    for name in lower.keys() & upper.keys():
        whole[name] = jax.tree.map(lambda *parts: jnp.concatenate(parts), lower[name], upper[name])
    return whole


class _Lower(Encoder):
    """The first blocks, without the norm after the last one."""

    def __call__(self, video: Array) -> Array:
        """Takes a clip to what its last block gives, tokens in the order of the clip."""
        patches, grid = self.embed_patches(video), token_grid(video, self.config)
        x, context = self._prepare(patches, grid, None, None, None)
        x = run_blocks(self.blocks, x, *context, self._in_areas)
        return x if context.areas is None else context.areas.restore(x)


def lower_tokens(encoder: Encoder, lower: Params, video: Array, depth: int) -> Array:
    """Runs the lower part.

    Args:
        encoder: the whole; its dtype is that of the computation.
        lower: from `cut`.
        video: float [B, T, H, W, 3], as the encoder takes it.
        depth: as in `cut`.

    Returns:
        [B, N, D], what block `depth` takes.
    """
    if not depth:
        return encoder.apply({"params": lower}, video, method="embed_patches")
    areas = _areas(encoder.config, 0, depth)
    config = dataclasses.replace(encoder.config, num_layers=depth, levels=(), area_layers=areas)
    part = _Lower(config, encoder.dtype, encoder.param_dtype, encoder.attention)
    return part.apply({"params": lower}, video)


def upper_tokens(
    encoder: Encoder, upper: Params, tokens: Array, grid: tuple[int, int], depth: int
) -> Array:
    """Runs the upper part.

    Args:
        encoder: the whole; its dtype, and what it computes anew for the gradient, count.
        upper: from `cut`.
        tokens: [B, N, D], from `lower_tokens`.
        grid: (rows, columns) of the tokens of one tubelet.
        depth: as in `cut`.

    Returns:
        [B, N, D], after the final norm.
    """
    whole = encoder.config
    config = dataclasses.replace(
        whole,
        num_layers=whole.num_layers - depth,
        levels=tuple(level - depth for level in whole.levels if level >= depth),
        area_layers=_areas(whole, depth, whole.num_layers),
        image_tokenizer=False,  # that is the lower part's
    )
    part = dataclasses.replace(encoder, config=config, scan=True)
    return part.apply({"params": upper}, tokens.astype(encoder.dtype), grid, method="encode")


def _areas(config: EncoderConfig, first: int, stop: int) -> tuple[int, int]:
    """The layers with areas among those from `first` to `stop`, counted from `first`."""
    start, end = (min(max(layer, first), stop) - first for layer in config.area_layers)
    return (start, end) if start < end else (0, 0)
