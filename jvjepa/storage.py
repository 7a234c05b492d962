"""Files that are whole or not there: atomic folders, and safetensors written tensor by tensor."""

import contextlib
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
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
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones too


def check_free(path: Path, mark: str, *, force: bool) -> None:
    """Raises InputError where `new_folder` would, so that long work need not begin.

    Args:
        path: the folder to make.
        mark: the name of a file that every folder of its kind has.
        force: whether it may exist.

    Raises:
        InputError: `path` exists, and `force` is False or it cannot be replaced; or its parent is
            not a folder.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists; choose another name or pass --force to replace it")
    check_replaceable(path, mark)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; make it first")


def check_replaceable(path: Path, mark: str) -> None:
    """Raises InputError where replacing a folder might remove something else.

    Args:
        path: the folder.
        mark: as in `check_free`.

    Raises:
        InputError: `path` is a file, or a folder that has other files and not this one.
    """
    if not os.path.lexists(path):
        return
    what = "is a file"
    if path.is_dir():
        names = sorted(os.listdir(path))
        if not names or mark in names:
            return
        shown = ", ".join(names[:5]) + (", .." if len(names) > 5 else "")
        what = f"holds {shown}"
    raise InputError(
        f"{path} {what}; only an empty folder or one with {mark} is replaced; choose another "
        "name, or remove it yourself"
    )


def check_apart(out: Path, *sources: str | Path | None) -> None:
    """Raises InputError where replacing `out` would remove what is read.

    Args:
        out: the file or folder to write.
        sources: files and folders. Nothing can happen to URLs, nor to what is not there; None is
            an option that was not given.

    Raises:
        InputError: `out` is one of the sources, holds one, or is a file in one.
    """
    there = Path(os.path.abspath(out))
    for source in sources:
        if source is None or not (os.path.exists(source) and os.path.exists(there)):
            continue
        # Of a link to a source both places stay: the one has the data, the other is its name.
        places = (Path(os.path.abspath(source)), Path(os.path.realpath(source)))
        if there.samefile(source):
            how = "is"
        elif any(there.samefile(folder) for place in places for folder in place.parents):
            how = "holds"
        elif there.is_file() and any(folder.samefile(source) for folder in there.parents):
            how = "is a file of"
        else:
            continue
        raise InputError(f"{out} {how} the source, {source}; choose another name for the result")


@contextlib.contextmanager
def new_folder(path: Path, mark: str, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends without an error.

    Whatever goes wrong, `path` is left as it was: absent, or the old folder. A SIGTERM that nobody
    handles ends the process as usual, but after the temporary folder is removed.

    Args:
        path: the folder to make.
        mark: the name of a file that every folder of its kind has, and this one will have.
        force: replace `path` where it is an empty folder or has such a file.

    Yields:
        The folder to write into, on the same file system.

    Raises:
        InputError: as `check_free`.
    """
    check_free(path, mark, force=force)
    path = Path(os.path.abspath(path))
    with _exit_on_sigterm():
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        old = work.with_suffix(".old")
        try:
            os.chmod(work, 0o755)  # mkdtemp's own mode hides the result from other users
            yield work
            check_free(path, mark, force=force)  # somebody may have made it meanwhile
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(work, path)
        finally:
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            for leftover in (work, old):
                if os.path.lexists(leftover):
                    _remove(leftover)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM, if it would kill the process, raise SystemExit, so that cleanup runs."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)  # what a shell reports for a process that the signal killed

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    dtype: np.dtype | Mapping[str, np.dtype],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file while its tensors are still being made.

    The safetensors library wants all tensors in memory at once; this holds one piece at a time.

    Args:
        path: the file.
        shapes: name and shape of every tensor, in the order in which they arrive.
        dtype: of all of them, or of each by name: float32, float16, bfloat16, int8 or uint8.
        tensors: (name, piece) pairs; a tensor may come in several consecutive pieces, which are its
            rows along the first axis. A piece has its tensor's dtype.
        metadata: strings for the file's `__metadata__`.

    Raises:
        CheckpointError: what arrives is not what `shapes` promises.
    """
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtypes[name]],
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
            rows = name == current and piece.shape[1:] == tuple(shapes[name][1:])
            if not rows or piece.size > left or piece.dtype != dtypes[name]:
                due = (
                    f"{left} values of {current} {dtypes[current]}"
                    if current
                    else "no more tensors"
                )
                raise CheckpointError(
                    f"writing {path}: {name} {piece.dtype} {list(piece.shape)} arrived where "
                    f"{due} were due"
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
