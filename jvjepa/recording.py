"""Results of an endless stream, kept on disk as they come, and packed into one .npz at the end."""

import contextlib
import json
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jvjepa.errors import InputError
from jvjepa.storage import check_apart, new_file

_BLOCK = 1024  # rows that are copied at a time


def check_output(
    path: Path, *, suffix: str, force: bool, sources: Iterable[str | Path | None] = ()
) -> None:
    """Raises InputError unless a file can be written there.

    Args:
        path: the file.
        suffix: the ending that it must have, ".npz" say.
        force: whether it may exist.
        sources: what is read, and must stay; see `jvjepa.storage.check_apart`.

    Raises:
        InputError: wrong ending, no such folder, the file exists, it is a folder, or it is a
            source or a file of one.
    """
    if path.suffix != suffix:
        raise InputError(f"{path} must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} is not a folder; make it first")
    if path.is_dir():
        raise InputError(f"{path} is a folder; choose another name")
    check_apart(path, *sources)
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another name or pass --force to replace it")


class Recorder:
    """Appends rows of several columns; memory does not grow with their number.

    The rows are in a file without a name, in the output's folder, until `save` packs them into the
    .npz, which appears whole or not at all. So nothing else is left behind, whatever happens.

    Args:
        path: the .npz to make.
        columns: dtype and shape of one row of each column.
    """

    def __init__(self, path: Path, columns: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        """Opens the file of rows."""
        self.path, self.rows = path, 0
        self._row = np.dtype([(name, dtype, shape) for name, (dtype, shape) in columns.items()])
        with named(path):
            self._file = tempfile.TemporaryFile(dir=path.absolute().parent)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk: whoever wanted the rows was told
            self._file.close()

    def append(self, row: Mapping[str, object]) -> None:
        """Adds one row: a value for every column."""
        record = np.zeros((), self._row)
        for name in self._row.names:
            record[name] = np.asarray(row[name]).reshape(self._row[name].shape)
        with named(self.path):
            self._file.seek(self.rows * self._row.itemsize)  # whatever was interrupted before
            self._file.write(record.tobytes())
        self.rows += 1

    def save(self) -> None:
        """Writes the .npz with all rows so far."""
        with (
            named(self.path),
            new_file(self.path) as work,
            zipfile.ZipFile(work, "w", allowZip64=True) as archive,
        ):
            for name in self._row.names:
                column = self._row[name]
                header = {
                    "descr": np.lib.format.dtype_to_descr(column.base),
                    "fortran_order": False,
                    "shape": (self.rows, *column.shape),
                }
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array_header_1_0(entry, header)
                    for block in self._blocks():
                        entry.write(block[name].tobytes())

    def _blocks(self) -> Iterator[np.ndarray]:
        """All rows, a number of them at a time; what an interrupted `append` left is no row."""
        self._file.seek(0)
        for done in range(0, self.rows, _BLOCK):
            count = min(_BLOCK, self.rows - done)
            yield np.frombuffer(self._file.read(count * self._row.itemsize), self._row)


class Thumbnails:
    """A bounded number of small pictures, evenly spread over a stream whose length is not known.

    Args:
        limit: pictures kept at most; at least 2.
        width: pixels of a picture's longer side.
    """

    def __init__(self, limit: int = 64, width: int = 160) -> None:
        """Begins with none."""
        self.limit, self.width = limit, width
        self.kept: list[tuple[float, np.ndarray]] = []
        self._stride, self._count = 1, 0

    def add(self, time: float, frame: np.ndarray) -> None:
        """Offers uint8 [H, W, 3]; it is kept if it is its turn."""
        if self._count % self._stride == 0:
            step = max(1, max(frame.shape[:2]) // self.width)
            self.kept.append((time, frame[::step, ::step].copy()))
        self._count += 1
        if len(self.kept) == self.limit:
            del self.kept[1::2]
            self._stride *= 2


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz that appears whole or not at all."""
    with named(path), new_file(path) as work:
        np.savez(work, **arrays)


def save_json(path: Path, record: Mapping[str, object]) -> None:
    """Writes a .json that appears whole or not at all."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    with named(path), new_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Lets an OSError name the output: a full disk's names nothing, others a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None
