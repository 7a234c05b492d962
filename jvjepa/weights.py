"""Converted checkpoints: folders with `config.json` and `model.safetensors`."""

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from jvjepa.action import ActionPredictor
from jvjepa.anticipation import Anticipator
from jvjepa.area import AreaOptions
from jvjepa.attention import Backend, check_backend
from jvjepa.config import ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.heads import Classifier
from jvjepa.packing import Quantization, is_packed, pack_params, packed_tensors, read_tensor
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers
from jvjepa.predictor import Predictor
from jvjepa.quantization import is_quantized
from jvjepa.records import CONFIG_FILE, FORMAT, Source, read_architecture, read_json
from jvjepa.storage import new_folder, open_safetensors, write_safetensors
from jvjepa.typing import Params
from jvjepa.version import __version__

WEIGHTS_FILE = "model.safetensors"
_STORED = {"F32": "float32", "BF16": "bfloat16"}  # safetensors' names
_PACKED = {"F32": "float32", "I8": "int8", "U8": "uint8"}  # of what quantized kernels consist of
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded checkpoint.

    Args:
        config: the architecture.
        encoder: the module to apply to `params["encoder"]`.
        predictor: the module to apply to `params["predictor"]`, or None.
        classifier: the module to apply to `params["classifier"]`, or None.
        anticipator: the module to apply to `params["anticipator"]`, or None.
        action_predictor: the module to apply to `params["action_predictor"]`, or None.
        params: nested dictionaries of arrays, one for each part that the checkpoint has.
        source: where the weights came from, or None.
        quantization: how kernels among `params` were quantized; None means that none is.
    """

    config: ModelConfig
    encoder: Encoder
    predictor: Predictor | None = None
    classifier: Classifier | None = None
    anticipator: Anticipator | None = None
    action_predictor: ActionPredictor | None = None
    params: Params
    source: Source | None
    quantization: Quantization | None = None


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError unless `dtype` is None or one that we store."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")


def check_names(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises one error that lists every missing, unexpected and misshapen tensor.

    Args:
        where: what is being read, for the message.
        found: shape by name, what is there.
        expected: shape by name, what should be.

    Raises:
        CheckpointError: the two differ.
    """
    problems = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1, cutoff=0.9)
            hint = f" (like {near[0]}?)" if near else ""
            problems.append(f"unexpected {name} {list(shape)}{hint}")
        elif shape != expected[name]:
            right = list(expected[name])
            problems.append(f"{name} has shape {list(shape)}, {right} would be right")
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} tensors do not fit: " + "; ".join(problems)
        )


def check_stored(
    path: Path,
    file: safe_open,
    config: ModelConfig,
    quantization: Quantization | None = None,
) -> np.dtype:
    """Checks the header of a stored weight file against the architecture; reads no tensor.

    Args:
        path: of the file, for the message.
        file: the same, open.
        config: its architecture.
        quantization: of the weights; None where only floating-point ones can be used.

    Returns:
        The dtype of all parameters that are not quantized, float32 or bfloat16.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, dtypes differ, or it holds
            quantized weights where only others can be used.
    """
    return check_header(path, file, parameter_shapes(config), quantization)


def check_header(
    path: Path,
    file: safe_open,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization | None = None,
) -> np.dtype:
    """As `check_stored`, for parameters of these names and shapes."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    if quantization is None and any(is_packed(name) for name in slices):
        raise CheckpointError(
            f"{path} holds quantized weights; the floating-point ones that they were made of would "
            "be right"
        )
    try:
        shapes, packed = packed_tensors(shapes, quantization)
    except ConfigError as error:
        raise CheckpointError(f"{path.with_name(CONFIG_FILE)}: {error}") from None
    check_names(str(path), {name: tuple(x.get_shape()) for name, x in slices.items()}, shapes)
    dtypes = {name: part.get_dtype() for name, part in slices.items()}
    for name, right in packed.items():
        if _PACKED.get(dtypes[name]) != right.name:
            raise CheckpointError(f"{path}: {name} is {dtypes[name]}; {right} would be right")
    kinds = sorted({kind for name, kind in dtypes.items() if name not in packed})
    if len(kinds) != 1 or kinds[0] not in _STORED:
        right = " or ".join(_STORED)
        raise CheckpointError(f"{path} has dtypes {kinds}; {right} alone would be right")
    return DTYPES[_STORED[kinds[0]]]


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    source: Source | None,
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes config.json and model.safetensors into a folder that exists.

    Args:
        folder: from `jvjepa.storage.new_folder`, so that nothing half-written stays.
        config: the architecture.
        source: where the weights came from, or None.
        dtype: of the parameters, float32 or bfloat16.
        tensors: (flat name, piece) in the order of `parameter_shapes`; pieces are rows along the
            first axis.

    Raises:
        CheckpointError: the tensors are not those that `config` asks for.
    """
    shapes = parameter_shapes(config)
    write_folder(folder, FORMAT, {"model": config.to_json()}, source, dtype, shapes, tensors)


def write_folder(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    source: Source | None,
    dtype: np.dtype | Mapping[str, np.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """As `write_checkpoint`, for a folder of any format.

    Args:
        folder: as there.
        kind: the format's name.
        config: what `config.json` says of the architecture.
        source: as there.
        dtype: as there, or that of each tensor by name.
        shapes: of the tensors by name, in the order in which they arrive.
        tensors: (flat name, piece), as `jvjepa.storage.write_safetensors` takes them.

    Raises:
        CheckpointError: the tensors are not those that `shapes` asks for.
    """
    record = {
        "format": kind,
        **config,
        "source": None if source is None else dataclasses.asdict(source),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": kind}
    if source is not None:
        named = {"source": source.name, "revision": source.revision}
        metadata |= {**named, "sha256": source.sha256, "converter": source.converter}
    write_safetensors(folder / WEIGHTS_FILE, shapes, dtype, tensors, metadata)


def save(folder: str | Path, model: Model, *, force: bool = False) -> None:
    """Saves a model as a checkpoint folder; the folder appears whole or not at all.

    Args:
        folder: where; it must not exist unless `force`.
        model: its `params` must be those that its `config` asks for, all of one dtype.
        force: replace the folder.

    Raises:
        InputError: the folder exists, or the parameters do not fit.
    """
    quantization = model.quantization
    shapes, packed = packed_tensors(parameter_shapes(model.config), quantization)
    params = pack_params(model.params) if quantization else model.params
    dtype, tensors = stored_tensors(params, shapes, packed)
    config = {"model": model.config.to_json()}
    if quantization is not None:
        config["quantization"] = dataclasses.asdict(quantization)
    with new_folder(Path(folder), WEIGHTS_FILE, force=force) as work:
        write_folder(work, FORMAT, config, model.source, dtype, shapes, tensors)


def stored_tensors(
    params: Params,
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, np.dtype] = types.MappingProxyType({}),
) -> tuple[dict[str, np.dtype], Iterator[tuple[str, np.ndarray]]]:
    """Makes ready what is to be written.

    Args:
        params: nested dictionaries of arrays, blocks stacked or each of its own.
        shapes: what they must be, by flat name.
        packed: dtype by flat name of what quantized kernels consist of.

    Returns:
        Their dtypes by flat name, and (flat name, array) in the order of `shapes`.

    Raises:
        InputError: they are others, or not all float32 or all bfloat16.
    """
    flat = flatten_dict(stack_layers(params), sep="/")
    check_names("params", {name: tuple(leaf.shape) for name, leaf in flat.items()}, shapes)
    if any(is_quantized(leaf) for leaf in flat.values()):
        raise InputError("params hold quantized kernels; Model.quantization must say how")
    dtypes = {np.dtype(leaf.dtype) for name, leaf in flat.items() if name not in packed}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise InputError(f"params have dtypes {dtypes}; they must all be float32 or all bfloat16")
    kinds = dict.fromkeys(shapes, dtypes.pop()) | dict(packed)
    return kinds, ((name, np.asarray(flat[name])) for name in shapes)


def read_record(folder: str | Path) -> tuple[ModelConfig, Source | None]:
    """Reads the `config.json` of a converted checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The architecture, and where the weights came from.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    return read_architecture(folder, FORMAT, "converted checkpoint", "model", ModelConfig.from_json)


def made_here(folder: str | Path) -> Source:
    """The source of what is made of a checkpoint that has none: its folder."""
    with open(Path(folder) / WEIGHTS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(name=str(folder), revision="", sha256=digest, converter=__version__)


def read_quantization(folder: str | Path) -> Quantization | None:
    """Reads how the weights of a converted checkpoint were quantized.

    Args:
        folder: the checkpoint.

    Returns:
        The record, or None if they are not.

    Raises:
        CheckpointError: `config.json` is missing, damaged, or not one of ours.
    """
    found = read_json(folder, FORMAT, "converted checkpoint").get("quantization")
    try:
        return None if found is None else Quantization.from_json(found)
    except (ConfigError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE}: quantization: {error}") from None


def read_params(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scan: bool,
    dtype: str | None = None,
    quantization: Quantization | None = None,
) -> tuple[Params, tuple[np.dtype, np.dtype]]:
    """Reads all tensors of a weight file.

    Args:
        path: the file.
        shapes: what it must hold, by flat name.
        scan: whether blocks stay stacked.
        dtype: of the computation; None takes that of the parameters.
        quantization: how kernels among them were quantized, or None.

    Returns:
        Nested dictionaries of arrays and quantized kernels on JAX's default device, and the dtypes
        of a module that takes them: of its computation, and of the parameters that are not
        quantized.

    Raises:
        CheckpointError: the file is not whole, or holds others.
    """
    params: dict[tuple[str, ...], jax.Array] = {}
    with open_safetensors(path) as file:
        stored = check_header(path, file, shapes, quantization)
        for name in shapes:  # one by one, so that no second copy of all is made
            value = read_tensor(file, name, quantization)
            tree = unflatten_dict({tuple(name.split("/")): value})
            leaves = flatten_dict(tree if scan else unstack_layers(tree))
            params |= {place: jax.tree.map(jnp.asarray, leaf) for place, leaf in leaves.items()}
    return unflatten_dict(params), (stored if dtype is None else DTYPES[dtype], stored)


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    attention: Backend = "auto",
    scan: bool = True,
    areas: AreaOptions | None = None,
    lora: str | Path | None = None,
) -> Model:
    """Loads a converted checkpoint; needs neither torch nor a network.

    Args:
        folder: what `jvjepa convert` or `save` wrote.
        dtype: of the computation, "float32" or "bfloat16"; None takes that of the stored weights.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: whether the blocks of each part are stacked, see `Encoder`; False is faster on a CPU.
        areas: area attention for the encoder; None takes what is stored, which is full attention
            unless it was asked for at conversion.
        lora: adapters to merge into the parameters, see `jvjepa.adapters`; `load_adapters` there
            reads them without merging.

    Returns:
        The model, its parameters on JAX's default device.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or `lora` no whole adapters for it.
        ConfigError: `dtype` or `attention` is unknown, or the encoder has no such layers.
    """
    check_dtype(dtype)
    check_backend(attention)
    config, source = read_record(folder)
    quantization = read_quantization(folder)
    if lora is not None and quantization is not None:
        raise CheckpointError(
            f"{folder} holds {quantization.scheme} weights, into which no adapters can be merged; "
            f"merge {lora} into the floating-point ones and quantize the result: jvjepa lora merge "
            "MODEL ADAPTER OUT, jvjepa quantize OUT SMALL"
        )
    if areas is not None:
        config = dataclasses.replace(config, encoder=areas.of(config.encoder))
    path = Path(folder) / WEIGHTS_FILE
    how = {"scan": scan, "dtype": dtype, "quantization": quantization}
    merged, dtypes = read_params(path, parameter_shapes(config), **how)
    if lora is not None:
        from jvjepa.adapters import merge_saved  # here, because it imports this module

        merged, record = merge_saved(lora, merged)
        source = source or made_here(folder)
        source = dataclasses.replace(source, lora=(*source.lora, record))

    def make(module: type[nn.Module], part: Any) -> Any:
        return None if part is None else module(part, config.encoder, *dtypes, attention, scan)

    return Model(
        config=config,
        encoder=Encoder(config.encoder, *dtypes, attention, scan),
        predictor=make(Predictor, config.predictor),
        classifier=make(Classifier, config.classifier),
        anticipator=make(Anticipator, config.anticipator),
        action_predictor=make(ActionPredictor, config.action_predictor),
        params=merged,
        source=source,
        quantization=quantization,
    )
