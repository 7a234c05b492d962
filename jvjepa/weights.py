"""Converted checkpoints: folders with `config.json` and `model.safetensors`."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from jvjepa.attention import Backend, check_backend
from jvjepa.config import ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.storage import new_folder, open_safetensors, write_safetensors
from jvjepa.typing import Params

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "jvjepa-1"  # changes when names or layouts of the parameters do

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
        config: the source's own configuration, word for word.
        preprocessor: the source's own preprocessing configuration, word for word, or None.
    """

    name: str
    revision: str
    sha256: str
    converter: str
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded checkpoint.

    Args:
        config: the architecture.
        encoder: the module to apply to `params["encoder"]`.
        predictor: None; the weights are in `params`, their module is not there yet.
        classifier: None; as the predictor.
        params: nested dictionaries of arrays: encoder, and what else the checkpoint holds of
            predictor, pooler and classifier.
        source: where the weights came from, or None.
    """

    config: ModelConfig
    encoder: Encoder
    predictor: None
    classifier: None
    params: Params
    source: Source | None


def _dense(inputs: int, outputs: int, *stack: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (*stack, inputs, outputs), "bias": (*stack, outputs)}


def _norm(width: int, *stack: int) -> dict[str, tuple[int, ...]]:
    return {"scale": (*stack, width), "bias": (*stack, width)}


def _blocks(layers: int, width: int, mlp_dim: int) -> dict[str, Any]:
    return {
        "norm1": _norm(width, layers),
        "attention": {
            name: _dense(width, width, layers) for name in ("query", "key", "value", "proj")
        },
        "norm2": _norm(width, layers),
        "mlp": {
            "fc1": _dense(width, mlp_dim, layers),
            "fc2": _dense(mlp_dim, width, layers),
        },
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Lists every parameter of a checkpoint.

    Args:
        config: the architecture.

    Returns:
        Shape by flat name ("encoder/blocks/mlp/fc1/kernel"), in the order in which they are stored.
        The parameters of blocks are stacked, [L, ...].
    """
    encoder = config.encoder
    width = encoder.hidden_size
    parts: dict[str, Any] = {
        "encoder": {
            "patch_embed": _dense(encoder.patch_dim, width),
            "blocks": _blocks(encoder.num_layers, width, encoder.mlp_dim),
            "norm": _norm(width),
        }
    }
    if config.predictor is not None:
        inner = config.predictor.hidden_size
        parts["predictor"] = {
            "embed": _dense(width, inner),
            "mask_tokens": (config.predictor.num_mask_tokens, inner),
            "blocks": _blocks(config.predictor.num_layers, inner, config.predictor.mlp_dim),
            "norm": _norm(inner),
            "proj": _dense(inner, width),
        }
    if config.classifier is not None:
        mlp_dim = 4 * width  # whatever the encoder's ratio is
        cross = _blocks(1, width, mlp_dim)
        del cross["attention"]["proj"]
        parts["pooler"] = {
            "query_tokens": (1, width),
            "blocks": _blocks(config.classifier.num_layers, width, mlp_dim),
            "cross_attention": jax.tree.map(
                lambda shape: shape[1:], cross, is_leaf=lambda x: isinstance(x, tuple)
            ),
        }
        parts["classifier"] = _dense(width, len(config.classifier.labels))
    return flatten_dict(parts, sep="/")


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part: encoder, predictor, pooler, classifier."""
    counts: dict[str, int] = {}
    for name, shape in parameter_shapes(config).items():
        part = name.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def stack_layers(params: Params) -> Params:
    """Stacks the blocks of an encoder's parameters, for `Encoder(scan=True)`.

    Args:
        params: with "blocks_0", "blocks_1", ...

    Returns:
        With "blocks", whose arrays are [L, ...].
    """
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    blocks = [params[f"blocks_{i}"] for i in range(len(params) - len(rest))]
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_layers(params: Params) -> Params:
    """Gives every block of an encoder its own parameters, for `Encoder(scan=False)`.

    Args:
        params: with "blocks", whose arrays are [L, ...].

    Returns:
        With "blocks_0", "blocks_1", ...; numpy arrays are views, JAX's are copies.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    blocks = {
        f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(count)
    }
    return {**rest, **blocks}


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
    params = dict(model.params)
    if not model.encoder.scan:
        params["encoder"] = stack_layers(params["encoder"])
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
            None if source is None else Source(**source),
        )
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    attention: Backend = "auto",
    scan: bool = True,
) -> Model:
    """Loads a converted checkpoint; needs neither torch nor a network.

    Args:
        folder: what `jvjepa convert` or `save` wrote.
        dtype: of the computation, "float32" or "bfloat16"; None takes that of the stored weights.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: whether the encoder's blocks are stacked, see `Encoder`; False is faster on a CPU.

    Returns:
        The model, its parameters on JAX's default device.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        ConfigError: `dtype` or `attention` is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")
    check_backend(attention)
    config, source = read_record(folder)
    path = Path(folder) / WEIGHTS_FILE
    with open_safetensors(path) as file:
        param_dtype = check_stored(path, file, config)
        stored = {name: file.get_tensor(name) for name in parameter_shapes(config)}
    encoder = Encoder(
        config.encoder,
        dtype=param_dtype if dtype is None else DTYPES[dtype],
        param_dtype=param_dtype,
        attention=attention,
        scan=scan,
    )
    params = unflatten_dict(stored, sep="/")
    if not scan:
        params["encoder"] = unstack_layers(params["encoder"])
    return Model(
        config=config,
        encoder=encoder,
        predictor=None,
        classifier=None,
        params=jax.tree.map(jnp.asarray, params),
        source=source,
    )
