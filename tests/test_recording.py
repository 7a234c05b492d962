import contextlib
import io
import os
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import listing, load_npz

from jvjepa import recording
from jvjepa.errors import InputError
from jvjepa.recording import Recorder, Thumbnails, check_output, save_npz

COLUMNS = {
    "embeddings": (np.dtype(np.float32), (3,)),
    "is_new": (np.dtype(np.bool_), ()),
    "times": (np.dtype(np.float64), ()),
}


def rows(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {
        "embeddings": rng.normal(size=(count, 3)).astype(np.float32),
        "is_new": rng.random(count) < 0.5,
        "times": rng.random(count),
    }


def append(recorder: Recorder, arrays: dict[str, np.ndarray]) -> None:
    for i in range(len(arrays["times"])):
        recorder.append({name: array[i] for name, array in arrays.items()})


def assert_holds(path: Path, arrays: dict[str, np.ndarray]) -> None:
    found = load_npz(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """A file larger than 4 KiB cannot be written, as on a full disk; nor can pytest's own log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_rows_come_back_as_savez_would_store_them(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.npz"
    arrays = rows(count)
    with Recorder(path, COLUMNS) as recorder:
        append(recorder, arrays)
        assert recorder.rows == count
        assert listing(tmp_path) == []  # nothing shows before it is whole
        recorder.save()
    assert_holds(path, arrays)
    assert listing(tmp_path) == ["out.npz"]

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    buffer.seek(0)
    with np.load(buffer) as theirs, np.load(path) as ours:
        for name in theirs:
            ours_raw, theirs_raw = (z.zip.read(f"{name}.npy") for z in (ours, theirs))
            assert ours_raw == theirs_raw  # the header too


def test_save_can_be_repeated_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    first, second = rows(5), rows(7)
    with Recorder(path, COLUMNS) as recorder:
        append(recorder, first)
        recorder.save()
        assert_holds(path, first)
        recorder.save()
        assert_holds(path, first)
        append(recorder, second)
        recorder.save()
    assert_holds(path, {name: np.concatenate([first[name], second[name]]) for name in first})


def test_without_save_nothing_is_written(tmp_path: Path) -> None:
    with Recorder(tmp_path / "out.npz", COLUMNS) as recorder:
        append(recorder, rows(3))
    assert listing(tmp_path) == []


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def record() -> None:
        with Recorder(tmp_path / "out.npz", COLUMNS) as recorder:
            append(recorder, rows(3))
            raise RuntimeError("the camera fell down")

    with pytest.raises(RuntimeError, match="camera"):
        record()
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": np.zeros(4, np.float32)},
        {"embeddings": np.float32(0)},
        {"times": np.zeros(2)},
    ],
)
def test_a_row_of_another_shape_is_refused_and_is_no_row(
    tmp_path: Path, change: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "out.npz"
    arrays = rows(2)
    with Recorder(path, COLUMNS) as recorder:
        append(recorder, arrays)
        with pytest.raises(ValueError, match="reshape"):
            recorder.append({name: array[0] for name, array in arrays.items()} | change)
        with pytest.raises(KeyError, match="is_new"):
            recorder.append({"embeddings": np.zeros(3), "times": 0.0})
        recorder.save()
    assert_holds(path, arrays)


@pytest.mark.parametrize("save_between", [False, True])
def test_what_an_interrupted_append_left_is_no_row(tmp_path: Path, save_between: bool) -> None:
    class Interrupted(Recorder):
        """Ctrl-C comes when the row is written but not yet counted."""

        @property
        def rows(self) -> int:
            return self._rows

        @rows.setter
        def rows(self, value: int) -> None:
            if value == 3 and not interrupts:
                interrupts.append(value)
                raise KeyboardInterrupt
            self._rows = value

    interrupts: list[int] = []

    path = tmp_path / "out.npz"
    arrays = rows(3)
    with Interrupted(path, COLUMNS) as recorder:
        with pytest.raises(KeyboardInterrupt):
            append(recorder, arrays)
        if save_between:
            recorder.save()
            assert_holds(path, {name: array[:2] for name, array in arrays.items()})
        append(recorder, {name: array[:1] for name, array in arrays.items()})
        recorder.save()
    assert_holds(path, {name: array[[0, 1, 0]] for name, array in arrays.items()})


def test_a_full_disk_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    with small_files():
        with Recorder(path, COLUMNS) as recorder:
            with pytest.raises(OSError, match=re.escape(str(path))):
                append(recorder, rows(2000))
            with pytest.raises(OSError, match=re.escape(str(path))):
                recorder.save()
        with pytest.raises(OSError, match=re.escape(str(path))):
            save_npz(path, {"embedding": np.zeros(5000)})
    assert listing(tmp_path) == []


def test_a_failed_save_leaves_the_old_file_and_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_bytes(b"old")
    first, second = rows(190), rows(7)  # under 4 KiB as rows, over it as an .npz
    with Recorder(path, COLUMNS) as recorder:
        append(recorder, first)
        with small_files(), pytest.raises(OSError, match=re.escape(str(path))):
            recorder.save()
        assert path.read_bytes() == b"old"
        assert listing(tmp_path) == ["out.npz"]

        append(recorder, second)
        recorder.save()
    assert_holds(path, {name: np.concatenate([first[name], second[name]]) for name in first})


def test_a_folder_that_does_not_exist_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    path = tmp_path / "none" / "out.npz"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        Recorder(path, COLUMNS)


def test_save_npz(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    save_npz(path, rows(4))
    assert_holds(path, rows(4))
    save_npz(path, rows(2))
    assert_holds(path, rows(2))
    assert listing(tmp_path) == ["out.npz"]


def test_check_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.npz"
    check_output(path, suffix=".npz", force=False)
    with pytest.raises(InputError, match=r"out\.npz must end in \.png"):
        check_output(path, suffix=".png", force=True)
    with pytest.raises(InputError, match=r"/none is not a folder; make it first"):
        check_output(tmp_path / "none" / "out.npz", suffix=".npz", force=True)
    path.touch()
    with pytest.raises(InputError, match=r"out\.npz exists; .* --force"):
        check_output(path, suffix=".npz", force=False)
    check_output(path, suffix=".npz", force=True)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"out\.npz is a folder"):
        check_output(path, suffix=".npz", force=True)
    monkeypatch.chdir(tmp_path)
    check_output(Path("relative.npz"), suffix=".npz", force=False)


def test_errors_without_a_number_pass_unchanged(tmp_path: Path) -> None:
    strange = OSError("seek of closed file")
    with pytest.raises(OSError, match="seek") as caught, recording.named(tmp_path):
        raise strange
    assert caught.value is strange
    with pytest.raises(PermissionError, match=re.escape(repr(str(tmp_path)))):
        with recording.named(tmp_path):
            raise PermissionError(13, os.strerror(13), "/hidden/temporary")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_thumbnails_are_bounded_evenly_spread_and_keep_the_first(count: int) -> None:
    thumbnails = Thumbnails(limit=8)
    for i in range(count):
        thumbnails.add(float(i), np.full((6, 8, 3), i % 256, np.uint8))
        assert len(thumbnails.kept) < 8
    times = [time for time, _ in thumbnails.kept]
    if not count:
        assert times == []
        return
    stride = times[1] - times[0] if len(times) > 1 else 1.0
    assert times == [stride * i for i in range(len(times))]
    assert len(times) >= min(count, 4)
    assert count - 1 - times[-1] < stride  # up to the end
    for time, picture in thumbnails.kept:
        assert picture[0, 0, 0] == time % 256


def test_thumbnails_are_small_and_do_not_hold_on_to_the_frame() -> None:
    thumbnails = Thumbnails(width=160)
    frame = np.zeros((1080, 1920, 3), np.uint8)
    thumbnails.add(0.0, frame)
    picture = thumbnails.kept[0][1]
    assert picture.shape == (90, 160, 3)
    frame[:] = 255
    assert not picture.any()
    assert picture.base is None
    thumbnails.add(1.0, frame[:20, :30])
    assert thumbnails.kept[1][1].shape == (20, 30, 3)
