"""Files that are whole or not there: atomic folders, and safetensors written tensor by tensor."""

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jvjepa.errors import CheckpointError, InputError

_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones too


@contextlib.contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an error.

    Whatever goes wrong, `path` is left as it was: absent, or the old folder.

    Args:
        path: the folder to make.
        force: replace `path` where it exists.

    Yields:
        The folder to write into, on the same file system.

    Raises:
        InputError: `path` exists and `force` is False, or its parent is not a folder.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another name or pass --force to replace it")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; make it first")
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    os.chmod(work, 0o755)  # mkdtemp's own mode hides the result from other users
    try:
        yield work
        if path.exists():
            old = work.with_suffix(".old")
            os.rename(path, old)
            try:
                os.rename(work, path)
            except OSError:
                os.rename(old, path)
                raise
            _remove(old)
        else:
            os.rename(work, path)
    finally:
        if work.exists():
            _remove(work)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` that is renamed to `path` when the block ends well."""
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; make it first")
    work = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file while its tensors are still being made.

    The safetensors library wants all tensors in memory at once; this holds one piece at a time.

    Args:
        path: the file.
        shapes: name and shape of every tensor, in the order in which they arrive.
        dtype: of all of them: float32, float16 or bfloat16.
        tensors: (name, piece) pairs; a tensor may come in several consecutive pieces, which are its
            rows along the first axis. A piece has `dtype`.
        metadata: strings for the file's `__metadata__`.

    Raises:
        CheckpointError: what arrives is not what `shapes` promises.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    names = iter(shapes)
    current, left = "", 0
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name, piece in tensors:
            if left == 0:
                current = next(names, "")
                left = sizes.get(current, 0)
            if name != current or piece.size > left or piece.dtype != dtype:
                raise CheckpointError(
                    f"writing {path}: {name} {piece.dtype} {piece.shape} arrived where "
                    f"{left} values of {current} {dtype} were due"
                )
            file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            left -= piece.size
        if left or next(names, None) is not None:
            raise CheckpointError(f"writing {path}: the tensors ended at {current}, others are due")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file for reading tensor by tensor.

    Args:
        path: the file.

    Yields:
        The library's open file: `keys()`, `get_tensor(name)`, `get_slice(name)`, `metadata()`.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or names a tensor twice.
    """
    try:
        _check_unique(path)
        file = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not whole: {error}") from None
    with file:
        yield file


def _check_unique(path: Path) -> None:
    """Raises ValueError if the header names a tensor twice, which the library would not mind."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        encoded = file.read(min(length, _MAX_HEADER))

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"its header names {', '.join(twice)} twice")
        return dict(pairs)

    if len(encoded) == length:  # else the library says better what is wrong
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(encoded, object_pairs_hook=unique)
