"""The predictors of V-JEPA 2 and 2.1: from the tokens of seen places to those of hidden ones.

Reference: `VisionTransformerPredictor` of Meta's V-JEPA 2 (`src/models/predictor.py`) and 2.1
(`app/vjepa_2_1/models/predictor.py`), and `VJEPA2Predictor` of Hugging Face's
`modeling_vjepa2.py`. They sort the tokens by place and undo it afterwards; as every token sees all
others and carries its place in its rotary position, that changes nothing, and is not done here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax.numpy as jnp

from jvjepa import rope
from jvjepa.attention import Backend, check_backend
from jvjepa.config import EncoderConfig, PredictorConfig
from jvjepa.dense import Dense
from jvjepa.encoder import modality_init
from jvjepa.errors import InputError
from jvjepa.layers import MLP, LayerNorm, Remat, RopeTables, make_blocks, run_blocks
from jvjepa.selection import check_ids
from jvjepa.typing import Array, DType, Params

Grid = tuple[int, int, int]
Modality = Literal["video", "image"]


class PredictorOutput(NamedTuple):
    """What a predictor gives.

    Args:
        targets: [B, K, O], the predicted tokens of `target_ids`; O is `output_dim`, or n·D.
        context: [B, M, O], the tokens of `context_ids` through a projection of their own; None
            without `context_projection`.
    """

    targets: Array
    context: Array | None


class Predictor(nn.Module):
    """Predicts the tokens of hidden places of a clip.

    It is called with tokens that the encoder made of the seen places, in one of two ways:

    - Meta's training drops the hidden tokens before the encoder's blocks:
      `context = encoder.apply(variables, video, keep=context_ids)`.
    - Hugging Face's `VJEPA2Model` drops them behind: `tokens = encoder.apply(variables, video)`,
      `context = selection.gather(tokens, context_ids)`. Its `target_hidden_state` is
      `selection.gather(tokens, target_ids)`, and its default masks are all ids for both.

    With several levels, `context` is `concatenate_levels` of what `Encoder.levels` returns.

    Args:
        config: the architecture.
        encoder: that of the encoder whose tokens it takes.
        dtype: as the encoder's.
        param_dtype: as the encoder's.
        attention: as the encoder's.
        scan: as the encoder's.
        remat: as the encoder's.
    """

    config: PredictorConfig
    encoder: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True
    remat: Remat = "none"

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        width, inputs = config.hidden_size, config.num_levels * self.encoder.hidden_size
        if config.num_levels > 1:
            layers = dataclasses.replace(config.block, mlp_dim=self.encoder.hidden_size)
            self.embed = MLP(layers, *dtypes)
        else:
            self.embed = Dense(width, *dtypes)
        shape = (config.num_mask_tokens, width)
        self.mask_tokens = self.param("mask_tokens", nn.initializers.zeros, shape, self.param_dtype)
        if config.modality_embeddings:
            self.image_embed = self.param("image_embed", modality_init, (width,), self.param_dtype)
            self.video_embed = self.param("video_embed", modality_init, (width,), self.param_dtype)
        self.blocks = make_blocks(
            *(config.block, config.num_layers, dtypes, self.attention),
            scan=self.scan,
            remat=self.remat,
        )
        self.norm = LayerNorm(config.layer_norm_eps, *dtypes)
        self.proj = Dense(config.output_dim or inputs, *dtypes)
        if config.context_projection:
            self.proj_context = Dense(config.output_dim or inputs, *dtypes)

    def __call__(
        self,
        context: Array,
        context_ids: Array,
        target_ids: Array,
        grid: Grid,
        *,
        mask_index: int = 1,
        modality: Modality = "video",
        context_valid: Array | None = None,
        target_valid: Array | None = None,
    ) -> PredictorOutput:
        """Predicts the tokens of `target_ids` from those of `context_ids`.

        Ids count the tokens of the clip over tubelets, then rows, then columns, in any order. Ids
        outside [0, t·h·w) and, within a clip, the same id twice raise; where ids are traced, a clip
        with some outside gives NaN.

        Args:
            context: float [B, M, n·D], the encoder's tokens at `context_ids`, n levels one after
                the other in the channels.
            context_ids: int [B, M].
            target_ids: int [B, K], K at least 1.
            grid: (t, h, w), the tubelets, rows and columns of the clip's tokens; t may count
                tubelets that are still to come.
            mask_index: which of the learned mask tokens stands in for what is hidden, from 0. Meta
                trains with one for each group of clips of the same length; its code and Hugging
                Face's take 1 where nothing is said, and start again from 0 where there are fewer.
            modality: what the tokens are of; without modality embeddings (V-JEPA 2) both are the
                same.
            context_valid: bool [B, M], False where `context_ids` is only padding: nobody sees such
                a token, and what it gives means nothing. None means that all are valid.
            target_valid: bool [B, K], the same of `target_ids`.

        Returns:
            The predictions.

        Raises:
            InputError: the shape, dtype or value of an argument cannot be right.
        """
        self._check(context, grid, mask_index, modality)
        batch, seen = context.shape[:2]
        num_tokens = grid[0] * grid[1] * grid[2]
        check_ids("context_ids", context_ids, batch, num_tokens, context_valid)
        check_ids("target_ids", target_ids, batch, num_tokens, target_valid)
        _check_counts(seen, context_ids.shape[1])
        ids = [jnp.asarray(part).astype(jnp.int32) for part in (context_ids, target_ids)]
        ids = jnp.concatenate(ids, axis=1)  # [B, M + K]
        hidden = self.mask_tokens[mask_index].astype(self.dtype)[None, None]
        hidden = jnp.broadcast_to(hidden, (*target_ids.shape, hidden.shape[-1]))
        x = jnp.concatenate([self.embed(context), hidden], axis=1)
        if self.config.modality_embeddings:
            embed = self.image_embed if modality == "image" else self.video_embed
            x = x + embed.astype(self.dtype)[None, None]
        # Traced ids could not be checked; a place outside the clip must not look like one inside.
        inside = (ids >= 0) & (ids < num_tokens)
        x = jnp.where(inside[..., None], x, jnp.asarray(jnp.nan, self.dtype))
        mask = _key_mask((context_valid, context_ids), (target_valid, target_ids))
        x = run_blocks(self.blocks, x, self._tables(ids, grid), mask)
        targets = self.proj(self.norm(x[:, seen:]))
        if not self.config.context_projection:
            return PredictorOutput(targets, None)
        return PredictorOutput(targets, self.proj_context(self.norm(x[:, :seen])))

    def _tables(self, ids: Array, grid: Grid) -> RopeTables:
        how = {"rope_grid": self.config.rope_grid, "interpolate": self.config.interpolate}
        layout = rope.layout(dataclasses.replace(self.encoder, **how), *grid[1:])
        places = rope.positions(ids, layout)
        return RopeTables(*rope.tables(places, self.config.block.head_width, self.config.rope))

    def _check(self, context: Array, grid: Grid, mask_index: int, modality: Modality) -> None:
        levels, width = self.config.num_levels, self.encoder.hidden_size
        shape = tuple(context.shape)
        if len(shape) != 3 or not jnp.issubdtype(context.dtype, jnp.floating):
            right = f"float [B, M, {levels * width}]"
            raise InputError(f"context is {context.dtype} {list(shape)}; it must be {right}")
        if shape[-1] != levels * width:
            raise InputError(
                f"context has {shape[-1]} channels; this predictor takes {levels * width}: "
                f"{levels} level(s) of an encoder of width {width} (mixed parts?)"
            )
        if len(grid) != 3 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise InputError(f"grid = {grid}; it must be (t, h, w), three whole numbers above 0")
        if not 0 <= mask_index < self.config.num_mask_tokens:
            right = f"0 to {self.config.num_mask_tokens - 1}"
            raise InputError(f"mask_index = {mask_index}; this predictor has mask tokens {right}")
        if modality not in get_args(Modality):
            raise InputError(f"modality = {modality!r}; it must be one of {get_args(Modality)}")


def predict_pairs(
    predictor: Predictor,
    params: Params,
    contexts: Sequence[Array],
    context_ids: Sequence[Array],
    target_ids: Sequence[Array],
    grid: Grid,
    *,
    mask_index: int = 1,
    modality: Modality = "video",
    context_valid: Sequence[Array | None] | None = None,
    target_valid: Sequence[Array | None] | None = None,
) -> list[PredictorOutput]:
    """Predicts several pairs of masks of the same clips, one after the other.

    So do Meta's training loops: a group of clips of one length has several masks, each with a
    context of its own, and `mask_index` is the number of the group
    (`PredictorMultiSeqWrapper` in `src/utils/wrappers.py`).

    Args:
        predictor: the predictor.
        params: its parameters, `model.params["predictor"]`.
        contexts: what the encoder made of each context, float [B, M, n·D]; M may differ.
        context_ids: of each context, int [B, M].
        target_ids: what to predict from each context, int [B, K].
        grid: as in a call.
        mask_index: as in a call, the same for all.
        modality: as in a call.
        context_valid: of each context, as in a call; None means that all ids are valid.
        target_valid: of what to predict from each, likewise.

    Returns:
        The predictions for each pair.

    Raises:
        InputError: as a call, or there are not equally many of each.
    """
    lists = {"contexts": contexts, "context_ids": context_ids, "target_ids": target_ids}
    for name, valid in (("context_valid", context_valid), ("target_valid", target_valid)):
        lists[name] = [None] * len(contexts) if valid is None else valid
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) != 1:
        raise InputError(f"there are {counts}; there must be equally many")

    how = {"mask_index": mask_index, "modality": modality}
    return [
        predictor.apply({"params": params}, *pair, grid, context_valid=c, target_valid=t, **how)
        for *pair, c, t in zip(*lists.values(), strict=True)
    ]


def _check_counts(tokens: int, context_ids: int) -> None:
    if context_ids != tokens:
        raise InputError(f"context has {tokens} tokens and context_ids {context_ids} ids a clip")


def _key_mask(*parts: tuple[Array | None, Array]) -> Array | None:
    """The keys that are seen, bool [B, 1, 1, M + K], from (valid, ids) of context and targets."""
    if all(valid is None for valid, _ in parts):
        return None
    rows = [jnp.ones(ids.shape, bool) if valid is None else valid for valid, ids in parts]
    return jnp.concatenate([jnp.asarray(row) for row in rows], axis=1)[:, None, None, :]
