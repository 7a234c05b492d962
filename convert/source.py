"""A Hugging Face checkpoint folder: its configuration, and its weight files read one by one."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.config import ModelConfig
from jvjepa.convert.huggingface import from_hf_config
from jvjepa.errors import CheckpointError, ConfigError
from jvjepa.storage import open_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREPROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")  # newer first


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that has not been read yet.

    Args:
        path: the file that holds it.
        shape: its shape.
        dtype: its dtype in the words of safetensors: "F32", "BF16", "F16", ..
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Open weight files.

    Args:
        files: the open files by path, in the order of their names.
        tensors: every tensor by name.
    """

    files: dict[Path, safe_open]
    tensors: dict[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor into memory."""
        return self.files[self.tensors[name].path].get_tensor(name)

    def sha256(self) -> str:
        """Hexadecimal digest of the files' bytes, one after the other in the order of the names."""
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Reads `config.json`.

    Args:
        folder: the checkpoint.

    Returns:
        The object in the file, word for word, and the architecture that it describes.

    Raises:
        CheckpointError: the file is missing or not JSON.
        ConfigError: it describes another model, or an impossible or unsupported one.
    """
    path = folder / CONFIG_FILE
    values = read_object(path)
    if "model_type" not in values and "format" in values:
        raise ConfigError(
            f"{path}: {folder} is converted already; SOURCE must be a Hugging Face checkpoint"
        )
    try:
        return values, from_hf_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """Reads the preprocessing configuration, or returns None where there is none.

    Args:
        folder: the checkpoint.

    Returns:
        The object in the file, word for word.

    Raises:
        CheckpointError: the file is not JSON.
    """
    for name in PREPROCESSOR_FILES:
        if (folder / name).exists():
            return read_object(folder / name)
    return None


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Opens all weight files of a folder.

    Args:
        folder: with `model.safetensors`, or shards and their index, or shards alone.

    Yields:
        The open files.

    Raises:
        CheckpointError: there is none, one is damaged, a tensor is in two of them, or they are not
            what the index says.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors; {WEIGHTS_FILE} would be right")
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(open_safetensors(path)) for path in paths}
        tensors: dict[str, StoredTensor] = {}
        for path, file in files.items():
            for name in file.keys():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} is in {tensors[name].path} and in {path}; one of them must go"
                    )
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                tensors[name] = StoredTensor(path=path, shape=shape, dtype=part.get_dtype())
        if (folder / INDEX_FILE).exists():
            _check_index(folder / INDEX_FILE, paths, tensors)
        yield Weights(files=files, tensors=tensors)


def _check_index(index: Path, paths: list[Path], tensors: dict[str, StoredTensor]) -> None:
    promised = read_object(index).get("weight_map")
    if not isinstance(promised, dict) or not all(isinstance(f, str) for f in promised.values()):
        raise CheckpointError(f"{index} has no object 'weight_map' of tensor: file")
    there = {path.name for path in paths}
    problems = [f"{name} is missing" for name in sorted(set(promised.values()) - there)]
    problems += [f"{name} is not in it" for name in sorted(there - set(promised.values()))]
    for name, file in promised.items():
        stored = tensors.get(name)
        if file in there and (stored is None or stored.path.name != file):
            problems.append(f"{name} is not in {file}")
    problems += [f"{name} is not in it" for name in tensors if name not in promised]
    if problems:
        raise CheckpointError(
            f"{index} and the files beside it do not agree: " + "; ".join(problems)
        )


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`; raises CheckpointError where it is no object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def read_json(path: Path) -> Any:
    """Reads a JSON file of a checkpoint.

    Args:
        path: the file.

    Returns:
        What is in it.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; SOURCE must be a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
