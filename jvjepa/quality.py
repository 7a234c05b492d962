"""How good is a generated video, and does it show what it should? Five scores from 1 to 5.

A video encoder sees frames spread over the whole video, a text encoder reads the prompt, and a
small head makes scores of both, as QualiVision does (github.com/RITIK-12/QualiVision).

    model = load_quality("models/quality")
    pixels = read_pixels("clip.mp4", model.config)
    scores = score(model, pixels, "a cat plays the piano")  # float32 [5], in the order of SCORES
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa.clips import read_views, shown_at, with_index
from jvjepa.decoding import Index, Source
from jvjepa.errors import InputError, VideoError
from jvjepa.pictures import is_picture
from jvjepa.quality_config import HeadConfig as HeadConfig
from jvjepa.quality_config import QualityConfig as QualityConfig
from jvjepa.quality_modules import SCORES as SCORES
from jvjepa.quality_modules import MOSHead as MOSHead
from jvjepa.quality_modules import VideoQuality as VideoQuality
from jvjepa.quality_modules import video_feature as video_feature
from jvjepa.quality_weights import QualityModel as QualityModel
from jvjepa.quality_weights import load_quality as load_quality
from jvjepa.quality_weights import new_quality as new_quality
from jvjepa.quality_weights import read_quality_record as read_quality_record
from jvjepa.quality_weights import save_quality as save_quality
from jvjepa.streaming import StepOutput
from jvjepa.text import TextEncoder
from jvjepa.text_weights import TextModel
from jvjepa.typing import Array, Params

_TEXTS = 32  # prompts at a time
_LENGTHS = 32  # their lengths are multiples of this, so that few programs are compiled
_log = logging.getLogger(__name__)


def text_features(model: QualityModel | TextModel, prompts: Sequence[str]) -> Array:
    """Embeds prompts, a number of them at a time.

    A prompt that is longer than the text encoder takes is cut off, and a warning is logged.

    Args:
        model: a video-quality model, or its text encoder alone.
        prompts: one or more.

    Returns:
        float32 [n, Dt], each of length 1.

    Raises:
        InputError: there is no prompt, or one is empty.
    """
    encoder, params = (
        (model.encoder, model.params)
        if isinstance(model, TextModel)
        else (model.text, model.params["text"])
    )
    if not prompts:
        raise InputError("there is no prompt")
    found = []
    for first in range(0, len(prompts), _TEXTS):
        some = list(prompts[first : first + _TEXTS])
        ids, mask, lengths = model.tokenizer(some, multiple=_LENGTHS)
        limit = model.tokenizer.max_length
        for prompt, length in zip(some, lengths, strict=True):
            if length > limit:
                _log.warning(
                    "the prompt %r has %d tokens; the text encoder sees the first %d",
                    *(_shortened(prompt), length, limit),
                )
        found.append(_embed(encoder, params, ids, mask))
    return jnp.concatenate(found)


def frame_indices(total_frames: int, num_frames: int) -> NDArray[np.int64]:
    """Chooses frames spread over a whole video: `floor(linspace(0, total - 1, num))`.

    Args:
        total_frames: frames of the video.
        num_frames: frames to take; of a shorter video some are taken more than once.

    Returns:
        int64 [num_frames]; they never go back.

    Raises:
        InputError: a number is below 1.
    """
    for name, count in (("total_frames", total_frames), ("num_frames", num_frames)):
        if count < 1:
            raise InputError(f"{name} = {count}; it must be 1 or more")
    return np.linspace(0, total_frames - 1, num_frames).astype(np.int64)


def read_pixels(source: Source, config: QualityConfig) -> NDArray[np.float32]:
    """Reads what a video-quality model sees of a video.

    Args:
        source: a path, or the URL of a file.
        config: gives the number of frames and the size of the input.

    Returns:
        float32 [T, crop, crop, 3], as `jvjepa.video.preprocess` makes it.

    Raises:
        VideoError: the video is missing, damaged or live, or is a picture.
    """
    if is_picture(source):
        raise VideoError(f"{source}: is a picture, and the scores are of videos; give one")

    def run(index: Index) -> NDArray[np.float32]:
        times = shown_at(index, frame_indices(len(index.ticks), config.num_frames))
        return next(read_views(source, times[None], config, 1))[0]

    return with_index(source, run)


def score(model: QualityModel, pixels: NDArray[np.float32], prompt: str) -> NDArray[np.float32]:
    """Scores one video.

    Args:
        model: the model.
        pixels: float32 [T, H, W, 3], from `read_pixels`.
        prompt: what the video should show.

    Returns:
        float32 [5], in the order of `SCORES`.

    Raises:
        InputError: the prompt is empty, the pixels cannot be encoded, or a score is not finite.
    """
    return score_embedded(model, pixels, text_features(model, [prompt]))


def score_embedded(
    model: QualityModel, pixels: NDArray[np.float32], text_feature: Array
) -> NDArray[np.float32]:
    """As `score`, of a prompt that `text_features` has embedded: float32 [1, Dt]."""
    clip = jnp.asarray(pixels)[None]
    scores = np.asarray(_score(model.module, model.params, clip, text_feature)[0])
    if not np.isfinite(scores).all():
        raise InputError(f"the scores {scores.tolist()} are not finite; the weights are damaged")
    return scores


@functools.partial(jax.jit, static_argnames="module")
def running_scores(
    module: VideoQuality, params: Params, output: StepOutput, text_feature: Array
) -> Array:
    """Scores what streams show now, after one step of `jvjepa.streaming`.

    What the head sees depends on `module.feature`. "mean": the embedding of the step, which is the
    mean token of the newest tubelet, or of the window where the step was taken with pool="window".
    "first_token": the first token of the newest tubelet. "attentive": the pooler over the tokens of
    the newest tubelet. The encoder has seen the tubelets of the window and nothing after them, so
    this is not the score of the whole video, for which a head is trained: it says where a video
    gets better or worse.

    Args:
        module: `model.module`.
        params: `model.params`.
        output: of `step`, with a batch of B streams.
        text_feature: float32 [B, Dt], of their prompts.

    Returns:
        float32 [B, 5], in the order of `SCORES`.

    Raises:
        InputError: the features do not fit the head.
    """
    return module.apply({"params": params}, output, text_feature, method="follow")


@functools.partial(jax.jit, static_argnames="encoder")
def _embed(encoder: TextEncoder, params: Params, ids: Array, mask: Array) -> Array:
    return encoder.apply({"params": params}, ids, mask, method="embed")


@functools.partial(jax.jit, static_argnames="module")
def _score(module: VideoQuality, params: Params, video: Array, text_feature: Array) -> Array:
    return module.apply({"params": params}, video, text_feature, method="rate")


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
