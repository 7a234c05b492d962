"""`jvjepa stream`: what it writes, what it prints, and how it ends."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import (
    CUT,
    FPS,
    FRAMES,
    MOVING,
    STILL,
    cut_short,
    listing,
    load_npz,
    refused,
    run,
    save_tiny,
    start,
    the_error,
    write_scene,
)
from numpy.typing import NDArray
from rich.console import Console
from videofiles import moving_frames, serve, write_video

import jvjepa
from jvjepa import cli, commands, gating, plot
from jvjepa.gating import Gate
from jvjepa.live import Result, Session
from jvjepa.recording import Recorder

ROWS = FRAMES // 2
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `scene.mp4`; read only."""
    folder = tmp_path_factory.mktemp("stream")
    save_tiny(folder / "model")
    write_scene(folder / "scene.mp4")
    return folder


def stream(assets: Path, out: Path, *options: str | Path) -> dict[str, NDArray[np.generic]]:
    """Streams the scene with a window of 3 and loads the result."""
    where = (assets / "model", assets / "scene.mp4", "--out", out)
    assert run("stream", *where, "--window", "3", *options) == 0
    return load_npz(out)


def by_hand(
    assets: Path, gate: Gate, *, fps: float | None = None, start: float = 0.0, **how: str
) -> dict[str, NDArray[np.generic]]:
    """The same, written out."""
    model = jvjepa.load(assets / "model")
    state = gating.init_state(model.encoder, 1, 3)
    columns: dict[str, list[object]] = {}
    frames = jvjepa.video.stream(assets / "scene.mp4", fps=fps, start=start)
    for tubelet, time in jvjepa.video.tubelets(frames):
        pixels = jvjepa.video.preprocess(tubelet, model.config)[None]
        state, out = gating.step(model.encoder, model.params["encoder"], state, pixels, gate, **how)
        row = {"embeddings": out.embedding, "is_new": out.is_new, "surprise": out.surprise}
        for name, value in row.items():
            columns.setdefault(name, []).append(np.asarray(value)[0])
        columns.setdefault("times", []).append(time)
    return {name: np.array(values) for name, values in columns.items()}


def assert_same(
    found: dict[str, NDArray[np.generic]], expected: dict[str, NDArray[np.generic]]
) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


def test_stream_writes_what_a_loop_by_hand_gives(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.npz"
    found = stream(assets, out, "--tau", "0.02")
    text, errors = capfd.readouterr()
    assert_same(found, by_hand(assets, Gate(tau=0.02)))
    assert {name: (array.dtype.str, array.shape) for name, array in found.items()} == {
        "embeddings": ("<f4", (ROWS, 48)),
        "is_new": ("|b1", (ROWS,)),
        "surprise": ("<f4", (ROWS,)),
        "times": ("<f8", (ROWS,)),
    }
    np.testing.assert_allclose(found["times"], (2 * np.arange(ROWS) + 1) / FPS, atol=1e-9)
    encoded = int(found["is_new"].sum())
    assert errors == ""
    assert "float32 on cpu, attention " in text
    assert f"{ROWS} tubelets ({FRAMES} frames) in " in text
    assert f" {encoded} encoded, {ROWS - encoded} skipped; " in text
    assert re.search(r"^median step: encoded [\d.]+ ms, skipped [\d.]+ ms$", text, re.MULTILINE)
    assert text.endswith(f"wrote {out}\n")
    assert listing(tmp_path) == ["o.npz"]


def test_the_gate_sees_the_scene_and_skipped_rows_repeat(assets: Path, tmp_path: Path) -> None:
    found = stream(assets, tmp_path / "o.npz", "--tau", "0.02")
    new = found["is_new"]
    assert new[0]
    assert np.isinf(found["surprise"][0])
    assert not new[1 : STILL // 2].any()
    assert new[STILL // 2 + 1 : (STILL + MOVING) // 2].mean() > 0.5
    assert new[(STILL + MOVING) // 2]
    assert not new[-CUT // 2 + 1 :].any()
    for i in np.flatnonzero(~new):
        np.testing.assert_array_equal(found["embeddings"][i], found["embeddings"][i - 1])
    for i in np.flatnonzero(new)[1:]:
        assert (found["embeddings"][i] != found["embeddings"][i - 1]).any()
    assert (found["surprise"][new] >= np.float32(0.02)).all()
    assert (found["surprise"][~new] < np.float32(0.02)).all()


def test_tau_0_encodes_everything(assets: Path, tmp_path: Path) -> None:
    found = stream(assets, tmp_path / "o.npz", "--tau", "0")
    assert found["is_new"].all()
    assert_same(found, by_hand(assets, Gate(tau=0.0)))


@pytest.mark.parametrize(
    ("options", "gate", "how"),
    [
        (["--max-hold", "3"], Gate(max_hold=3), {}),
        (["--max-hold", "0"], Gate(max_hold=0), {}),
        (["--settle", "2"], Gate(settle=2), {}),
        (["--reference", "previous"], Gate(reference="previous"), {}),
        (["--positions", "absolute"], Gate(), {"positions": "absolute"}),
        (["--pool", "window"], Gate(), {"pool": "window"}),
        (["--fps", "10", "--start", "1"], Gate(), {"fps": 10.0, "start": 1.0}),
    ],
)
def test_every_option_reaches_the_stream(
    assets: Path, tmp_path: Path, options: list[str], gate: Gate, how: dict[str, object]
) -> None:
    found = stream(assets, tmp_path / "o.npz", *options)
    assert_same(found, by_hand(assets, gate, **how))
    default = by_hand(assets, Gate())
    assert any(not np.array_equal(found[name], default[name]) for name in default)


def test_an_end_and_a_dtype(assets: Path, tmp_path: Path) -> None:
    exact = stream(assets, tmp_path / "a.npz", "--end", "1")
    rounded = stream(assets, tmp_path / "b.npz", "--end", "1", "--dtype", "bfloat16")
    assert len(exact["times"]) == len(rounded["times"]) == FPS // 2
    assert rounded["embeddings"].dtype == np.float32
    assert 0 < np.abs(exact["embeddings"] - rounded["embeddings"]).max() < 0.2


def test_a_plot(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "timeline.png"
    stream(assets, tmp_path / "o.npz", "--plot", picture)
    data = picture.read_bytes()
    assert data.startswith(PNG)
    assert len(data) > 10_000
    text, errors = capfd.readouterr()
    assert text.endswith(f"wrote {picture}\n")
    assert errors == ""
    assert listing(tmp_path) == ["o.npz", "timeline.png"]


@pytest.mark.parametrize("tau", ["0", "2"])
@pytest.mark.parametrize("end", ["0.1", "0.3"])
def test_a_plot_of_next_to_nothing(assets: Path, tmp_path: Path, tau: str, end: str) -> None:
    picture = tmp_path / "timeline.png"
    found = stream(assets, tmp_path / "o.npz", "--plot", picture, "--end", end, "--tau", tau)
    assert len(found["times"]) == {"0.1": 1, "0.3": 3}[end]
    assert picture.read_bytes().startswith(PNG)


def test_a_plot_of_what_is_not_finite(tmp_path: Path) -> None:
    surprise = np.array([np.inf, np.nan, 0.0, 0.1], np.float32)
    frames = [(0.0, np.zeros((8, 8, 3), np.uint8))]
    picture = tmp_path / "timeline.png"
    plot.timeline(picture, np.arange(4.0), surprise, np.ones(4, np.bool_), 0.015, frames)
    assert picture.read_bytes().startswith(PNG)


def test_force_is_for_both_files(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "o.npz", tmp_path / "timeline.png"
    where = ("stream", assets / "model", assets / "scene.mp4", "--out", out, "--plot", picture)
    picture.write_bytes(b"precious")
    message = refused(capfd, *where)
    assert message == f"{picture} exists; choose another name or pass --force to replace it"
    assert listing(tmp_path) == ["timeline.png"]
    out.write_bytes(b"precious")
    picture.unlink()
    message = refused(capfd, *where)
    assert message == f"{out} exists; choose another name or pass --force to replace it"
    assert out.read_bytes() == b"precious"
    picture.write_bytes(b"precious")
    assert run(*where, "--force") == 0
    assert len(load_npz(out)["times"]) == ROWS
    assert picture.read_bytes().startswith(PNG)
    assert listing(tmp_path) == ["o.npz", "timeline.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "0"], "window = 0"),
        (["--tau", "-0.1"], "tau = -0.1; it must be between 0 and 2"),
        (["--tau", "2.5"], "tau = 2.5; it must be between 0 and 2"),
        (["--tau", "nan"], "tau = nan; it must be between 0 and 2"),
        (["--max-hold", "-1"], "max_hold = -1; it must be 0 to 2147483647"),
        (["--settle", "-1"], "settle = -1; it must be 0 to 2147483647"),
        (["--fps", "0"], "fps = 0.0; it must be above 0"),
        (["--start", "100"], "start = 100.0 is past the end; the clip lasts 3.500 s"),
        (["--start", "2", "--end", "1"], "end = 1.0; it must be above start = 2.0"),
        (["--end", "0.04"], "scene.mp4 has no whole tubelet of 2 frames in this range"),
        (["--plot", "timeline.pdf"], "timeline.pdf must end in .png"),
        (["--plot", "none/timeline.png"], "none is not a folder; make it first"),
    ],
)
def test_stream_refuses_values(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    where = (assets / "model", assets / "scene.mp4", "--out", "o.npz")
    assert message in refused(capfd, "stream", *where, *options)
    assert listing(tmp_path) == []


def test_a_plot_without_matplotlib(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    where = (assets / "model", assets / "scene.mp4", "--out", tmp_path / "o.npz")
    message = refused(capfd, "stream", *where, "--plot", tmp_path / "timeline.png")
    assert message == "--plot needs matplotlib: pip install 'jvjepa[plot]'"
    assert listing(tmp_path) == []


def test_a_damaged_video_keeps_what_comes_before(assets: Path, tmp_path: Path) -> None:
    damaged = cut_short(assets / "scene.mp4", tmp_path / "cut.mp4", 0.7)
    out, picture = tmp_path / "o.npz", tmp_path / "timeline.png"
    process = start("stream", assets / "model", damaged, "--out", out, "--plot", picture)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    message = the_error(errors)
    found = load_npz(out)
    count = len(found["times"])
    assert 0 < count < ROWS
    assert message.startswith(f"{damaged}: ")
    assert re.search(r"at \d\.\d+ s", message)
    assert message.endswith(f"; the {count} embeddings before it are in {out}")
    assert f"wrote {out}\n" in text
    assert picture.read_bytes().startswith(PNG)
    assert listing(tmp_path) == ["cut.mp4", "o.npz", "timeline.png"]

    whole = stream(assets, tmp_path / "whole.npz", "--window", "8")
    for name, array in found.items():
        np.testing.assert_allclose(array, whole[name][:count], atol=1e-5)


def test_damage_before_the_first_tubelet_writes_nothing(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((assets / "scene.mp4").read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin : begin + 400] = bytes(400)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    out = tmp_path / "o.npz"
    message = refused(capfd, "stream", assets / "model", damaged, "--out", out)
    assert message.startswith(f"{damaged}: ")
    assert "embeddings before it" not in message
    assert listing(tmp_path) == ["damaged.mp4"]


class InterruptedSession(Session):
    """Ctrl-C comes in the step after the `after`-th."""

    after = 0

    def step(self, tubelet: jvjepa.live.Tubelet) -> Result:
        if self.seen == self.after:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(tubelet)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> type[InterruptedSession]:
    monkeypatch.setattr(commands, "Session", InterruptedSession)
    monkeypatch.setattr(InterruptedSession, "after", 0)
    return InterruptedSession


def test_ctrl_c_keeps_what_there_is(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    interrupt: type[InterruptedSession],
) -> None:
    interrupt.after = 7
    found = stream(assets, tmp_path / "o.npz", "--plot", tmp_path / "timeline.png")
    assert_same(found, {name: array[:7] for name, array in by_hand(assets, Gate()).items()})
    text, errors = capfd.readouterr()
    assert "interrupted\n7 tubelets (14 frames) in " in text
    assert errors == ""
    assert listing(tmp_path) == ["o.npz", "timeline.png"]


def test_ctrl_c_in_the_first_step_writes_nothing(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    interrupt: type[InterruptedSession],
) -> None:
    interrupt.after = 0
    out = tmp_path / "o.npz"
    assert run("stream", assets / "model", assets / "scene.mp4", "--out", out) == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert listing(tmp_path) == []


def test_a_second_ctrl_c_does_not_lose_what_is_being_saved(
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: type[InterruptedSession],
) -> None:
    real = Recorder.save

    def save(self: Recorder) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Recorder, "save", save)
    interrupt.after = 3
    assert len(stream(assets, tmp_path / "o.npz")["times"]) == 3
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == handlers


def test_interrupted_streams_are_told_from_whole_ones(
    assets: Path, tmp_path: Path, interrupt: type[InterruptedSession]
) -> None:
    options = cli.Stream(
        model=assets / "model", video=str(assets / "scene.mp4"), out=tmp_path / "a.npz"
    )
    interrupt.after = 3
    assert commands.stream_video(options, Console(quiet=True)) is None
    interrupt.after = -1
    seconds = commands.stream_video(
        cli.Stream(**{**vars(options), "out": tmp_path / "b.npz"}), Console(quiet=True)
    )
    assert seconds is not None
    assert seconds > 0


@pytest.fixture
def camera(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a live source without end: whenever it stops, it can be connected to again."""
    path = write_video(tmp_path_factory.mktemp("camera") / "live.ts", moving_frames(60), 30)
    with serve([path.read_bytes()]) as (address, _):
        yield address


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_endless_stream(
    assets: Path, tmp_path: Path, camera: str, number: signal.Signals
) -> None:
    out = tmp_path / "o.npz"
    process = start("stream", assets / "model", camera, "--out", out, "--window", "3")
    line = ""
    assert process.stdout is not None
    while "surprise" not in line:  # the first line of progress
        line = process.stdout.readline()
        assert line, process.communicate()
    assert re.fullmatch(
        r" *[\d.]+ s  surprise +\S+  (encoded|skipped) +[\d.]+ ms +[\d.]+ frames/s(  dropped \d+)?",
        line.rstrip("\n"),
    )
    process.send_signal(number)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert all("WARNING" in line and "lost" in line for line in errors.splitlines())
    found = load_npz(out)
    count = len(found["times"])
    assert count > 0
    assert {len(array) for array in found.values()} == {count}
    assert (np.diff(found["times"]) > 0).all()
    assert np.isfinite(found["embeddings"]).all()
    assert f"interrupted\n{count} tubelets" in text
    assert text.splitlines()[-1].startswith(f"wrote {out}")
    assert listing(tmp_path) == ["o.npz"]
