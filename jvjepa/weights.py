"""Converted checkpoints: folders with `config.json` and `model.safetensors`."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
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
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers
from jvjepa.predictor import Predictor
from jvjepa.storage import new_folder, open_safetensors, write_safetensors
from jvjepa.typing import Params

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "jvjepa-2"  # changes when names or layouts of the parameters do

_STORED = {"F32": "float32", "BF16": "bfloat16"}  # safetensors' names
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where converted weights came from; kept with them.

    Args:
        name: the hub id, folder or file that was converted.
        revision: the hub's commit, or "".
        sha256: hexadecimal digest of the source's weight files, in the order of their names.
        converter: version of jvjepa that converted.
        config: the source's own configuration, word for word; None for a `.pt` file, which has
            none.
        preprocessor: the source's own preprocessing configuration, word for word, or None.
        keys: of a `.pt` file: under which key each part was found.
        dropped: of a `.pt` file: tensors that were left out, each with the reason.
        probe: where the classifier or the anticipator came from, if it was attached later.
        lora: of adapters that were merged into the weights: name and sha256 of their file.
    """

    name: str
    revision: str
    sha256: str
    converter: str
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    probe: "Source | None" = None
    lora: dict[str, str] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Source":
        """Builds it from its JSON form."""
        probe = values.get("probe")
        return cls(**{**values, "probe": None if probe is None else cls.from_json(probe)})


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
    """

    config: ModelConfig
    encoder: Encoder
    predictor: Predictor | None = None
    classifier: Classifier | None = None
    anticipator: Anticipator | None = None
    action_predictor: ActionPredictor | None = None
    params: Params
    source: Source | None


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


def check_stored(path: Path, file: safe_open, config: ModelConfig) -> np.dtype:
    """Checks the header of a stored weight file against the architecture; reads no tensor.

    Args:
        path: of the file, for the message.
        file: the same, open.
        config: its architecture.

    Returns:
        The dtype of all tensors, float32 or bfloat16.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, or dtypes differ.
    """
    slices = {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    check_names(str(path), shapes, parameter_shapes(config))
    kinds = sorted({part.get_dtype() for part in slices.values()})
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
    record = {
        "format": FORMAT,
        "model": config.to_json(),
        "source": None if source is None else dataclasses.asdict(source),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": FORMAT}
    if source is not None:
        named = {"source": source.name, "revision": source.revision}
        metadata |= {**named, "sha256": source.sha256, "converter": source.converter}
    shapes = parameter_shapes(config)
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
    params = model.params if model.encoder.scan else stack_layers(model.params)
    flat = flatten_dict(params, sep="/")
    shapes = parameter_shapes(model.config)
    check_names("params", {name: tuple(leaf.shape) for name, leaf in flat.items()}, shapes)
    dtypes = {np.dtype(leaf.dtype) for leaf in flat.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise InputError(f"params have dtypes {dtypes}; they must all be float32 or all bfloat16")
    with new_folder(Path(folder), force=force) as work:
        tensors = ((name, np.asarray(flat[name])) for name in shapes)
        write_checkpoint(work, model.config, model.source, dtypes.pop(), tensors)


def read_record(folder: str | Path) -> tuple[ModelConfig, Source | None]:
    """Reads the `config.json` of a converted checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The architecture, and where the weights came from.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} does not exist; {folder} is no converted checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        hint = "; convert it first: jvjepa convert SOURCE OUT"
        hint = hint if isinstance(record, dict) and "model_type" in record else ""
        raise CheckpointError(f"{path} is not of format {FORMAT!r}{hint}")
    try:
        source = record.get("source")
        return (
            ModelConfig.from_json(record["model"]),
            None if source is None else Source.from_json(source),
        )
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from None


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
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")
    check_backend(attention)
    config, source = read_record(folder)
    if areas is not None:
        config = dataclasses.replace(config, encoder=areas.of(config.encoder))
    path = Path(folder) / WEIGHTS_FILE
    params: dict[tuple[str, ...], jax.Array] = {}
    with open_safetensors(path) as file:
        param_dtype = check_stored(path, file, config)
        for name in parameter_shapes(config):  # one by one, so that no second copy of all is made
            tree = unflatten_dict({tuple(name.split("/")): file.get_tensor(name)})
            leaves = flatten_dict(tree if scan else unstack_layers(tree))
            params |= {place: jnp.asarray(leaf) for place, leaf in leaves.items()}
    merged = unflatten_dict(params)
    if lora is not None:
        from jvjepa.adapters import merge_saved  # here, because it imports this module

        merged, record = merge_saved(lora, merged)
        source = None if source is None else dataclasses.replace(source, lora=record)
    dtypes = (param_dtype if dtype is None else DTYPES[dtype], param_dtype)

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
    )
