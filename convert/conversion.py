"""From a Hugging Face checkpoint to ours, one tensor at a time."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jvjepa.convert import hub
from jvjepa.convert.huggingface import Entry, entries
from jvjepa.convert.progress import progress
from jvjepa.convert.source import Weights, open_weights, read_config, read_preprocessor
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.storage import check_free, new_folder
from jvjepa.version import __version__
from jvjepa.weights import (
    DTYPES,
    WEIGHTS_FILE,
    Source,
    check_names,
    count_parameters,
    write_checkpoint,
)

DTypeName = Literal["float32", "bfloat16"]
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Args:
        out: the folder.
        dtype: of the parameters, "float32" or "bfloat16".
        parameters: how many parameters each part has: encoder, predictor, pooler, classifier.
        num_bytes: size of the weight file.
        source: where the weights came from first, if that is known.
    """

    out: Path
    dtype: str
    parameters: dict[str, int]
    num_bytes: int
    source: Source | None

    def __str__(self) -> str:
        """A few lines for people."""
        total = sum(self.parameters.values())
        lines = [
            f"{self.out}: {total:,} parameters, {self.dtype}, {self.num_bytes / 1e6:,.1f} MB",
            *(f"  {part}: {count:,} parameters" for part, count in self.parameters.items()),
        ]
        if self.source is not None:
            revision = f" at revision {self.source.revision}" if self.source.revision else ""
            lines.append(f"  from {self.source.name}{revision}, sha256 {self.source.sha256}")
        return "\n".join(lines)


def convert(
    source: str,
    out: str | Path,
    *,
    dtype: DTypeName | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Report:
    """Converts a Hugging Face V-JEPA 2 checkpoint into a folder that `jvjepa.load` reads.

    Every tensor of the source is used, every parameter is filled, shapes are checked, and values
    are finite. `out` appears whole or not at all. Memory holds one tensor at a time.

    Args:
        source: a folder, a released checkpoint's name, or a hub id; see `jvjepa.convert.hub`.
        out: the folder to make.
        dtype: of the parameters to write; None takes the source's, float32 or bfloat16.
        revision: the hub's branch, tag or commit.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: the source cannot be found, is not a whole V-JEPA 2 checkpoint, or `out` exists.
    """
    out = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}; it must be one of {', '.join(DTYPES)}")
    check_free(out, force=force)
    found = hub.resolve(source, revision)
    _check_apart(found.folder, out)
    hf_config, config = read_config(found.folder)
    with open_weights(found.folder) as weights:
        wanted = entries(config)
        expected = {entry.hf: entry.hf_shape for entry in wanted}
        check_names(str(found.folder), weights.shapes, expected)
        target = _target_dtype(weights, dtype)
        record = Source(
            name=found.name,
            revision=found.revision,
            sha256=weights.sha256(),
            converter=__version__,
            config=hf_config,
            preprocessor=read_preprocessor(found.folder),
        )
        pieces = progress(_pieces(weights, wanted, target), len(wanted), "converting")
        with new_folder(out, force=force) as work:
            write_checkpoint(work, config, record, target, pieces)
    return Report(
        out=out,
        dtype=target.name,
        parameters=count_parameters(config),
        num_bytes=(out / WEIGHTS_FILE).stat().st_size,
        source=record,
    )


def _check_apart(source: Path, out: Path) -> None:
    here, there = source.resolve(), out.resolve()
    if here == there or there in here.parents:
        raise InputError(f"{out} holds the source, {source}; choose another name for the result")


def _target_dtype(weights: Weights, asked: DTypeName | None) -> np.dtype:
    stored: dict[str, str] = {}  # dtype -> one tensor that has it
    for name, tensor in weights.tensors.items():
        stored.setdefault(tensor.dtype, name)
    for kind, name in stored.items():
        if kind not in _STORED:
            raise CheckpointError(
                f"{weights.tensors[name].path}: {name} is {kind}; {', '.join(_STORED)} can be read"
            )
    if asked is not None:
        return DTYPES[asked]
    if len(stored) == 1 and _STORED[next(iter(stored))] in DTYPES:
        return DTYPES[_STORED[next(iter(stored))]]
    kinds = ", ".join(f"{_STORED[kind]} ({name})" for kind, name in stored.items())
    raise InputError(
        f"the source's weights are {kinds}; say what to write with --dtype, one of "
        f"{', '.join(DTYPES)}"
    )


def _pieces(
    weights: Weights, wanted: list[Entry], dtype: np.dtype
) -> Iterator[tuple[str, NDArray[Any]]]:
    for entry in wanted:
        value = entry.transform.to_ours(weights.read(entry.hf)).astype(dtype, copy=False)
        if not np.isfinite(value).all():
            path = weights.tensors[entry.hf].path
            raise CheckpointError(f"{path}: {entry.hf} holds values that are not finite in {dtype}")
        yield entry.ours, value if entry.layer is None else value[None]
