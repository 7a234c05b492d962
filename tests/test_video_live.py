"""Live video: cameras, servers and reconnecting. Nothing leaves the loopback interface."""

import logging
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from videofiles import COUNT, decode_all, gather, moving_frames, remux, serve, write_video

from jvjepa import video
from jvjepa.errors import ConfigError, VideoError

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


# Sources that cannot be opened


def test_unknown_camera() -> None:
    with pytest.raises(VideoError, match="camera:one: a camera has a number"):
        video.stream("camera:one")
    with pytest.raises(VideoError, match="camera:97: "):
        video.stream("camera:97")


def test_cameras_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(VideoError, match="camera:0: cameras can be opened on Linux"):
        video.stream("camera:0")


@pytest.mark.parametrize("scheme", ["http", "rtsp", "tcp"])
def test_unreachable(scheme: str) -> None:
    """The first connection is not retried; and no password is repeated."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    url = f"{scheme}://user:secret@127.0.0.1:{port}/video"
    with pytest.raises(VideoError, match=f"{scheme}://127.0.0.1:{port}/video: cannot") as caught:
        next(video.stream(url))
    assert "secret" not in str(caught.value)


def test_a_server_that_is_silent_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"rtsp://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(VideoError, match="no answer in time"):
            next(video.stream(url, reconnect=video.Reconnect(open_timeout=0.2)))


# Live


class Sleeps(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def until_lost(url: str, **arguments: Any) -> tuple[list[np.ndarray], list[float], str]:
    """What a live source gives before it is lost for good, and the error's message."""
    frames, times = [], []
    arguments.setdefault("reconnect", video.Reconnect(attempts=0))
    try:
        for frame, seconds in video.stream(url, **arguments):
            frames.append(frame)
            times.append(seconds)
    except VideoError as error:
        return frames, times, str(error)
    raise AssertionError("a live source has no end")


# FFmpeg's http cannot tell the end of an unsized body from a failure, so what the decoder holds
# back for reordering (two frames here) is lost with the connection.
HELD_BACK = 2


def test_reconnects_and_time_goes_on(
    clips: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that dies half way, is away for two attempts, and comes back."""
    expected, _ = decode_all(clips["ts"])
    data = clips["ts"].read_bytes()
    half = data[: len(data) // 2 // 188 * 188]
    sleeps = Sleeps()
    reconnect = video.Reconnect(attempts=3, sleep=sleeps)
    answers = [half, half, b"", b"", data, b""]  # the first only tells that it is live
    with serve(answers) as (address, requests), caplog.at_level(logging.WARNING):
        frames, times, error = until_lost(f"{address}/live", reconnect=reconnect)

    assert "/live: lost at " in error
    assert "not found again in 3 attempts" in error
    assert np.all(np.diff(times) > 0)
    before = len(frames) - (COUNT - HELD_BACK)
    assert 15 < before < COUNT
    np.testing.assert_array_equal(frames[before:], expected[:-HELD_BACK])
    np.testing.assert_array_equal(frames[:before], expected[:before])
    assert sleeps == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    assert len(requests) == 5 + 3
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 6
    assert "attempt 3 of 3 in 4 s" in warnings[-1]


def test_waits_double_up_to_a_limit(clips: dict[str, Path]) -> None:
    sleeps = Sleeps()
    reconnect = video.Reconnect(attempts=5, first_wait=0.5, longest_wait=3, sleep=sleeps)
    data = clips["ts"].read_bytes()
    with serve([data, data, b""]) as (address, _):
        frames, _, error = until_lost(f"{address}/live", reconnect=reconnect)

    assert len(frames) == COUNT - HELD_BACK
    assert "in 5 attempts" in error
    assert sleeps == [0.5, 1, 2, 3, 3]


def test_joining_in_the_middle_starts_at_a_keyframe(clips: dict[str, Path]) -> None:
    """What comes before the first keyframe cannot be shown and is not an error."""
    expected, _ = decode_all(clips["ts"])
    data = clips["ts"].read_bytes()
    with av.open(str(clips["ts"])) as container:
        positions = [p.pos for p in container.demux(video=0) if p.size]
    with serve([data[positions[15] // 188 * 188 :]]) as (address, _):
        frames, times, _ = until_lost(f"{address}/live")

    np.testing.assert_array_equal(frames, expected[24:-HELD_BACK])
    np.testing.assert_allclose(times, np.arange(36 - HELD_BACK) / 30, atol=1e-4)


def test_damage_in_a_live_stream_reconnects(tmp_path: Path, clips: dict[str, Path]) -> None:
    lost = remux(clips["mp4"], tmp_path / "lost.ts", lambda i, _: i != 24).read_bytes()
    sleeps = Sleeps()
    reconnect = video.Reconnect(attempts=1, sleep=sleeps)
    with serve([lost, lost, clips["ts"].read_bytes(), b""]) as (address, _):
        frames, times, _ = until_lost(f"{address}/live", reconnect=reconnect)

    assert sleeps == [1.0, 1.0]
    assert 18 < len(frames) - COUNT < 26
    assert np.all(np.diff(times) > 0)


def test_live_over_tcp(clips: dict[str, Path]) -> None:
    expected, _ = decode_all(clips["ts"])

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(clips["ts"].read_bytes())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        frames, _, error = until_lost(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        thread.join()

    np.testing.assert_array_equal(frames, expected)
    assert "lost at 1.967 s" in error


def test_a_live_source_that_stalls_is_lost(clips: dict[str, Path]) -> None:
    """It neither sends anything nor hangs up."""
    data = clips["ts"].read_bytes()
    told = threading.Event()

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(data[: len(data) // 2])
            told.wait(timeout=60)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        reconnect = video.Reconnect(attempts=0, read_timeout=0.3)
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        frames, _, error = until_lost(url, reconnect=reconnect)
        told.set()
        thread.join()

    assert 15 < len(frames) < COUNT
    assert "no data in time" in error


def test_live_fps_drops_frames(clips: dict[str, Path]) -> None:
    expected, _ = decode_all(clips["ts"])
    with serve([clips["ts"].read_bytes()]) as (address, _):
        tenth, times, _ = until_lost(f"{address}/live", fps=10)
        everything, _, _ = until_lost(f"{address}/live", fps=100)
        native, _, _ = until_lost(f"{address}/live", fps=30)

    np.testing.assert_array_equal(tenth, expected[::3])
    np.testing.assert_allclose(times, np.arange(20) / 10, atol=1e-4)
    assert len(everything) == len(native) == COUNT - HELD_BACK  # never more than there are


def test_live_without_timestamps_takes_those_of_arrival(tmp_path: Path) -> None:
    data = write_video(tmp_path / "raw.h264", moving_frames(20), bframes=0).read_bytes()
    with serve([data]) as (address, _):
        frames, times, _ = until_lost(f"{address}/live")

    assert len(frames) == 20
    assert times[0] >= 0
    assert np.all(np.diff(times) > 0)


def test_live_can_stop(clips: dict[str, Path]) -> None:
    with serve([clips["ts"].read_bytes()]) as (address, _):
        frames, times = gather(video.stream(f"{address}/live", end=0.5))

        assert len(frames) == 15
        assert times[-1] < 0.5
        with pytest.raises(VideoError, match=r"start = 1\.0; a live source has no past"):
            next(video.stream(f"{address}/live", start=1.0))
        with pytest.raises(VideoError, match=r"is live and has no end; give num_frames or end"):
            video.read(f"{address}/live")
        taken, taken_times = video.read(f"{address}/live", num_frames=4)
        assert np.array_equal(taken, frames[:4])
        assert np.allclose(taken_times, times[:4])
        until, _ = video.read(f"{address}/live", end=0.5)
        assert np.array_equal(until, frames)
        with pytest.raises(VideoError, match=r"gave 15 frames before end = 0\.5"):
            video.read(f"{address}/live", num_frames=16, end=0.5)
    with pytest.raises(VideoError, match="has no past"):
        video.stream("rtsp://127.0.0.1/", start=1.0)
    with pytest.raises(VideoError, match="is live"):
        video.read("rtsp://127.0.0.1/")


@pytest.mark.parametrize(
    "field",
    [
        {"attempts": -1},
        {"first_wait": 0},
        {"first_wait": float("nan")},
        {"longest_wait": 0.5},
        {"open_timeout": -1},
        {"read_timeout": float("inf")},
    ],
)
def test_impossible_reconnect(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        video.Reconnect(**field)
