"""Architectures as frozen, checked configurations, and their JSON form."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jvjepa.errors import ConfigError
from jvjepa.fields import (
    Config,
    build,
    check,
    check_bools,
    check_choices,
    check_eps,
    check_positive_ints,
)

Rope = Literal["tiled", "interleaved"]
RopeGrid = Literal["input", "config"]


def _check_heads(owner: object, width: int, num_heads: int) -> None:
    check(width % num_heads == 0, owner, "num_heads", f"a divisor of the width {width}")
    head_width = width // num_heads
    check(
        head_width % 2 == 0 and head_width >= 6,
        owner,
        "num_heads",
        f"such that the head width ({head_width}) is even and at least 6, for the rotary embedding",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A transformer block, whichever part of the model it is in.

    Args:
        hidden_size: width D of the tokens.
        num_heads: attention heads H.
        mlp_dim: width of the MLP's hidden layer.
        layer_norm_eps: epsilon of the LayerNorms.
    """

    hidden_size: int
    num_heads: int
    mlp_dim: int
    layer_norm_eps: float

    @property
    def head_width(self) -> int:
        """Channels K of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def of(cls, part: Any) -> "BlockConfig":
        """The blocks of a part of a model, whose configuration has the same fields."""
        return cls(**{field.name: getattr(part, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The video encoder.

    Args:
        hidden_size: width D of the tokens.
        num_layers: transformer blocks L.
        num_heads: attention heads H, a divisor of `hidden_size`.
        mlp_dim: width of the MLP's hidden layer.
        crop_size: pixels of a side of the square input that the weights were trained on.
        frames_per_clip: frames of the clips that the weights were trained on; inference takes any.
        patch_size: pixels of a side of a patch.
        tubelet_size: frames of a tubelet.
        layer_norm_eps: epsilon of every LayerNorm.
        rope: "tiled" (V-JEPA 2: its released weights need it, although it is not a true rotation)
            or "interleaved" (V-JEPA 2.1).
        rope_grid: where token positions come from: "input" (the true grid of the input, as Meta's
            code does) or "config" (the grid of `crop_size` whatever the input, as Hugging Face's
            code does). The two agree at `crop_size`.
        interpolate: scale the positions of rows and columns to the grid of 256 pixels, on which
            V-JEPA 2.1 was pretrained.
        image_tokenizer: single frames have a patch embedding of their own, and a learned vector
            tells images from videos (V-JEPA 2.1). Without it a single frame is used twice.
        levels: the layers, counted from 0, whose outputs have a norm of their own (V-JEPA 2.1); the
            last is the last layer. () means one norm, after the last layer.
        area_layers: (start, end), the layers with area attention, see `jvjepa.area`: start to end-1
            from 0. An empty range, (0, 0), means that all have full attention.
        area_temporal_splits: areas over the tubelets of a clip; 1 for streaming.
        area_spatial_splits: areas over the rows of a token grid.
        area_residual_scale: what attention over areas is multiplied with before its projection.

    Raises:
        ConfigError: a value is unknown or impossible.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    crop_size: int = 256
    frames_per_clip: int = 64
    patch_size: int = 16
    tubelet_size: int = 2
    layer_norm_eps: float = 1e-6
    rope: Rope = "tiled"
    rope_grid: RopeGrid = "input"
    interpolate: bool = False
    image_tokenizer: bool = False
    levels: tuple[int, ...] = ()
    area_layers: tuple[int, int] = (0, 0)
    area_temporal_splits: int = 2
    area_spatial_splits: int = 2
    area_residual_scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(
            self,
            *("hidden_size", "num_layers", "num_heads", "mlp_dim", "crop_size"),
            *("frames_per_clip", "patch_size", "tubelet_size"),
            *("area_temporal_splits", "area_spatial_splits"),
        )
        _check_heads(self, self.hidden_size, self.num_heads)
        side = f"a multiple of patch_size = {self.patch_size}"
        check(self.crop_size % self.patch_size == 0, self, "crop_size", side)
        check_eps(self)
        check_choices(self, rope=get_args(Rope), rope_grid=get_args(RopeGrid))
        check_bools(self, "interpolate", "image_tokenizer")
        check(
            not self.interpolate or self.patch_size in (14, 16),
            self,
            "interpolate",
            f"false for patch_size = {self.patch_size}; it is defined for 14 and 16",
        )
        _check_levels(self)
        _check_areas(self)

    @property
    def block(self) -> BlockConfig:
        """What its transformer blocks are."""
        return BlockConfig.of(self)

    @property
    def head_width(self) -> int:
        """Channels K of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_levels(self) -> int:
        """How many layers have a norm of their own; 1 where only the last one has."""
        return max(1, len(self.levels))

    @property
    def has_areas(self) -> bool:
        """Whether any layer has area attention."""
        return self.area_layers[0] < self.area_layers[1]

    @property
    def config_grid(self) -> int:
        """Tokens along a side of the square that `crop_size` makes."""
        return self.crop_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Pixel values of one patch: tubelet_size · patch_size² · 3."""
        return self.tubelet_size * self.patch_size**2 * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The predictor, which guesses the tokens of masked places from those of visible ones.

    Args:
        hidden_size: width of its tokens.
        num_layers: transformer blocks.
        num_heads: attention heads, a divisor of `hidden_size`.
        mlp_dim: width of the MLP's hidden layer.
        num_mask_tokens: learned mask tokens.
        layer_norm_eps: epsilon of every LayerNorm.
        rope: as the encoder's; it must be the same.
        rope_grid: as the encoder's.
        interpolate: as the encoder's, and independent of it: Meta's training scales the positions
            of the 2.1 predictors, Meta's hub does not.
        num_levels: levels of the encoder that its input holds, one after the other in the channels;
            with more than 1 a two-layer MLP takes them in (V-JEPA 2.1).
        output_dim: channels of what it predicts; None means the encoder's width times `num_levels`.
            Distilled encoders predict their teacher's width.
        context_projection: it also predicts the visible tokens, through a layer of their own
            (V-JEPA 2.1).
        modality_embeddings: a learned vector tells images from videos (V-JEPA 2.1).

    Raises:
        ConfigError: a value is impossible.
    """

    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 1536
    num_mask_tokens: int = 10
    layer_norm_eps: float = 1e-6
    rope: Rope = "tiled"
    rope_grid: RopeGrid = "input"
    interpolate: bool = False
    num_levels: int = 1
    output_dim: int | None = None
    context_projection: bool = False
    modality_embeddings: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(
            self,
            *("hidden_size", "num_layers", "num_heads", "mlp_dim", "num_mask_tokens"),
            *("num_levels",) if self.output_dim is None else ("num_levels", "output_dim"),
        )
        _check_heads(self, self.hidden_size, self.num_heads)
        check_eps(self)
        check_choices(self, rope=get_args(Rope), rope_grid=get_args(RopeGrid))
        check_bools(self, "interpolate", "context_projection", "modality_embeddings")

    @property
    def block(self) -> BlockConfig:
        """What its transformer blocks are."""
        return BlockConfig.of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionPredictorConfig:
    """The predictor of V-JEPA 2-AC, which guesses the next frame's tokens from states and actions.

    Args:
        hidden_size: width of its tokens.
        num_layers: transformer blocks.
        num_heads: attention heads, a divisor of `hidden_size`.
        mlp_dim: width of the MLP's hidden layer.
        action_dim: numbers in an action and in a state: place, rotation, gripper.
        layer_norm_eps: epsilon of every LayerNorm.

    Raises:
        ConfigError: a value is impossible.
    """

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    action_dim: int = 7
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Checks every field."""
        sizes = ("hidden_size", "num_layers", "num_heads", "mlp_dim", "action_dim")
        check_positive_ints(self, *sizes)
        _check_heads(self, self.hidden_size, self.num_heads)
        check_eps(self)

    @property
    def block(self) -> BlockConfig:
        """What its transformer blocks are."""
        return BlockConfig.of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The attentive pooler and the linear classifier on top of the encoder.

    Args:
        labels: class names, in the order of the logits.
        num_layers: self-attention blocks of the pooler, before its one cross-attention block.
        num_heads: attention heads of the pooler. Meta's probes have 16 for every encoder; Hugging
            Face's code runs them with as many as the encoder has.
        layer_norm_eps: epsilon of the pooler's LayerNorms: 1e-5 in Meta's probes, the encoder's in
            Hugging Face's code.
        layers: the encoder's layers, counted from 0, whose normed tokens the pooler sees one after
            the other, as Meta's Diving48 probes do; () means the last layer alone.
        frames_per_clip: frames of the clips that it was trained on, 1 or a multiple of the
            encoder's `tubelet_size`; None means as many as the encoder.

    Raises:
        ConfigError: a value is impossible.
    """

    labels: tuple[str, ...]
    num_layers: int = 3
    num_heads: int
    layer_norm_eps: float = 1e-6
    layers: tuple[int, ...] = ()
    frames_per_clip: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        frames = () if self.frames_per_clip is None else ("frames_per_clip",)
        check_positive_ints(self, "num_layers", "num_heads", *frames)
        check(_ascending(self.layers), self, "layers", "a tuple of ascending layers")
        strings = isinstance(self.labels, tuple) and all(isinstance(x, str) for x in self.labels)
        check(strings and len(self.labels) > 0, self, "labels", "a tuple of one or more names")
        check_eps(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolerConfig:
    """An attentive pooler without the classifier that it was trained with, see `jvjepa.heads`.

    Args:
        num_layers: self-attention blocks, before its one cross-attention block.
        num_heads: attention heads, a divisor of the encoder's width.
        layer_norm_eps: epsilon of its LayerNorms.

    Raises:
        ConfigError: a value is impossible.
    """

    num_layers: int = 3
    num_heads: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(self, "num_layers", "num_heads")
        check_eps(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnticipatorConfig:
    """The attentive pooler and the classifiers of the actions to come, which also see predictions.

    Args:
        actions: class names, in the order of the logits.
        verbs, nouns: those of classifiers of their own; () where there are none.
        num_layers, num_heads, layer_norm_eps: as in `ClassifierConfig`.
        frames_per_clip, frames_per_second: of the clips that it was trained on.
        output_frames: frames that the predictor predicts at a time, at least a tubelet.

    Raises:
        ConfigError: a value is impossible.
    """

    actions: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    num_layers: int = 3
    num_heads: int = 16
    layer_norm_eps: float = 1e-5
    frames_per_clip: int = 32
    frames_per_second: int = 8
    output_frames: int = 2

    def __post_init__(self) -> None:
        """Checks every field."""
        frames = ("frames_per_clip", "frames_per_second", "output_frames")
        check_positive_ints(self, "num_layers", "num_heads", *frames)
        for field in self.heads:
            names = getattr(self, field)
            strings = isinstance(names, tuple) and all(isinstance(x, str) for x in names)
            check(strings and len(names) > 0, self, field, "a tuple of one or more names")
        check_eps(self)

    @property
    def heads(self) -> tuple[str, ...]:
        """The fields that name the classes of a classifier; its query has the same place."""
        return ("verbs", "nouns", "actions") if self.verbs or self.nouns else ("actions",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A whole checkpoint: the encoder and the parts that came with it.

    Args:
        encoder: the encoder.
        predictor: the predictor, or None.
        classifier: pooler and classifier, or None.
        anticipator: pooler and classifiers of the actions to come, or None.
        action_predictor: the predictor of V-JEPA 2-AC, or None.

    Raises:
        ConfigError: the parts do not fit together.
    """

    encoder: EncoderConfig
    predictor: PredictorConfig | None = None
    classifier: ClassifierConfig | None = None
    anticipator: AnticipatorConfig | None = None
    action_predictor: ActionPredictorConfig | None = None

    def __post_init__(self) -> None:
        """Checks that the parts are of one family and fit in width and depth."""
        encoder, predictor, classifier = self.encoder, self.predictor, self.classifier
        if predictor is not None:
            alike = {"rope": encoder.rope, "modality_embeddings": encoder.image_tokenizer}
            for field, right in alike.items():
                family = f"the encoder's, {right!r}; these parts are of different families"
                check(getattr(predictor, field) == right, predictor, field, family)
            check(
                predictor.num_levels in {1, encoder.num_levels},
                predictor,
                "num_levels",
                f"1 or the encoder's number of levels, {encoder.num_levels}",
            )
        if self.action_predictor is not None:
            right = "tiled, as V-JEPA 2-AC's; these parts are of different families"
            check(encoder.rope == "tiled", encoder, "rope", right)
        width, tubelet = encoder.hidden_size, encoder.tubelet_size
        for head in filter(None, (classifier, self.anticipator)):
            right = f"a divisor of the encoder's width {width}"
            check(width % head.num_heads == 0, head, "num_heads", right)
            fits = head.frames_per_clip in (None, 1) or head.frames_per_clip % tubelet == 0
            right = f"1 or a multiple of the encoder's tubelet_size, {tubelet}"
            check(fits, head, "frames_per_clip", right)
        if classifier is not None:
            known = encoder.levels or range(encoder.num_layers)
            right = f"among the encoder's normed layers, {list(known)}"
            check(set(classifier.layers) <= set(known), classifier, "layers", right)
        if self.anticipator is not None:
            check(predictor is not None, self, "predictor", "there, for the anticipator")
            fits = predictor.output_dim in (None, predictor.num_levels * width)
            check(fits, predictor, "output_dim", "the encoder's width, for the anticipator")

    @property
    def crop_size(self) -> int:
        """Pixels of a side of the square input that the weights were trained on."""
        return self.encoder.crop_size

    @property
    def classifier_frames(self) -> int:
        """Frames of the clips that a classifier was trained on: the encoder's, if it says none."""
        frames = None if self.classifier is None else self.classifier.frames_per_clip
        return frames or self.encoder.frames_per_clip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Builds the configuration from what `to_json` returned.

        Args:
            values: the JSON object.

        Returns:
            The configuration, checked.

        Raises:
            ConfigError: a field is missing, unknown or impossible.
        """
        unknown = sorted(set(values) - {"encoder", *_OPTIONAL_PARTS})
        if unknown:
            raise ConfigError(f"ModelConfig has no fields {unknown}")
        parts = {
            name: build(part, values[name])
            for name, part in _OPTIONAL_PARTS.items()
            if values.get(name) is not None
        }
        return cls(encoder=build(EncoderConfig, values.get("encoder")), **parts)


_OPTIONAL_PARTS: dict[str, type] = {
    "predictor": PredictorConfig,
    "classifier": ClassifierConfig,
    "anticipator": AnticipatorConfig,
    "action_predictor": ActionPredictorConfig,
}


def _ascending(layers: object) -> bool:
    """Whether it is a tuple of ascending whole numbers from 0."""
    if not isinstance(layers, tuple) or not all(type(x) is int for x in layers):
        return False
    return all(x < y for x, y in zip((-1, *layers), layers, strict=False))


def _check_levels(config: EncoderConfig) -> None:
    last = config.num_layers - 1
    right = f"() or ascending layers that end with the last one, {last}"
    fits = not config.levels or config.levels[-1] == last
    check(_ascending(config.levels) and fits, config, "levels", right)


def _check_areas(config: EncoderConfig) -> None:
    pair = config.area_layers
    fits = isinstance(pair, tuple) and len(pair) == 2 and all(type(x) is int for x in pair)
    fits = fits and 0 <= pair[0] <= pair[1] <= config.num_layers
    right = f"(start, end) with 0 <= start <= end <= {config.num_layers}, the number of layers"
    check(fits, config, "area_layers", right)
    scale = config.area_residual_scale
    fits = type(scale) in (int, float) and math.isfinite(scale)
    check(fits, config, "area_residual_scale", "a finite number")
