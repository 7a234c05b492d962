"""How quantized weights are stored: their record, and plain tensors for every kernel.

A kernel NAME becomes NAME/values, NAME/scale and, with "int8-static", NAME/input_scale: the arrays
of `jvjepa.quantization.SmallKernel`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.errors import ConfigError
from jvjepa.quantization import TILED, Scheme, SmallKernel, check_scheme, is_quantized
from jvjepa.typing import Array, Params

_F32, _I8, _U8 = (np.dtype(kind) for kind in (np.float32, np.int8, np.uint8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the ranges of inputs were measured on.

    Args:
        videos: their names.
        num_frames: of each clip.
        percentile: of |x| in a clip that counts as its largest, see `jvjepa.ranges.input_ranges`.
    """

    videos: tuple[str, ...]
    num_frames: int
    percentile: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the weights of a checkpoint were quantized; kept with them.

    Args:
        scheme: see `jvjepa.quantization.quantize`.
        layers: names of the dense layers that are quantized, blocks stacked.
        exclude: the regular expressions by which layers were left out.
        tile: of "int4" and "nf4"; None for the others.
        calibration: of "int8-static"; None for the others.
        model: the folder of the floating-point weights.
        sha256: of its weight file, hexadecimal.
        base: `jvjepa.adapters.weights_sha256` of each of its parts, so that adapters which were
            trained on them can be told.

    Raises:
        ConfigError: the scheme is unknown, or a field is not for it.
    """

    scheme: Scheme
    layers: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    tile: int | None = None
    calibration: Calibration | None = None
    model: str
    sha256: str
    base: Mapping[str, str]

    def __post_init__(self) -> None:
        """Checks what loading depends on."""
        if self.tile != check_scheme(self.scheme, self.tile):
            raise ConfigError(f"Quantization.tile = {self.tile}; {self.scheme} must have one")
        if not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise ConfigError(f"Quantization.layers = {self.layers}; it must name dense layers")

    def without(self, part: str) -> "Quantization | None":
        """The record of a model of which one part is in floating point again."""
        layers = tuple(name for name in self.layers if not name.startswith(f"{part}/"))
        return dataclasses.replace(self, layers=layers) if layers else None

    def describe(self) -> str:
        """Says it in one line."""
        tile = "" if self.tile is None else f" in tiles of {self.tile}"
        ranges = ""
        if self.calibration is not None:
            ranges = f", ranges of inputs from {', '.join(self.calibration.videos)}"
        return (
            f"{self.scheme}{tile} in {len(self.layers)} dense layers or stacks of them{ranges}; "
            f"made of {self.model}, sha256 {self.sha256}"
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quantization":
        """Builds it from its JSON form."""
        values = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
        given = values.get("calibration")
        if given is not None:
            given = Calibration(**{**given, "videos": tuple(given["videos"])})
        return cls(**{**values, "calibration": given})


def packed_tensors(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype]]:
    """Lists every tensor of a weight file.

    Args:
        shapes: of the parameters, as `jvjepa.parameters.parameter_shapes` gives them.
        quantization: which are quantized, and how; None means none.

    Returns:
        Shape by flat name, in the order in which they are stored; and the dtype of those that
        quantized kernels consist of.

    Raises:
        ConfigError: a layer that should be quantized is no dense layer, or its inputs cannot be
            divided into tiles.
    """
    if quantization is None:
        return dict(shapes), {}
    layers, tile, scheme = set(quantization.layers), quantization.tile, quantization.scheme
    unknown = sorted(name for name in layers if f"{name}/kernel" not in shapes)
    if unknown:
        raise ConfigError(f"Quantization.layers has {unknown}, which are no dense layers of it")
    found, dtypes = {}, {}
    for name, shape in shapes.items():
        if not name.endswith("/kernel") or name.removesuffix("/kernel") not in layers:
            found[name] = shape
            continue
        *stack, inputs, outputs = shape
        if tile is not None and inputs % tile:
            raise ConfigError(f"Quantization.tile = {tile}; {name} has {inputs} inputs")
        rows, tiles = inputs // 2 if scheme in TILED else inputs, inputs // (tile or inputs)
        found[f"{name}/values"] = (*stack, rows, outputs)
        found[f"{name}/scale"] = (*stack, tiles, outputs)
        dtypes[f"{name}/values"] = _I8 if scheme.startswith("int8") else _U8
        dtypes[f"{name}/scale"] = _F32
        if scheme == "int8-static":
            found[f"{name}/input_scale"] = tuple(stack)
            dtypes[f"{name}/input_scale"] = _F32
    return found, dtypes


def pack_params(params: Params) -> dict[str, Any]:
    """Puts the plain arrays that are stored into the place of every quantized kernel.

    Args:
        params: of a whole model or of a part.

    Returns:
        Nested dictionaries of arrays; those that were arrays before are the same.
    """

    def pack(kernel: SmallKernel) -> dict[str, Array]:
        tensors = {"values": kernel.values, "scale": kernel.scale}
        step = kernel.input_scale
        return tensors if step is None else {**tensors, "input_scale": step}

    flat = flatten_dict(params)
    return unflatten_dict(
        {path: pack(leaf) if is_quantized(leaf) else leaf for path, leaf in flat.items()}
    )


def is_packed(name: str) -> bool:
    """Whether a stored tensor of that flat name is of a quantized kernel."""
    return name.endswith("/kernel/values")


def read_tensor(
    file: safe_open, name: str, quantization: Quantization | None
) -> NDArray[Any] | SmallKernel:
    """Reads one parameter, which may be a quantized kernel.

    Args:
        file: an open weight file whose header was checked.
        name: of the parameter, flat.
        quantization: of the file, or None.

    Returns:
        The array, or the kernel of NumPy arrays.
    """
    layer = name.removesuffix("/kernel")
    if quantization is None or layer == name or layer not in quantization.layers:
        return file.get_tensor(name)
    scheme = quantization.scheme
    step = file.get_tensor(f"{name}/input_scale") if scheme == "int8-static" else None
    values, scale = (file.get_tensor(f"{name}/{part}") for part in ("values", "scale"))
    return SmallKernel(values, scale, step, scheme)
