"""From ours back to a Hugging Face checkpoint, one tensor at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.config import ModelConfig
from jvjepa.convert.conversion import Report
from jvjepa.convert.huggingface import hf_entries, to_hf_config
from jvjepa.convert.progress import progress
from jvjepa.convert.source import CONFIG_FILE, PREPROCESSOR_FILES, WEIGHTS_FILE
from jvjepa.convert.tables import Entry, expected_shapes
from jvjepa.errors import ConfigError
from jvjepa.parameters import count_parameters
from jvjepa.records import CONFIG_FILE as OUR_CONFIG_FILE
from jvjepa.storage import (
    check_apart,
    check_free,
    new_folder,
    open_safetensors,
    write_safetensors,
)
from jvjepa.weights import WEIGHTS_FILE as OUR_WEIGHTS_FILE
from jvjepa.weights import check_stored, read_record


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
            exists or holds it.
    """
    model, out = Path(model), Path(out)
    check_apart(out, model)
    check_free(out, WEIGHTS_FILE, force=force)
    config, source = read_record(model)
    try:
        hf_config = to_hf_config(config, None if source is None else source.config)
    except ConfigError as error:
        raise ConfigError(f"{model / OUR_CONFIG_FILE}: {error}") from None
    with open_safetensors(model / OUR_WEIGHTS_FILE) as file:
        dtype = check_stored(model / OUR_WEIGHTS_FILE, file, config)
        wanted = hf_entries(config)
        shapes = expected_shapes(wanted)
        pieces = progress(_pieces(file, wanted, config), len(wanted), "exporting")
        with new_folder(out, WEIGHTS_FILE, force=force) as work:
            _write_json(work / CONFIG_FILE, _with_dtype(hf_config, dtype.name))
            if source is not None and source.preprocessor is not None:
                _write_json(work / PREPROCESSOR_FILES[0], source.preprocessor)
            write_safetensors(work / WEIGHTS_FILE, shapes, dtype, pieces, {"format": "pt"})
    return Report.of(out, dtype, count_parameters(config), source)


def _pieces(
    file: safe_open, wanted: list[Entry], config: ModelConfig
) -> Iterator[tuple[str, NDArray[Any]]]:
    for entry in wanted:
        value = read_piece(file, entry)
        yield entry.theirs, entry.transform.to_theirs(value, config.encoder)


def read_piece(file: safe_open, entry: Entry) -> NDArray[Any]:
    """Reads the tensor of one entry (of one layer) out of our open weight file, in our layout."""
    if entry.layer is None:
        return file.get_tensor(entry.ours)
    return file.get_slice(entry.ours)[entry.layer]


def _with_dtype(hf_config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Says the dtype where the config said it, or in the newer of the two places."""
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["dtype"]
    return {**hf_config, **dict.fromkeys(keys, dtype)}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
