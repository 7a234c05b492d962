"""What a model is that scores the quality of generated videos."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jvjepa.config import EncoderConfig, PoolerConfig
from jvjepa.errors import ConfigError
from jvjepa.fields import Config, build, check, check_choices, check_positive_ints
from jvjepa.text_config import TextConfig

Feature = Literal["first_token", "mean", "attentive"]
Bounded = Literal["1-5"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head that makes scores of a video's and a text's feature.

    Args:
        hidden: widths of its two hidden layers.
        dropout: the share of their values that training leaves out.
        bounded: "1-5" keeps scores between 1 and 5, with a sigmoid; None lets them be any number,
            as in QualiVision.

    Raises:
        ConfigError: a value is impossible.
    """

    hidden: tuple[int, int] = (512, 256)
    dropout: float = 0.1
    bounded: Bounded | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        pair = isinstance(self.hidden, tuple) and len(self.hidden) == 2
        pair = pair and all(type(width) is int and width > 0 for width in self.hidden)
        check(pair, self, "hidden", "a pair of whole numbers above 0")
        share = type(self.dropout) in (int, float) and 0 <= self.dropout < 1
        check(share, self, "dropout", "a number from 0 to below 1")
        check_choices(self, bounded=(None, *get_args(Bounded)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig(Config):
    """A video-quality model: a video encoder, a text encoder for the prompt, and a head.

    Args:
        encoder: the video encoder.
        text: the text encoder.
        head: the head.
        feature: what the head sees of a video: "first_token", the token of the upper left patch of
            the first tubelet, as QualiVision's checkpoints were trained (they call it CLS, which
            V-JEPA 2 does not have); "mean", the mean of all tokens; "attentive", what `pooler`
            makes of them.
        pooler: the attentive pooler; None for the other features.
        num_frames: frames that are taken of a video, spread over all of it; 1 or a multiple of the
            encoder's `tubelet_size`.

    Raises:
        ConfigError: a value is impossible, or the parts do not fit together.
    """

    encoder: EncoderConfig
    text: TextConfig
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    feature: Feature = "first_token"
    pooler: PoolerConfig | None = None
    num_frames: int = 64

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(self, "num_frames")
        tubelet = self.encoder.tubelet_size
        fits = self.num_frames == 1 or self.num_frames % tubelet == 0
        right = f"1 or a multiple of the encoder's tubelet_size, {tubelet}"
        check(fits, self, "num_frames", right)
        check_choices(self, feature=get_args(Feature))
        if self.feature != "attentive":
            check(self.pooler is None, self, "pooler", f"None for feature = {self.feature!r}")
            return
        check(self.pooler is not None, self, "pooler", "there, for feature = 'attentive'")
        width = self.encoder.hidden_size
        divides = width % self.pooler.num_heads == 0
        check(divides, self.pooler, "num_heads", f"a divisor of the encoder's width {width}")

    @property
    def crop_size(self) -> int:
        """Pixels of a side of the square input, for `jvjepa.video.preprocess`."""
        return self.encoder.crop_size

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "QualityConfig":
        """Builds the configuration from what `to_json` returned.

        Args:
            values: the JSON object.

        Returns:
            The configuration, checked.

        Raises:
            ConfigError: a field is missing, unknown or impossible.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(known - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ConfigError(f"QualityConfig: missing fields {missing}, unknown fields {unknown}")
        pooler = values["pooler"]
        return cls(
            encoder=build(EncoderConfig, values["encoder"]),
            text=build(TextConfig, values["text"]),
            head=build(HeadConfig, values["head"]),
            feature=values["feature"],
            pooler=None if pooler is None else build(PoolerConfig, pooler),
            num_frames=values["num_frames"],
        )
