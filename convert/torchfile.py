"""Torch's `.pt` files, read tensor by tensor."""

import contextlib
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jvjepa.convert.source import StoredTensor
from jvjepa.convert.torchpickle import DTYPES, NUMPY_SCALAR, Archive, open_archive
from jvjepa.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

# Of NumPy numbers, which are read; an array is not, nor a number of another kind.
_NUMPY_KINDS = ("bool", "int32", "int64", "float32", "float64")
# A pickle that is whole but wrong makes torch call its own functions with wrong values.
_WRONG_VALUES = (AssertionError, AttributeError, LookupError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchWeights:
    """One state dict of a `.pt` file, with the face of `jvjepa.convert.source.Weights`.

    Args:
        tensors: every tensor by name.
        values: torch's tensors by name: views of the file, which is mapped into memory.
        archive: the file.
    """

    tensors: dict[str, StoredTensor]
    values: "dict[str, torch.Tensor]"
    archive: Archive

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor into memory: its very bits, in row-major order."""
        import torch

        value = self.values[name].detach().resolve_neg()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
        kind = str(value.dtype).removeprefix("torch.")
        dtype = np.dtype(getattr(ml_dtypes, kind, kind))
        return np.array(value.view(bits).numpy(), order="C").view(dtype)

    def sha256(self) -> str:
        """Hexadecimal digest of the whole file's bytes, of which every record's checksum is tried.

        Raises:
            CheckpointError: a record is not what was saved.
        """
        return self.archive.sha256()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchFile:
    """An open `.pt` file. Tensors stay on disk until they are read.

    Args:
        path: the file.
        top: what was saved, a dictionary; its tensors are views of the file.
        archive: the file's records.
    """

    path: Path
    top: dict[Any, Any]
    archive: Archive

    @property
    def parts(self) -> "dict[str, dict[str, torch.Tensor]]":
        """Every state dict by name, its tensors not read yet.

        A name is a key of the file, like "target_encoder", with an index where the key has a list
        of state dicts: "classifiers[0]". A file that is a state dict itself is the part "".
        """
        parts = _state_dicts("", self.top)
        for key, value in self.top.items():
            parts |= _state_dicts(str(key), value)
        return parts

    @property
    def others(self) -> dict[str, str]:
        """What else there is, by key, in a word or two: "3" for an epoch, "dict of 2", "str"."""
        return {
            str(key): _describe(value)
            for key, value in self.top.items()
            if not _is_tensor(value) and not _state_dicts(str(key), value)
        }

    def part(self, key: str, index: int | None = None) -> TorchWeights:
        """Opens one state dict.

        Args:
            key: a name in `parts`, or the key of a list of state dicts.
            index: which of the list.

        Returns:
            Its tensors, not read yet.

        Raises:
            CheckpointError: there is no such state dict, or an entry of it is not a dense tensor of
                real numbers.
        """
        name = key if index is None else f"{key}[{index}]"
        parts = self.parts
        if name not in parts:
            raise CheckpointError(f"{self.path} has no state dict {name!r}; it holds {self}")
        tensors = {}
        for entry, value in parts[name].items():
            problem = _problem(entry, value)
            if problem:
                inside = f" of {name}" if name else ""
                raise CheckpointError(
                    f"{self.path}: {entry}{inside} is {problem}; a dense tensor of real numbers "
                    f"would be right"
                )
            dtype = DTYPES[str(value.dtype)]
            tensors[entry] = StoredTensor(path=self.path, shape=tuple(value.shape), dtype=dtype)
        return TorchWeights(tensors=tensors, values=parts[name], archive=self.archive)

    def __str__(self) -> str:
        """What it holds, in one line."""
        parts = (f"{name or 'tensors'} ({len(part)})" for name, part in self.parts.items())
        others = (f"{key} ({value})" for key, value in self.others.items())
        return ", ".join([*parts, *others]) or "nothing"


@contextlib.contextmanager
def open_torch(path: str | Path) -> Iterator[TorchFile]:
    """Opens what torch.save wrote, for reading tensor by tensor.

    Nothing in the file is run: it is looked through first, and torch loads it with
    `weights_only=True`. It is mapped into memory, and only the list of its tensors is read. Tensors
    that were saved on a GPU arrive on the CPU.

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, holds code, or holds
            something else than a dictionary.
        InputError: torch is not installed.
    """
    path = Path(path)
    archive = open_archive(path)
    top = _load(path)
    if not isinstance(top, dict):
        raise CheckpointError(f"{path} holds a {_describe(top)}; a dictionary would be right")
    yield TorchFile(path=path, top=top, archive=archive)


def _load(path: Path) -> object:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError(f"{path} needs torch: pip install 'jvjepa[torch]' brings it") from None
    numbers = [np.dtype, *(type(np.dtype(kind)) for kind in _NUMPY_KINDS)]
    numbers += [(np.float64(0).__reduce__()[0], name) for name in NUMPY_SCALAR]
    try:
        with torch.serialization.safe_globals(numbers):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, *_WRONG_VALUES) as error:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path}: torch cannot load it: {reason}") from None


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _state_dicts(name: str, value: object) -> dict[str, dict[str, Any]]:
    """The dictionaries that hold tensors: the value itself, or what a list has."""
    found = {name: value}
    if isinstance(value, list | tuple):
        found = {f"{name}[{index}]": item for index, item in enumerate(value)}
    return {
        name: item
        for name, item in found.items()
        if isinstance(item, dict) and any(map(_is_tensor, item.values()))
    }


def _describe(value: object) -> str:
    if isinstance(value, dict | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int | float | None):
        return str(value)
    return "tensor" if _is_tensor(value) else type(value).__name__


def _problem(entry: object, value: Any) -> str:
    """Says why an entry of a state dict cannot be read; empty if it can."""
    import torch

    if not isinstance(entry, str):
        return f"keyed by {type(entry).__name__}, not by a name"
    if not isinstance(value, torch.Tensor):
        return f"no tensor but {_describe(value)}"
    if value.is_meta:
        return "a tensor without values (on the meta device)"
    if str(value.dtype) not in DTYPES:
        return f"a tensor of {value.dtype}"
    return "" if value.layout == torch.strided else f"a sparse tensor ({value.layout})"
