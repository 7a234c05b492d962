"""The loss of V-JEPA 2 and 2.1: what the teacher makes of a clip, predicted from a part of it.

Reference: `app/vjepa/train.py` and `app/vjepa_2_1/train.py` of Meta's V-JEPA 2; arXiv:2506.09985.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jvjepa.encoder import Encoder, concatenate_levels, forward_flops
from jvjepa.masks import Grid, MaskConfig, Masks, lengths, sample
from jvjepa.predictor import Modality, Predictor, predict_pairs
from jvjepa.selection import gather
from jvjepa.train.data import normalise
from jvjepa.train.losses import distance_weights, mean_absolute_error, normalized_levels, ramp
from jvjepa.typing import Array, Params


class Masking(NamedTuple):
    """A kind of mask of a fixed size.

    Args:
        config: how its blocks are drawn.
        num_context: ids of context a sample.
        num_targets: ids of target a sample.
    """

    config: MaskConfig
    num_context: int
    num_targets: int


def maskings(masks: Sequence[MaskConfig], grid: Grid, quantile: float) -> tuple[Masking, ...]:
    """Gives every kind of mask the lengths that `jvjepa.masks.lengths` proposes for a grid."""
    return tuple(Masking(mask, *lengths(mask, grid, quantile=quantile)) for mask in masks)


@dataclasses.dataclass(frozen=True)
class PredictiveLoss:
    """The loss of the clips, or of the images, of a batch.

    Of each mask it is the mean absolute error of what is predicted of the hidden tokens, plus that
    of the visible ones with a weight; of all masks the mean. Every batch has masks of its own.

    Args:
        encoder: the student's, and the teacher's.
        predictor: the student's.
        modality: what the clips are.
        grid: (t, h, w) of their tokens.
        masks: each is a pass of encoder and predictor.
        mask_index: as the predictor takes it.
        context_weight: of the error of the visible tokens, which only a predictor with
            `context_projection` has.
        context_ramp: steps between which that weight rises from 0; None has it from the start.
        distance_weighting: see `jvjepa.train.losses.distance_weights`.
    """

    encoder: Encoder
    predictor: Predictor
    modality: Modality
    grid: Grid
    masks: tuple[Masking, ...]
    mask_index: int
    context_weight: float
    context_ramp: tuple[int, int] | None
    distance_weighting: bool

    def __call__(
        self, student: Params, teacher: Params, frames: Array, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss.

        Args:
            student: {"encoder", "predictor"}.
            teacher: of an encoder; it gets no gradient.
            frames: uint8 [B, T, H, W, 3].
            step: int32 [].
            key: of the masks.

        Returns:
            The loss, float32 [], and metrics: "prediction" and "context" are the two errors;
            "spread" is the mean deviation of the targets' channels over all tokens, which nears 0
            where training collapses.
        """
        video = normalise(frames, self.encoder.dtype)
        levels = _levels(self.encoder, jax.lax.stop_gradient(teacher), video)
        targets = normalized_levels(levels)
        keys = jax.random.split(key, len(self.masks))
        masks = [
            sample(key, mask, self.grid, len(frames), num_context=context, num_targets=hidden)
            for key, (mask, context, hidden) in zip(keys, self.masks, strict=True)
        ]
        prediction, context = predictive_losses(
            *(self.encoder, self.predictor, student, video, targets, self.grid, masks),
            mask_index=self.mask_index,
            modality=self.modality,
            distance_weighting=self.distance_weighting,
        )
        metrics = {"prediction": prediction, "spread": jnp.mean(jnp.std(targets, axis=(0, 1)))}
        if context is None:
            return prediction, metrics
        weight = jnp.asarray(self.context_weight, jnp.float32)
        if self.context_ramp is not None:
            weight = weight * ramp(step, *self.context_ramp)
        return prediction + weight * context, metrics | {"context": context}

    @property
    def flops(self) -> float:
        """Operations of the matrix products of a clip, forward and backward.

        The padding of masks is computed, and so it is counted; what `remat` computes anew is not.
        """
        tokens = math.prod(self.grid)
        total = forward_flops(self.encoder.config, tokens, tokens)  # the teacher
        for _, context, targets in self.masks:
            student = forward_flops(self.encoder.config, context, context)
            total += 3 * (student + _predictor_flops(self.predictor, context, targets))
        return float(total)


def predictive_losses(
    encoder: Encoder,
    predictor: Predictor,
    params: Params,
    video: Array,
    targets: Array,
    grid: Grid,
    masks: Sequence[Masks],
    *,
    mask_index: int = 0,
    modality: Modality = "video",
    distance_weighting: bool = True,
) -> tuple[Array, Array | None]:
    """The two errors of V-JEPA's predictions, means over several masks of the same clips.

    Args:
        encoder: the student.
        predictor: the predictor.
        params: {"encoder", "predictor"}.
        video: float [B, T, H, W, 3], normalised.
        targets: float [B, N, n·D], what the teacher makes of the whole clips, normed.
        grid: (t, h, w) of the clips' tokens.
        masks: what is seen and what is hidden.
        mask_index: as the predictor takes it.
        modality: the same.
        distance_weighting: see `jvjepa.train.losses.distance_weights`.

    Returns:
        float32 [], of the hidden tokens; and of the visible ones, None without
        `context_projection`.
    """
    contexts = [
        concatenate_levels(
            _levels(encoder, params["encoder"], video, mask.context_ids, mask.context_valid)
        )
        for mask in masks
    ]
    context_ids, context_valid, target_ids, target_valid = zip(*masks, strict=True)
    outputs = predict_pairs(
        *(predictor, params["predictor"], contexts, context_ids, target_ids, grid),
        mask_index=mask_index,
        modality=modality,
        context_valid=context_valid,
        target_valid=target_valid,
    )
    predictions, seen = [], []
    for output, mask in zip(outputs, masks, strict=True):
        hidden = gather(targets, mask.target_ids, mask.target_valid)
        predictions.append(mean_absolute_error(output.targets, hidden, valid=mask.target_valid))
        if output.context is None:
            continue
        visible = gather(targets, mask.context_ids, mask.context_valid)
        weights = None
        if distance_weighting:
            ids = (mask.context_ids, mask.target_ids)
            weights = distance_weights(*ids, grid, target_valid=mask.target_valid)
        how = {"valid": mask.context_valid, "weights": weights}
        seen.append(mean_absolute_error(output.context, visible, **how))
    return sum(predictions) / len(masks), sum(seen) / len(masks) if seen else None


def _levels(encoder: Encoder, params: Params, video: Array, *keep: Array) -> Array:
    """[n, B, N, D]; n is 1 where the encoder has no levels."""
    if encoder.config.levels:
        return encoder.apply({"params": params}, video, *keep, method="levels")
    return encoder.apply({"params": params}, video, *keep)[None]


def _predictor_flops(predictor: Predictor, context: int, targets: int) -> int:
    """As `forward_flops`, of one call."""
    config, encoder_width = predictor.config, predictor.encoder.hidden_size
    width, tokens = config.hidden_size, context + targets
    inputs = config.num_levels * encoder_width
    embed = inputs * width
    if config.num_levels > 1:
        embed = (inputs + width) * encoder_width
    blocks = config.num_layers * (4 * width**2 + 2 * width * config.mlp_dim + 2 * tokens * width)
    projected = tokens if config.context_projection else targets
    return 2 * (
        context * embed + tokens * blocks + projected * width * (config.output_dim or inputs)
    )
