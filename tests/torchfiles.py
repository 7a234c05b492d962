"""Files as torch.save writes them, and damaged ones. Importing this imports torch."""

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jvjepa.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "vjepa2_tiny.pt"
DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 bool".split()
DTYPES += "int64 int32 int16 int8 uint64 uint32 uint16 uint8".split()
per_channel = torch.quantize_per_channel
ODD: list[tuple[Callable[[], object], str]] = [
    (lambda: torch.eye(3).to_sparse(), "a sparse tensor (torch.sparse_coo)"),
    (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor (torch.sparse_csr)"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a tensor of torch.q"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint32), "a tensor of torch"),
    (lambda: per_channel(torch.ones(2, 2), *torch.ones(2, 2), 0, torch.quint8), "a tensor of to"),
    (lambda: torch.ones(2, dtype=torch.complex64), "a tensor of torch.complex64"),
    (lambda: torch.ones(3, device="meta"), "a tensor without values"),
    (lambda: "vitl", "no tensor but str"),
    (lambda: 0.5, "no tensor but 0.5"),
    (lambda: None, "no tensor but None"),
    (lambda: {"x": torch.ones(1)}, "no tensor but dict of 1"),
]


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def checkpoint(folder: Path) -> Path:
    """A checkpoint to damage."""
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parts = {"weight": values, "bias": values[0].clone(), "view": values[1:, :2]}
    return saved(folder / "vitl.pt", {"encoder": parts, "epoch": 3})


def rezip(path: Path, edit: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Zips a file again, each record changed by its name without the folder, or left out."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in records.items():
            if (changed := edit(name.partition("/")[2], content)) is not None:
                file.writestr(name, changed)


def with_pickle(path: Path, pickled: bytes) -> Path:
    rezip(path, lambda name, content: pickled if name == "data.pkl" else content)
    return path


@contextlib.contextmanager
def refused(path: Path, *words: str) -> Iterator[None]:
    """Expects one line about the file that has all the words."""
    with pytest.raises(CheckpointError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
