"""A disk that is full: an error that names the place, and no traceback."""

from pathlib import Path

import pytest
from commandline import refused, small_files
from exports import planned, tiny

from jvjepa.convert.random_checkpoint import save_random_checkpoint
from jvjepa.export import stablehlo
from jvjepa.export.artefact import weights_of


def test_the_demos_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    with small_files(100_000):
        message = refused(capfd, "demo", "--out", folder)
    assert message.startswith(f"{folder / 'huggingface'}: ")
    assert "File too large" in message


def test_the_demos_config(tmp_path: Path) -> None:
    with small_files(100), pytest.raises(OSError, match="File too large"):
        save_random_checkpoint(tmp_path / "huggingface")


def test_the_weights_of_a_program(tmp_path: Path) -> None:
    model = tiny()
    one, options = planned("clip", model, format="stablehlo", platforms=("cpu",))
    weights = weights_of(model, one.parts, None)
    size = sum(array.nbytes for array in weights.arrays.values())
    path = tmp_path / "clip.stablehlo"
    with small_files(size), pytest.raises(OSError, match="File too large"):
        stablehlo.write(path, one, model, weights, options)
    assert 0 < path.stat().st_size < size
