"""Architectures as frozen, checked configurations, and their JSON form."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from jvjepa.errors import ConfigError

Rope = Literal["tiled", "interleaved"]
RopeGrid = Literal["input", "config"]
_T = TypeVar("_T")


def _check(ok: bool, owner: object, field: str, right: str) -> None:
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}; it must be {right}")


def _check_positive_ints(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _check(whole and value > 0, owner, field, "a whole number above 0")


def _check_heads(owner: object, width: int, num_heads: int) -> None:
    _check(width % num_heads == 0, owner, "num_heads", f"a divisor of the width {width}")
    head_width = width // num_heads
    _check(
        head_width % 2 == 0 and head_width >= 6,
        owner,
        "num_heads",
        f"such that the head width ({head_width}) is even and at least 6, for the rotary embedding",
    )


def _check_eps(owner: object) -> None:
    eps = getattr(owner, "layer_norm_eps")  # noqa: B009 (the owners share no base class)
    _check(isinstance(eps, float) and 0 < eps < 1, owner, "layer_norm_eps", "between 0 and 1")


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

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_positive_ints(
            self,
            *("hidden_size", "num_layers", "num_heads", "mlp_dim", "crop_size"),
            *("frames_per_clip", "patch_size", "tubelet_size"),
        )
        _check_heads(self, self.hidden_size, self.num_heads)
        side = f"a multiple of patch_size = {self.patch_size}"
        _check(self.crop_size % self.patch_size == 0, self, "crop_size", side)
        _check_eps(self)
        _check(self.rope in get_args(Rope), self, "rope", f"one of {get_args(Rope)}")
        _check(
            self.rope_grid in get_args(RopeGrid), self, "rope_grid", f"one of {get_args(RopeGrid)}"
        )

    @property
    def head_width(self) -> int:
        """Channels K of one attention head."""
        return self.hidden_size // self.num_heads

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

    Raises:
        ConfigError: a value is impossible.
    """

    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 1536
    num_mask_tokens: int = 10

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_positive_ints(
            self, "hidden_size", "num_layers", "num_heads", "mlp_dim", "num_mask_tokens"
        )
        _check_heads(self, self.hidden_size, self.num_heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The attentive pooler and the linear classifier on top of the encoder.

    Args:
        labels: class names, in the order of the logits.
        num_layers: self-attention blocks of the pooler, before its one cross-attention block.
        num_heads: attention heads of the pooler.
        layer_norm_eps: epsilon of the pooler's LayerNorms.

    Raises:
        ConfigError: a value is impossible.
    """

    labels: tuple[str, ...]
    num_layers: int = 3
    num_heads: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_positive_ints(self, "num_layers", "num_heads")
        strings = isinstance(self.labels, tuple) and all(isinstance(x, str) for x in self.labels)
        _check(strings and len(self.labels) > 0, self, "labels", "a tuple of one or more names")
        _check_eps(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint: the encoder and the parts that came with it.

    Args:
        encoder: the encoder.
        predictor: the predictor, or None.
        classifier: pooler and classifier, or None.

    Raises:
        ConfigError: the parts do not fit together.
    """

    encoder: EncoderConfig
    predictor: PredictorConfig | None = None
    classifier: ClassifierConfig | None = None

    def __post_init__(self) -> None:
        """Checks that the pooler's heads divide the encoder's width."""
        if self.classifier is not None:
            width = self.encoder.hidden_size
            right = f"a divisor of the encoder's width {width}"
            _check(width % self.classifier.num_heads == 0, self.classifier, "num_heads", right)

    @property
    def crop_size(self) -> int:
        """Pixels of a side of the square input that the weights were trained on."""
        return self.encoder.crop_size

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as plain JSON values; `from_json` is the way back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

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
        values = dict(values)
        encoder = _build(EncoderConfig, values.pop("encoder", None))
        predictor, classifier = values.pop("predictor", None), values.pop("classifier", None)
        if values:
            raise ConfigError(f"ModelConfig has no fields {sorted(values)}")
        if classifier is not None and isinstance(classifier.get("labels"), list):
            classifier = {**classifier, "labels": tuple(classifier["labels"])}
        return cls(
            encoder=encoder,
            predictor=None if predictor is None else _build(PredictorConfig, predictor),
            classifier=None if classifier is None else _build(ClassifierConfig, classifier),
        )


def _build(cls: type[_T], values: object) -> _T:
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} must be a JSON object, not {values!r}")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    unknown = sorted(set(values) - {field.name for field in fields})
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = sorted(needed - set(values))
    if unknown or missing:
        raise ConfigError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
    return cls(**values)
