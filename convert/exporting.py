"""From ours back to a Hugging Face checkpoint, one tensor at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.config import ModelConfig
from jvjepa.convert.conversion import Report, count_parameters
from jvjepa.convert.huggingface import Entry, entries, to_hf_config
from jvjepa.convert.progress import progress
from jvjepa.convert.source import CONFIG_FILE, PREPROCESSOR_FILES, WEIGHTS_FILE
from jvjepa.errors import CheckpointError, ConfigError
from jvjepa.storage import check_free, new_folder, open_safetensors, write_safetensors
from jvjepa.weights import CONFIG_FILE as OUR_CONFIG_FILE
from jvjepa.weights import WEIGHTS_FILE as OUR_WEIGHTS_FILE
from jvjepa.weights import check_names, parameter_shapes, read_record


def export_hf(model: str | Path, out: str | Path, *, force: bool = False) -> Report:
    """Writes a converted checkpoint as a Hugging Face folder; the way back from `convert`.

    Tensors that nobody changed are byte-equal with the source's, if their dtype was kept.
    `config.json` is the source's, word for word where it still says the same.

    Args:
        model: a converted checkpoint.
        out: the folder to make; it appears whole or not at all.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: `model` is not a whole checkpoint, Hugging Face's code cannot run it, or `out`
            exists.
    """
    model, out = Path(model), Path(out)
    check_free(out, force=force)
    config, source = read_record(model)
    try:
        hf_config = to_hf_config(config, None if source is None else source.config)
    except ConfigError as error:
        raise ConfigError(f"{model / OUR_CONFIG_FILE}: {error}") from None
    with open_safetensors(model / OUR_WEIGHTS_FILE) as file:
        dtype = check_stored(model, file, config)
        wanted = entries(config)
        shapes = {entry.hf: entry.hf_shape for entry in wanted}
        pieces = progress(_pieces(file, wanted, config), len(wanted), "exporting")
        with new_folder(out, force=force) as work:
            _write_json(work / CONFIG_FILE, _with_dtype(hf_config, dtype.name))
            if source is not None and source.preprocessor is not None:
                _write_json(work / PREPROCESSOR_FILES[0], source.preprocessor)
            write_safetensors(work / WEIGHTS_FILE, shapes, dtype, pieces, {"format": "pt"})
    return Report(
        out=out,
        dtype=dtype.name,
        parameters=count_parameters(config),
        num_bytes=(out / WEIGHTS_FILE).stat().st_size,
        source=source,
    )


def read_piece(file: safe_open, entry: Entry, config: ModelConfig) -> NDArray[Any]:
    """Reads the tensor of one entry out of our file, in Hugging Face's layout.

    Args:
        file: our open weight file.
        entry: which tensor.
        config: the architecture.

    Returns:
        An array of `entry.hf_shape`.
    """
    if entry.layer is None:
        value = file.get_tensor(entry.ours)
    else:
        value = file.get_slice(entry.ours)[entry.layer]
    return entry.transform.to_hf(value, config.encoder)


def check_stored(model: Path, file: safe_open, config: ModelConfig) -> np.dtype:
    """Checks the names and shapes of our weight file against the architecture.

    Args:
        model: the folder, for the message.
        file: its open weight file.
        config: its architecture.

    Returns:
        The dtype of all tensors.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, or dtypes differ.
    """
    path = model / OUR_WEIGHTS_FILE
    slices = {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    check_names(str(path), shapes, parameter_shapes(config))
    kinds = sorted({part.get_dtype() for part in slices.values()})
    if kinds not in (["F32"], ["BF16"]):
        raise CheckpointError(f"{path} has dtypes {kinds}; F32 or BF16 alone would be right")
    return file.get_tensor(next(iter(slices))).dtype


def _pieces(
    file: safe_open, wanted: list[Entry], config: ModelConfig
) -> Iterator[tuple[str, NDArray[Any]]]:
    for entry in wanted:
        yield entry.hf, read_piece(file, entry, config)


def _with_dtype(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Says the dtype where the config said it, or in the newer of the two places."""
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]
    return {**hf_config, **dict.fromkeys(keys, dtype)}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
