"""Results of an endless stream, kept on disk as they come, and packed into one .npz at the end."""

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from jvjepa.errors import InputError
from jvjepa.storage import new_file


def check_output(path: Path, *, suffix: str, force: bool) -> None:
    """Raises InputError unless a file can be written there.

    Args:
        path: the file.
        suffix: the ending that it must have, ".npz" say.
        force: whether it may exist.

    Raises:
        InputError: wrong ending, no such folder, or the file exists.
    """
    if path.suffix != suffix:
        raise InputError(f"{path} must end in {suffix}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} is not a folder; make it first")
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another name or pass --force to replace it")


class Recorder:
    """Appends rows of several columns; memory does not grow with their number.

    Each column is a raw file beside the output until `save` packs them into the .npz, which appears
    whole or not at all. A process that is killed leaves the raw files (`.NAME.COLUMN.part`).

    Args:
        path: the .npz to make.
        columns: dtype and shape of one row of each column.
    """

    def __init__(self, path: Path, columns: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        """Opens the raw files."""
        self.path, self.columns, self.rows = path, columns, 0
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "Recorder":
        for name in self.columns:
            self._files[name] = open(self._part(name), "wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, file in self._files.items():
            file.close()
            self._part(name).unlink(missing_ok=True)

    def append(self, row: Mapping[str, object]) -> None:
        """Adds one row: a value for every column."""
        for name, (dtype, shape) in self.columns.items():
            self._files[name].write(np.asarray(row[name], dtype).reshape(shape).tobytes())
        self.rows += 1

    def save(self) -> None:
        """Writes the .npz with all rows so far."""
        with new_file(self.path) as work, zipfile.ZipFile(work, "w", allowZip64=True) as archive:
            for name, (dtype, shape) in self.columns.items():
                self._files[name].flush()
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": (self.rows, *shape),
                }
                with (
                    archive.open(f"{name}.npy", "w", force_zip64=True) as entry,
                    open(self._part(name), "rb") as raw,
                ):
                    np.lib.format.write_array_header_1_0(entry, header)
                    shutil.copyfileobj(raw, entry, 1 << 20)

    def _part(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.stem}.{os.getpid()}.{name}.part")


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
    with new_file(path) as work:
        np.savez(work, **arrays)
