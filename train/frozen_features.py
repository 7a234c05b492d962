"""Features of a frozen encoder: which are kept, and how they are computed."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange

from jvjepa import streaming
from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import ConfigError
from jvjepa.streaming import Positions
from jvjepa.train.data import ClipConfig, normalise
from jvjepa.typing import Array, Params

FeaturePool = Literal["none", "tubelet", "clip"]
Stored = Literal["float32", "float16", "bfloat16"]
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How clips are streamed, see `jvjepa.streaming`.

    Args:
        window: tubelets W that a token sees, its own included.
        positions: as in `jvjepa.streaming.step`.

    Raises:
        ConfigError: a value is impossible.
    """

    window: int = 8
    positions: Positions = "window"

    def __post_init__(self) -> None:
        """Checks every field."""
        _check(type(self.window) is int and self.window > 0, self, "window", "1 or more tubelets")
        choices = get_args(Positions)
        _check(self.positions in choices, self, "positions", f"one of {choices}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which features of a video are kept.

    Args:
        views: how clips are taken out of a video, once for every view of it. Views differ in what
            is seen (crop, flip, time), not in `num_frames`, `crop_size` and `clips`. The random
            draws of a view are always the same.
        stream: encode each clip tubelet by tubelet, causally; None encodes it as a whole.
        pool: "none" keeps all tokens, "tubelet" their mean over every tubelet, "clip" over the
            whole clip.
        layers: the encoder's layers, as in `ClassifierConfig`, whose normed tokens are put one
            after the other; () means the last layer alone.
        dtype: on disk, "float32", "float16" or "bfloat16".

    Raises:
        ConfigError: a value is impossible.
    """

    views: tuple[ClipConfig, ...] = (ClipConfig(temporal="uniform", spatial="centre"),)
    stream: StreamConfig | None = None
    pool: FeaturePool = "none"
    layers: tuple[int, ...] = ()
    dtype: Stored = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        views = isinstance(self.views, tuple) and len(self.views) > 0
        views = views and all(isinstance(view, ClipConfig) for view in self.views)
        _check(views, self, "views", "a tuple of one or more ClipConfig")
        _check(len(set(self.views)) == len(self.views), self, "views", "different from each other")
        alike = {(view.num_frames, view.crop_size, view.clips) for view in self.views}
        _check(len(alike) == 1, self, "views", "of the same num_frames, crop_size and clips")
        fits = self.stream is None or isinstance(self.stream, StreamConfig)
        _check(fits, self, "stream", "None or a StreamConfig")
        for name, kind in (("pool", FeaturePool), ("dtype", Stored)):
            choices = get_args(kind)
            _check(getattr(self, name) in choices, self, name, f"one of {choices}")
        fits = isinstance(self.layers, tuple) and all(type(i) is int for i in self.layers)
        fits = fits and list(self.layers) == sorted({i for i in self.layers if i >= 0})
        _check(fits, self, "layers", "a tuple of ascending layers, counted from 0")
        fits = self.stream is None or not self.layers
        _check(fits, self, "layers", "(), because a stream gives the last layer alone")

    @property
    def clip(self) -> ClipConfig:
        """The first view; what it says of sizes holds for all."""
        return self.views[0]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FeatureConfig":
        """Builds it from its JSON form, which `dataclasses.asdict` makes."""

        def tuples(some: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(x) if isinstance(x, list) else x for key, x in some.items()}

        views = tuple(ClipConfig(**tuples(view)) for view in values["views"])
        stream = None if values["stream"] is None else StreamConfig(**values["stream"])
        return cls(**{**tuples(values), "views": views, "stream": stream})


def _check(ok: bool, owner: object, field: str, right: str) -> None:
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}; it must be {right}")


def check_frames(encoder: EncoderConfig, config: FeatureConfig) -> None:
    """Raises ConfigError unless the encoder takes clips of that many frames."""
    frames, tubelet = config.clip.num_frames, encoder.tubelet_size
    if frames % tubelet and (frames != 1 or config.stream is not None):
        right = f"a multiple of the encoder's tubelet, {tubelet}"
        right += "" if config.stream is not None else ", or 1"
        raise ConfigError(f"ClipConfig.num_frames = {frames}; it must be {right}")


@functools.partial(jax.jit, static_argnums=(0, 2))
def encode(encoder: Encoder, params: Params, config: FeatureConfig, video: Array) -> Array:
    """Computes the features of clips.

    Args:
        encoder: the encoder.
        params: its parameters.
        config: which features; its `views` are not looked at.
        video: uint8 [B, T, H, W, 3], RGB.

    Returns:
        [B, t, n, D] in `config.dtype`, see `jvjepa.train.feature_cache.Features`.

    Raises:
        InputError: the clips or the layers do not fit the encoder.
    """
    pixels, variables = normalise(video), {"params": params}
    if config.stream is not None:
        window, positions = config.stream.window, config.stream.positions
        sides = {"height": video.shape[2], "width": video.shape[3]}
        state = streaming.init_state(encoder, video.shape[0], window, **sides)
        pattern, frames = "b (t p) h w c -> t b p h w c", encoder.config.tubelet_size
        tubelets = rearrange(pixels, pattern, p=frames)
        _, out = streaming.scan(encoder, params, state, tubelets, positions=positions)
        tokens = rearrange(out.tokens, "t b s d -> b t 1 s d")
    else:
        if config.layers:
            levels = encoder.apply(variables, pixels, method="levels", layers=config.layers)
        else:
            levels = encoder.apply(variables, pixels)[None]
        tubelets = max(1, video.shape[1] // encoder.config.tubelet_size)
        tokens = rearrange(levels, "l b (t s) d -> b t l s d", t=tubelets)
    if config.pool != "none":
        axes = (1, 3) if config.pool == "clip" else 3
        tokens = jnp.mean(tokens.astype(jnp.float32), axis=axes, keepdims=True)
    return rearrange(tokens, "b t l s d -> b t (l s) d").astype(DTYPES[config.dtype])
