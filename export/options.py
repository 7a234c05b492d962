"""What to export, and how."""

import dataclasses
from typing import Literal, get_args

from jvjepa.errors import ConfigError
from jvjepa.export.network import CacheForm
from jvjepa.streaming import Positions

Format = Literal["onnx", "saved-model", "litert", "stablehlo", "tensorrt"]
What = Literal["clip", "step", "gate", "classifier"]
Precision = Literal["float32", "float16"]

# Where inputs are rounded to int8, a value between two steps may fall on either side.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8-static": 5e-2}
LOWEST_OPSET, HIGHEST_OPSET = 17, 19  # LayerNormalization came with 17; 20 writes Gelu
HALF_SCALES = 19  # the first opset whose DequantizeLinear gives float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to export; every value is checked before any work.

    Args:
        format: what to write.
        what: "clip" turns a clip into tokens and their mean, "step" is one streaming step, "gate"
            the surprise of a tubelet, "classifier" the logits of a clip.
        batch: clips or streams at a time; None leaves it open where the format can.
        frames: T of a clip; None means as many as the encoder was trained with, and of a
            classifier as many as that was.
        height: pixels H, None means the model's `crop_size`.
        width: pixels W, None means the model's `crop_size`.
        window: tubelets W of a stream.
        positions: see `jvjepa.streaming.step`.
        cache: "host" lets the caller write the new keys and values into the ring, "graph" passes
            the whole ring through.
        precision: of products, weights and cache; norms, softmax, inputs and outputs are float32.
            Of LiteRT, "float16" stores the weights so and computes in float32.
        opset: of ONNX.
        tolerance: the largest relative error, max |difference| / max |value|, against the library's
            own model in float32; None means 1e-4; 2e-2 in float16; 5e-2 of int8-static.
        provider: the ONNX Runtime provider that the check runs on.
        platforms: of StableHLO.
        seed: of the check's random input.

    Raises:
        ConfigError: a value is impossible, or the format has no such thing.
    """

    format: Format = "onnx"
    what: tuple[What, ...] = ("clip",)
    batch: int | None = 1
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    window: int = 8
    positions: Positions = "window"
    cache: CacheForm = "host"
    precision: Precision = "float32"
    opset: int = LOWEST_OPSET
    tolerance: float | None = None
    provider: str = "CPUExecutionProvider"
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, kind in (("format", Format), ("positions", Positions), ("cache", CacheForm)):
            _check_choice(name, getattr(self, name), get_args(kind))
        _check_choice("precision", self.precision, get_args(Precision))
        if not self.what or len(set(self.what)) != len(self.what):
            raise ConfigError(f"what = {self.what}; it must name each thing once, and one at least")
        for what in self.what:
            _check_choice("what", what, get_args(What))
        for name in ("batch", "frames", "height", "width", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}; it must be at least 1")
        if not LOWEST_OPSET <= self.opset <= HIGHEST_OPSET:
            raise ConfigError(
                f"opset = {self.opset}; it must be {LOWEST_OPSET} (the first with "
                f"LayerNormalization) to {HIGHEST_OPSET} (the last whose graphs have no Gelu, "
                "which is not in TensorRT's list)"
            )
        if self.tolerance is not None and not 0.0 < self.tolerance < 1.0:
            raise ConfigError(f"tolerance = {self.tolerance}; it must be between 0 and 1")
        if self.batch is None and self.format == "litert":
            raise ConfigError("LiteRT has no open batch; give batch, 1 say")
        if self.precision == "float16" and self.format in ("saved-model", "stablehlo"):
            raise ConfigError(
                f"{self.format} is exported in float32; float16 is for onnx, tensorrt and litert"
            )
        for platform in self.platforms:
            _check_choice("platforms", platform, ("cpu", "cuda", "rocm", "tpu"))

    @property
    def largest_error(self) -> float:
        """The tolerance that holds."""
        return TOLERANCE[self.precision] if self.tolerance is None else self.tolerance


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r}; it must be one of {choices}")
