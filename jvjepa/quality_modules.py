"""The modules of a video-quality model.

Reference: `VJEPAModel` of QualiVision's `src/models/vjepa_model.py` (github.com/RITIK-12).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jvjepa.dense import Dense
from jvjepa.encoder import Encoder
from jvjepa.errors import ConfigError, InputError
from jvjepa.heads import Pooler
from jvjepa.layers import LayerNorm
from jvjepa.quality_config import Bounded, Feature
from jvjepa.streaming import StepOutput
from jvjepa.text import TextEncoder
from jvjepa.typing import Array, DType

SCORES = ("Traditional", "Alignment", "Aesthetic", "Temporal", "Overall")
_NORM_EPS = 1e-5  # torch's default, with which the head was trained


class MOSHead(nn.Module):
    """Three layers over the norm of both features, with the exact (erf) GELU between.

    The norm is over the two features together: a text's, of length 1, is small beside a video's.

    Args:
        hidden: widths of the two hidden layers.
        num_scores: scores that it gives.
        dropout: the share of hidden values that is left out where a call is not deterministic.
        bounded: "1-5" keeps scores between 1 and 5, with a sigmoid; None lets them be any number.
        dtype: of the computation; the norm's statistics are float32 in any case.
        param_dtype: of the parameters.
    """

    hidden: tuple[int, int] = (512, 256)
    num_scores: int = len(SCORES)
    dropout: float = 0.1
    bounded: Bounded | None = None
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self, video_feature: Array, text_feature: Array, *, deterministic: bool = True
    ) -> Array:
        """Scores videos.

        Args:
            video_feature: float [B, Dv].
            text_feature: float [B, Dt], of length 1.
            deterministic: False drops values out, with the rng "dropout".

        Returns:
            float32 [B, num_scores], in the order of `SCORES`.

        Raises:
            InputError: the features do not fit each other, or the parameters.
        """
        self._check(video_feature, text_feature)
        dtypes = (self.dtype, self.param_dtype)
        parts = [jnp.asarray(x, jnp.float32) for x in (video_feature, text_feature)]
        x = LayerNorm(_NORM_EPS, *dtypes, name="norm")(jnp.concatenate(parts, axis=-1))
        for i, width in enumerate(self.hidden, 1):
            x = jax.nn.gelu(Dense(width, *dtypes, name=f"fc{i}")(x), approximate=False)
            x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        x = Dense(self.num_scores, *dtypes, name=f"fc{len(self.hidden) + 1}")(x)
        x = x.astype(jnp.float32)
        return x if self.bounded is None else 1.0 + 4.0 * jax.nn.sigmoid(x)

    def _check(self, video: Array, text: Array) -> None:
        shapes = f"video_feature {list(video.shape)} and text_feature {list(text.shape)}"
        if video.ndim != 2 or text.ndim != 2 or len(video) != len(text):
            raise InputError(f"{shapes}; they must be [B, Dv] and [B, Dt]")
        width = video.shape[1] + text.shape[1]
        if self.has_variable("params", "norm"):
            made_for = self.get_variable("params", "norm")["scale"].shape[0]
            if made_for != width:
                raise InputError(
                    f"{shapes} have {width} channels; the head was made for {made_for}"
                )


def video_feature(tokens: Array, kind: Feature) -> Array:
    """Makes one vector of a video's tokens.

    Args:
        tokens: float [B, N, D], the encoder's, after its final norm.
        kind: "first_token" or "mean", see `QualityConfig.feature`.

    Returns:
        [B, D].

    Raises:
        ConfigError: there is no such kind, or it needs parameters.
    """
    if kind == "first_token":
        return tokens[:, 0]
    if kind == "mean":
        return jnp.mean(tokens.astype(jnp.float32), axis=1)
    raise ConfigError(f"feature = {kind!r}; it must be 'first_token' or 'mean'")


class VideoQuality(nn.Module):
    """Encoder, text encoder and head as one function of (params, video, token ids, mask).

    Its parameters are `{"encoder": .., "text": .., "head": ..}`, and "pooler" where there is one.

    Args:
        encoder: the video encoder.
        text: the text encoder.
        head: the head.
        pooler: the attentive pooler, for `feature` = "attentive"; else None.
        feature: what the head sees of a video, see `QualityConfig`.
    """

    encoder: Encoder
    text: TextEncoder
    head: MOSHead
    pooler: Pooler | None = None
    feature: Feature = "first_token"

    def __call__(
        self, video: Array, ids: Array, mask: Array, *, deterministic: bool = True
    ) -> Array:
        """Scores videos.

        Args:
            video: float [B, T, H, W, 3], ImageNet-normalised, as `jvjepa.Encoder` takes it.
            ids: int [B, M], the tokens of the prompts.
            mask: bool [B, M], False where an id is only padding.
            deterministic: as in `MOSHead`.

        Returns:
            float32 [B, 5], in the order of `SCORES`.

        Raises:
            InputError: the shape, dtype or value of an argument cannot be right.
        """
        text = self.text.embed(ids, mask)
        return self.head(self.watch(video), text, deterministic=deterministic)

    def watch(self, video: Array) -> Array:
        """Makes a video's feature: [B, T, H, W, 3] to [B, D]."""
        return self.pool(self.encoder(video))

    def pool(self, tokens: Array) -> Array:
        """Makes a feature [B, D] of the encoder's tokens [B, N, D]."""
        if self.feature == "attentive":
            return self.pooler(tokens)[:, 0]
        return video_feature(tokens, self.feature)

    def rate(self, video: Array, text_feature: Array) -> Array:
        """Scores videos, [B, T, H, W, 3], whose prompts are embedded already, [B, Dt]."""
        return self.head(self.watch(video), text_feature)

    def follow(self, output: StepOutput, text_feature: Array) -> Array:
        """Scores what a stream shows now; see `running_scores`."""
        if self.feature == "mean":
            return self.head(output.embedding, text_feature)
        return self.head(self.pool(output.tokens), text_feature)
