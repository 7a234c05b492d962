"""From somebody else's checkpoint to ours, one tensor at a time."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jvjepa.area import AreaOptions
from jvjepa.convert.architecture import Hints
from jvjepa.convert.meta import MetaWeights
from jvjepa.convert.opening import open_original
from jvjepa.convert.progress import progress
from jvjepa.convert.source import StoredTensor, Weights
from jvjepa.convert.tables import Entry, expected_shapes
from jvjepa.errors import CheckpointError, InputError
from jvjepa.parameters import count_parameters
from jvjepa.storage import check_apart, check_free, new_folder
from jvjepa.weights import (
    DTYPES,
    WEIGHTS_FILE,
    Source,
    check_dtype,
    check_names,
    write_checkpoint,
)

DTypeName = Literal["float32", "bfloat16"]
NO_HINTS = Hints()
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Args:
        out: the folder.
        dtype: of the parameters, "float32" or "bfloat16".
        parameters: how many parameters each part has: encoder, predictor, classifier, ..
        num_bytes: size of the weight file.
        source: where the weights came from first, if that is known.
    """

    out: Path
    dtype: str
    parameters: dict[str, int]
    num_bytes: int
    source: Source | None

    @classmethod
    def of(
        cls, out: Path, dtype: np.dtype, parameters: dict[str, int], source: Source | None
    ) -> "Report":
        """Reports on a folder that has been written."""
        return cls(
            out=out,
            dtype=dtype.name,
            parameters=parameters,
            num_bytes=(out / WEIGHTS_FILE).stat().st_size,
            source=source,
        )

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
            lines += [f"  {part} from {key!r}" for part, key in self.source.keys.items()]
            lines += [f"  left out {name}: {why}" for name, why in self.source.dropped.items()]
        return "\n".join(lines)


def convert(
    source: str,
    out: str | Path,
    *,
    dtype: DTypeName | None = None,
    revision: str | None = None,
    key: str | None = None,
    hints: Hints = NO_HINTS,
    areas: AreaOptions | None = None,
    force: bool = False,
) -> Report:
    """Converts a checkpoint of V-JEPA 2, 2.1 or 2-AC into a folder that `jvjepa.load` reads.

    Every tensor of the source is used or dropped by name with a reason, every parameter is filled,
    shapes are checked, and values are finite. `out` appears whole or not at all. Memory holds one
    tensor at a time.

    Args:
        source: a Hugging Face folder, a `.pt` file of Meta's, a released checkpoint's name, or a
            hub id; see `jvjepa.convert.hub`.
        out: the folder to make.
        dtype: of the parameters to write; None takes the source's, float32 or bfloat16.
        revision: the hub's branch, tag or commit.
        key: of a `.pt` file: which encoder to take, "target_encoder", "ema_encoder" or "encoder";
            None takes what Meta's hub loads.
        hints: of a `.pt` file of no released size: what its shapes do not say.
        areas: area attention to be stored with the encoder; None stores full attention.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: the source cannot be read, is of another kind, or is damaged; or `out` exists.
    """
    out = Path(out)
    check_dtype(dtype)
    check_free(out, WEIGHTS_FILE, force=force)
    with open_original(source, revision=revision, key=key, hints=hints) as original:
        check_apart(out, original.path)
        weights, wanted = original.weights, original.entries
        check_names(str(original.path), weights.shapes, expected_shapes(wanted))
        target = target_dtype(weights.tensors, dtype)
        config, record = original.config, original.record()
        if areas is not None:
            config = dataclasses.replace(config, encoder=areas.of(config.encoder))
        pieces = progress(read_pieces(weights, wanted, target), len(wanted), "converting")
        with new_folder(out, WEIGHTS_FILE, force=force) as work:
            write_checkpoint(work, config, record, target, pieces)
    return Report.of(out, target, count_parameters(original.config), record)


def target_dtype(tensors: Mapping[str, StoredTensor], asked: DTypeName | None) -> np.dtype:
    """Says in which dtype parameters are written.

    Args:
        tensors: what is converted.
        asked: the user's wish, or None.

    Returns:
        The wish, or the dtype of all tensors.

    Raises:
        CheckpointError: a tensor has a dtype that cannot be read.
        InputError: tensors have several dtypes, or one that we do not store, and there is no wish.
    """
    stored: dict[str, str] = {}  # dtype -> one tensor that has it
    for name, tensor in tensors.items():
        stored.setdefault(tensor.dtype, name)
    for kind, name in stored.items():
        if kind not in _STORED:
            raise CheckpointError(
                f"{tensors[name].path}: {name} is {kind}; {', '.join(_STORED)} can be read"
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


def read_pieces(
    weights: Weights | MetaWeights, wanted: Sequence[Entry], dtype: np.dtype
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Reads tensors in our layout, one at a time, for `write_checkpoint`.

    Args:
        weights: open weights.
        wanted: which tensors, in the order of `parameter_shapes`.
        dtype: of what is read.

    Yields:
        Our flat name, and a row of our tensor (or all of it, where it is not stacked).

    Raises:
        CheckpointError: a value is not finite.
    """
    for entry in wanted:
        value = entry.take(weights.read(entry.theirs)).astype(dtype, copy=False)
        if not np.isfinite(value).all():
            path = weights.tensors[entry.theirs].path
            raise CheckpointError(
                f"{path}: {entry.theirs} holds values that are not finite in {dtype}"
            )
        yield entry.ours, value if entry.layer is None else value[None]
