import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jvjepa.errors import CheckpointError, InputError
from jvjepa.storage import check_free, new_file, new_folder, open_safetensors, write_safetensors

F32 = np.dtype(np.float32)
MARK = "old.txt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / MARK).write_text(text)
    return path


# --- new_folder ---------------------------------------------------------------------------------


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", MARK) as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert work.parent == tmp_path
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_new_folder_leaves_things_as_they_were(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    if exists:
        make_folder(tmp_path / "out", "old")

    def fail() -> None:
        with new_folder(tmp_path / "out", MARK, force=True) as work:
            (work / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["out"] if exists else [])
    if exists:
        assert (tmp_path / "out" / "old.txt").read_text() == "old"


def test_new_folder_puts_the_old_one_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_folder(tmp_path / "out", "old")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), new_folder(out, MARK, force=True):
        pass
    assert names(tmp_path) == ["out"]
    assert (out / "old.txt").read_text() == "old"


def test_new_folder_refuses_what_exists(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "old")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("out", "dangling"):
        with pytest.raises(InputError, match=f"{name} exists; .* --force"):
            check_free(tmp_path / name, MARK, force=False)
        with pytest.raises(InputError, match=f"{name} exists; .* --force"):
            new_folder(tmp_path / name, MARK).__enter__()
    assert names(tmp_path) == ["dangling", "out"]


def test_new_folder_refuses_what_appears_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"), new_folder(tmp_path / "out", MARK):
        make_folder(tmp_path / "out", "other")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old.txt").read_text() == "other"


def test_new_folder_replaces_with_force(tmp_path: Path) -> None:
    real = make_folder(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(real)
    make_folder(tmp_path / "out", "old")
    for name in ("out", "link"):
        with new_folder(tmp_path / name, MARK, force=True) as work:
            (work / "new.txt").write_text("new")
        assert names(tmp_path / name) == ["new.txt"]
    assert names(tmp_path) == ["link", "out", "real"]
    assert names(real) == ["old.txt"]  # the link is replaced, not what it points to


@pytest.mark.parametrize("inside", ["src/a.py", "config.json", None])
def test_new_folder_replaces_nothing_of_another_kind(tmp_path: Path, inside: str | None) -> None:
    out = tmp_path / "out"
    if inside is None:
        out.write_text("a file")
        message = "out is a file; only"
    else:
        (out / inside).parent.mkdir(parents=True)
        (out / inside).write_text("mine")
        message = f"out holds {inside.partition('/')[0]}; only an empty folder or one with old.txt"
    (tmp_path / "link").symlink_to(out)
    for path in (out, tmp_path / "link"):
        message = message.replace("out", path.name, 1)
        with pytest.raises(InputError, match=f"{message}.*; choose another name, or remove it"):
            check_free(path, MARK, force=True)
        with pytest.raises(InputError, match=message):
            new_folder(path, MARK, force=True).__enter__()
        message = message.replace(path.name, "out", 1)
    assert names(tmp_path) == ["link", "out"]
    assert (out if inside is None else out / inside).read_text() in ("a file", "mine")


def test_new_folder_replaces_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", MARK, force=True) as work:
        (work / MARK).write_text("new")
    assert names(tmp_path / "out") == [MARK]


def test_new_folder_looks_again_at_what_appears_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"holds old\.txt; only an empty folder or one with new"),
        new_folder(tmp_path / "out", "new.txt", force=True),
    ):
        make_folder(tmp_path / "out", "other")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old.txt"]


def test_new_folder_wants_a_parent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        new_folder(tmp_path / "nowhere" / "out", MARK).__enter__()


def test_new_folder_restores_the_signal_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with new_folder(tmp_path / "out", MARK):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = (
        "import sys, time; from pathlib import Path; from jvjepa.storage import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 'a') as work:\n"
        "    (work / 'a').write_text('1'); print('ready', flush=True); time.sleep(60)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", script, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(names(tmp_path)) == 1
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == code
    assert names(tmp_path) == []


# --- new_file -----------------------------------------------------------------------------------


def test_new_file_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with new_file(path) as work:
        work.write_text("1")
        assert work.suffix == ".npz"  # numpy.savez would add it
    assert path.read_text() == "1"

    def fail() -> None:
        with new_file(path) as work:
            work.write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a.npz"]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        new_file(tmp_path / "nowhere" / "a").__enter__()


# --- safetensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "z/stack": rng.normal(size=(4, 3, 5)).astype(dtype),
        "a": rng.normal(size=(7,)).astype(dtype),
        "é": rng.normal(size=(2, 1)).astype(dtype),
    }
    pieces = [
        ("z/stack", tensors["z/stack"][:1]),
        ("z/stack", tensors["z/stack"][1:4]),
        ("a", tensors["a"]),
        ("é", np.asfortranarray(tensors["é"])),
    ]
    shapes = {name: value.shape for name, value in tensors.items()}
    path = tmp_path / "w.safetensors"
    write_safetensors(path, shapes, np.dtype(dtype), pieces, {"format": "x"})
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert read[name].tobytes() == value.tobytes()
    with open_safetensors(path) as file:
        assert file.metadata() == {"format": "x"}
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0


SHAPES = {"a": (2, 3), "b": (4,)}
A, B = np.zeros((2, 3), np.float32), np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("b", B), ("a", A)], "b .* arrived where 6 values of a float32 were due"),
        ([("a", A)], "ended at a"),
        ([("a", A), ("b", B[:3])], "ended at b"),
        ([("a", A), ("b", B[:3]), ("b", B[:2])], "where 1 values of b"),
        ([("a", A), ("b", B), ("c", B)], "c .* where no more tensors were due"),
        ([("a", A), ("b", B), ("b", B)], "b .* where no more tensors were due"),
        ([("a", A.astype(np.float64))], "a float64"),
        ([("a", A.reshape(3, 2))], r"a float32 \[3, 2\]"),
        ([("a", A.reshape(6))], r"a float32 \[6\]"),
    ],
)
def test_write_refuses_what_was_not_promised(
    tmp_path: Path, pieces: list[tuple[str, np.ndarray]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "w", SHAPES, F32, pieces, {})


def damaged(tmp_path: Path, edit: str) -> Path:
    path = tmp_path / "w.safetensors"
    save_file({"a": A, "b": B}, path)
    content = path.read_bytes()
    if edit == "truncated":
        path.write_bytes(content[:-1])
    elif edit == "header only":
        path.write_bytes(content[:20])
    elif edit == "empty":
        path.write_bytes(b"")
    elif edit == "no header":
        path.write_bytes(b"\xff" * 64)
    elif edit == "twice":
        entry = json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})
        header = f'{{"a": {entry}, "a": {entry}}}'.encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + B.tobytes())
    return path


@pytest.mark.parametrize("edit", ["truncated", "header only", "empty", "no header"])
def test_open_refuses_damage(tmp_path: Path, edit: str) -> None:
    with pytest.raises(CheckpointError, match=r"w\.safetensors is not whole"):
        open_safetensors(damaged(tmp_path, edit)).__enter__()


def test_open_refuses_a_tensor_that_is_named_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.safetensors .* names a twice"):
        open_safetensors(damaged(tmp_path, "twice")).__enter__()


def test_open_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.safetensors does not exist"):
        open_safetensors(tmp_path / "w.safetensors").__enter__()
