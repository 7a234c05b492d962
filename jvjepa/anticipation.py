"""What happens next: the tokens of a clip, those predicted of the time to come, and classifiers.

Reference: `evals/action_anticipation_frozen` of Meta's V-JEPA 2: `AnticipativeWrapper` in
`modelcustom/vit_encoder_predictor_concat_ar.py`, and `AttentiveClassifier` in `models.py`.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.attention import Backend
from jvjepa.config import AnticipatorConfig, EncoderConfig
from jvjepa.dense import Dense
from jvjepa.encoder import Encoder, check_video, concatenate_levels, token_grid
from jvjepa.errors import InputError
from jvjepa.heads import Pooler
from jvjepa.predictor import Predictor
from jvjepa.typing import Array, DType, Params

FARTHEST = 60.0  # seconds; what is asked for beyond is taken for a slip, such as milliseconds


class Anticipation(NamedTuple):
    """Logits of what happens next.

    Args:
        verbs: [B, verbs], in the order of `AnticipatorConfig.verbs`; None without such a head.
        nouns: [B, nouns], likewise.
        actions: [B, actions], in the order of `AnticipatorConfig.actions`.
    """

    verbs: Array | None
    nouns: Array | None
    actions: Array


class Anticipator(nn.Module):
    """Turns the tokens of a clip and those predicted after it into logits; see `anticipate`.

    One pooler has a query for each of verbs, nouns and actions, or one alone for actions.

    Args:
        config: the architecture.
        encoder: that of the encoder whose tokens it takes.
        dtype: as the encoder's.
        param_dtype: as the encoder's.
        attention: as the encoder's.
        scan: as the encoder's.
    """

    config: AnticipatorConfig
    encoder: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True

    def setup(self) -> None:
        """Declares the parts."""
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.pooler = Pooler(
            config,
            self.encoder.hidden_size,
            *dtypes,
            self.attention,
            self.scan,
            num_queries=len(config.heads),
        )
        if config.verbs:
            self.verbs = Dense(len(config.verbs), *dtypes)
            self.nouns = Dense(len(config.nouns), *dtypes)
        self.actions = Dense(len(config.actions), *dtypes)

    def __call__(self, tokens: Array) -> Anticipation:
        """Classifies.

        Args:
            tokens: float [B, N, D], from `extended_tokens`; their order does not matter.

        Returns:
            The logits.

        Raises:
            InputError: the shape or dtype of `tokens` cannot be right.
        """
        pooled = self.pooler(tokens)  # [B, n, D]
        if not self.config.verbs:
            return Anticipation(None, None, self.actions(pooled[:, 0]))
        heads = (self.verbs, self.nouns, self.actions)
        return Anticipation(*(head(pooled[:, i]) for i, head in enumerate(heads)))


def anticipate(
    encoder: Encoder,
    predictor: Predictor,
    anticipator: Anticipator,
    params: Params,
    video: Array,
    seconds: float | Array = 1.0,
    *,
    num_steps: int = 1,
) -> Anticipation:
    """Says what happens some time after a clip.

    Meta's probes were trained with 0.25 to 1.75 seconds and tested at 1, in one step, on 32 frames
    at 8 a second.

    Args:
        encoder: the encoder, `model.encoder`.
        predictor: the predictor of the same model.
        anticipator: the anticipator of the same model.
        params: the parameters of all, `model.params`.
        video: float [B, T, H, W, 3], ImageNet-normalised, at `frames_per_second` of the
            anticipator's configuration.
        seconds: how long after the clip ends, 0 to 60, for all clips or [B]. Others raise; where
            they are traced, they give NaN. Positions are whole tubelets, so that at 8 frames a
            second 1.0 and 1.2 are the same.
        num_steps: how often the predictor runs. From the second time on it sees what it predicted
            in place of the clip's oldest tokens, at the places of before, as in Meta's code.

    Returns:
        The logits; those of the classes of each head compare by a softmax.

    Raises:
        InputError: an argument cannot be right.
    """
    ahead = _tubelets_ahead(anticipator.config, encoder.config, seconds, video)
    return _anticipate(encoder, predictor, anticipator, params, video, ahead, num_steps=num_steps)


def extended_tokens(
    encoder: Encoder,
    predictor: Predictor,
    config: AnticipatorConfig,
    params: Params,
    video: Array,
    seconds: float | Array = 1.0,
    *,
    num_steps: int = 1,
) -> Array:
    """Encodes clips and predicts what comes after them: all that an anticipator sees.

    Args:
        encoder: as in `anticipate`.
        predictor: as in `anticipate`.
        config: the anticipator's.
        params: with the parameters of encoder and predictor.
        video: as in `anticipate`.
        seconds: as in `anticipate`.
        num_steps: as in `anticipate`.

    Returns:
        [B, N + num_steps·K, D], the tokens of the clip and behind them the K = h·w·output_frames/2
        predicted ones of each step; where the encoder has levels, of the last level.

    Raises:
        InputError: as `anticipate`.
    """
    ahead = _tubelets_ahead(config, encoder.config, seconds, video)
    return _extend(encoder, predictor, config, params, video, ahead, num_steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="num_steps")
def _anticipate(
    encoder: Encoder,
    predictor: Predictor,
    anticipator: Anticipator,
    params: Params,
    video: Array,
    ahead: Array,
    *,
    num_steps: int,
) -> Anticipation:
    tokens = _extend(encoder, predictor, anticipator.config, params, video, ahead, num_steps)
    return anticipator.apply({"params": params["anticipator"]}, tokens)


def _extend(
    encoder: Encoder,
    predictor: Predictor,
    config: AnticipatorConfig,
    params: Params,
    video: Array,
    ahead: Array,
    num_steps: int,
) -> Array:
    """Extends clips by what is predicted `ahead` [B] tubelets after their ends."""
    if num_steps < 1:
        raise InputError(f"num_steps = {num_steps}; it must be 1 or more")
    variables = {"params": params["encoder"]}
    if predictor.config.num_levels == 1:
        x = encoder.apply(variables, video)
    else:
        x = concatenate_levels(encoder.apply(variables, video, method="levels"))
    rows, columns = token_grid(video, encoder.config)
    size, seen = rows * columns, x.shape[1]
    tubelets = _output_tubelets(config, encoder.config)
    context_ids = jnp.broadcast_to(jnp.arange(seen)[None], x.shape[:2])
    target_ids = seen + size * ahead[:, None] + jnp.arange(size * tubelets)[None]
    grid = (seen // size + _farthest(config, encoder.config) + tubelets, rows, columns)
    mask_index = 1 % predictor.config.num_mask_tokens
    width = encoder.config.hidden_size
    found = [x[..., -width:]]
    for _ in range(num_steps):
        variables, args = {"params": params["predictor"]}, (x, context_ids, target_ids, grid)
        predicted = predictor.apply(variables, *args, mask_index=mask_index).targets
        found.append(predicted[..., -width:])
        x = jnp.concatenate([x[:, size * tubelets :], predicted], axis=1)
    return jnp.concatenate(found, axis=1)


def _tubelets_ahead(
    config: AnticipatorConfig, encoder: EncoderConfig, seconds: float | Array, video: Array
) -> Array:
    """The whole tubelets that fit into the seconds after each clip, int32 [B]."""
    check_video(video, encoder)
    batch, frames = video.shape[:2]
    fewest = encoder.tubelet_size * _output_tubelets(config, encoder)
    if frames < fewest:
        raise InputError(f"video has T = {frames} frames; the predictor needs {fewest} or more")
    is_traced = isinstance(seconds, jax.core.Tracer)
    values = seconds if is_traced else np.asarray(seconds, np.float64)
    if values.shape not in ((), (batch,)) or not jnp.issubdtype(values.dtype, jnp.floating):
        found = f"{values.dtype} {list(values.shape)}"
        raise InputError(f"seconds is {found}; it must be a number or float [{batch}]")
    tubelets = values * config.frames_per_second / encoder.tubelet_size
    fits = (values >= 0) & (values <= FARTHEST)
    if is_traced:  # the predictor makes NaN of what lies outside its grid
        tubelets = jnp.where(fits, tubelets, _farthest(config, encoder) + 1)
        return jnp.broadcast_to(tubelets.astype(jnp.int32), (batch,))
    if not fits.all():
        raise InputError(f"seconds = {values[~fits][0]:g}; it must be 0 to {FARTHEST:g}")
    return jnp.asarray(np.broadcast_to(tubelets.astype(np.int32), (batch,)))


def _output_tubelets(config: AnticipatorConfig, encoder: EncoderConfig) -> int:
    return max(1, config.output_frames // encoder.tubelet_size)


def _farthest(config: AnticipatorConfig, encoder: EncoderConfig) -> int:
    return int(FARTHEST * config.frames_per_second / encoder.tubelet_size)
