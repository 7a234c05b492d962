"""What can be tested of TensorRT without it: what is written for it, and what is refused."""

import dataclasses
import hashlib
import sys
import types
from pathlib import Path

import pytest

from jvjepa.errors import CheckpointError, InputError
from jvjepa.export import tensorrt
from jvjepa.export.manifest import Entry, File, Manifest, Port, read
from jvjepa.export.tensorrt import Stamp, TensorRTSession, read_stamp, stamp_of, trtexec


def _file(data: bytes) -> File:
    return File(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


HERE = Stamp(
    tensorrt="11.4.0", gpu="Orin", compute_capability="8.7", onnx_sha256="0" * 64, max_batch=0
)
FIXED = Entry(
    files={"clip.onnx": _file(b"onnx")},
    inputs=(Port("video", (1, 16, 256, 256, 3)),),
    outputs=(Port("tokens", (1, 2048, 1024)),),
    parity={},
    tolerance=1e-4,
)
OPEN = dataclasses.replace(
    FIXED, inputs=(Port("tubelet", ("batch", 2, 64, 64, 3)), Port("time", ("batch",), "int32"))
)


@pytest.mark.parametrize("field", ["tensorrt", "gpu", "compute_capability"])
def test_an_engine_of_another_machine(tmp_path: Path, field: str) -> None:
    path = tmp_path / "clip.engine"
    HERE.check(path, HERE)
    HERE.check(path, dataclasses.replace(HERE, onnx_sha256="", max_batch=8))
    there = dataclasses.replace(HERE, **{field: "other"})
    mine = getattr(HERE, field)
    match = f"clip.engine was built with {field} = {mine}, and this machine has other; build"
    with pytest.raises(CheckpointError, match=match):
        HERE.check(path, there)


def test_a_stamp_that_is_missing_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "clip.engine"
    with pytest.raises(CheckpointError, match=r"clip.engine.json is missing"):
        read_stamp(path)
    for text in ("{", '{"gpu": "Orin"}', "[]"):
        stamp_of(path).write_text(text)
        with pytest.raises(CheckpointError, match="is not the stamp of an engine"):
            read_stamp(path)


def test_trtexec_of_a_fixed_and_an_open_batch() -> None:
    fixed = trtexec("clip.onnx", FIXED)
    assert fixed.startswith("trtexec --onnx=clip.onnx --saveEngine=clip.engine --stronglyTyped")
    assert "Shapes" not in fixed
    text = trtexec("step.onnx", OPEN, max_batch=4)
    assert "--minShapes=tubelet:1x2x64x64x3,time:1 --optShapes=tubelet:1x2x64x64x3,time:1" in text
    assert text.endswith("--maxShapes=tubelet:4x2x64x64x3,time:4")


def _folder(path: Path, runtime: str = "onnx") -> Path:
    (path / "clip.onnx").write_bytes(b"onnx")
    manifest = Manifest(
        runtime=runtime,
        artefacts={"clip": FIXED},
        model={},
        crop_size=256,
        stream=None,
        labels=None,
        precision="float32",
        versions={},
    )
    manifest.write(path)
    return path


def test_without_tensorrt_nothing_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert not tensorrt.installed()
    assert tensorrt.main([str(_folder(tmp_path))]) == 2
    assert "is not installed; no engine was built" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs TensorRT, which is not installed"):
        TensorRTSession(tmp_path / "clip.engine", FIXED)
    assert read(tmp_path).runtime == "onnx"


def test_a_tensorrt_without_its_parser_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    assert not tensorrt.installed()


def test_folders_that_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tensorrt.main([str(tmp_path)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err
    assert tensorrt.main([str(_folder(tmp_path, "litert"))]) == 2
    assert "was exported for litert; engines are built of onnx" in capsys.readouterr().err
    (_folder(tmp_path) / "clip.onnx").unlink()
    assert tensorrt.main([str(tmp_path)]) == 2
    assert "clip.onnx is missing" in capsys.readouterr().err


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The building itself is TensorRT's and was not run; what it gives is the last of a list."""
    made = [b"engine"]

    def build(onnx: Path, entry: Entry, **how: int) -> Path:
        assert onnx.read_bytes() == b"onnx"
        assert how == {"workspace_mb": 100, "max_batch": 2}
        path = onnx.with_suffix(".engine")
        path.write_bytes(made[-1])
        stamp_of(path).write_text("{}")
        return path

    monkeypatch.setattr(tensorrt, "build", build)
    return made


HOW = ["--workspace-mb", "100", "--max-batch", "2"]


def test_the_folder_names_its_engines(tmp_path: Path, engine: list[bytes]) -> None:
    assert tensorrt.main([str(_folder(tmp_path)), *HOW]) == 0
    found = read(tmp_path)
    assert found.runtime == "tensorrt"
    entry = found.entry(tmp_path, "clip")
    assert entry.files == {"clip.engine": _file(b"engine"), "clip.engine.json": _file(b"{}")}
    assert entry.sources == FIXED.files


def test_an_engine_is_built_anew(
    tmp_path: Path, engine: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """After an upgrade of TensorRT, say; the old engine may be gone."""
    command = [str(_folder(tmp_path)), *HOW]
    assert tensorrt.main(command) == 0
    engine.append(b"newer engine")
    (tmp_path / "clip.engine").unlink()
    assert tensorrt.main(command) == 0
    files = read(tmp_path).entry(tmp_path, "clip").files
    assert files["clip.engine"] == _file(b"newer engine")
    (tmp_path / "clip.onnx").write_bytes(b"xnno")
    assert tensorrt.main(command) == 2
    assert "clip.onnx is damaged" in capsys.readouterr().err
    (tmp_path / "clip.onnx").unlink()
    read(tmp_path).entry(tmp_path, "clip")  # which runs without it
    assert tensorrt.main(command) == 2
    assert "clip.onnx is missing; manifest.json lists it" in capsys.readouterr().err


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", missing)
    with pytest.raises(InputError, match="has no CUDA driver"):
        tensorrt._gpu()
