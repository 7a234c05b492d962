"""Reading video. Every file is made here; nothing leaves the loopback interface."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import videofiles
from videofiles import decode_all, moving_frames, remux, serve, set_matrix, write_video

from jvjepa import video
from jvjepa.errors import ConfigError, InputError, VideoError

COUNT = 60
CONTAINERS = ["mp4", "mkv", "ts"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """60 frames at 30 per second, a keyframe every 12, two B-frames in a row."""
    folder = tmp_path_factory.mktemp("clips")
    frames = moving_frames(COUNT)
    clips = {end: write_video(folder / f"clip.{end}", frames) for end in CONTAINERS}
    faststart = {"movflags": "faststart"}
    clips["fast"] = write_video(folder / "fast.mp4", frames, container_options=faststart)
    return clips


@pytest.fixture(autouse=True)
def no_file_stays_open() -> Iterator[None]:
    """A failed read may leave its container open only as long as its exception lives."""
    before = open_videos()
    yield
    assert open_videos() == before


def open_videos() -> list[str]:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return []
    names = []
    for entry in folder.iterdir():
        try:
            names.append(os.readlink(entry))
        except OSError:  # closed since
            continue
    return sorted(name for name in names if name.endswith((".mp4", ".mkv", ".ts", ".avi")))


def gather(items: Iterator[tuple[Any, float]]) -> tuple[np.ndarray, list[float]]:
    frames, times = zip(*items, strict=True)
    return np.stack(frames), list(times)


ROUNDING = {"mp4": Fraction(1, 30720), "ts": Fraction(1, 180_000), "mkv": Fraction(1, 2000)}


def shown_at(times: list[Fraction], seconds: Fraction, end: str) -> int:
    """The newest frame at this time, as far as the container's clock can tell."""
    return max(i for i, time in enumerate(times) if time <= seconds + ROUNDING[end])


# Reading files


@pytest.mark.parametrize("end", CONTAINERS)
def test_reads_everything(clips: dict[str, Path], end: str) -> None:
    expected, times = decode_all(clips[end])

    frames, seconds = video.read(clips[end])

    assert frames.dtype == np.uint8
    assert seconds.dtype == np.float64
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_array_equal(seconds, np.array([float(time) for time in times]))
    np.testing.assert_allclose(seconds, np.arange(COUNT) / 30, atol=0.0006)
    assert seconds[0] == 0


def test_frames_are_rgb(tmp_path: Path) -> None:
    colour = np.full((4, 32, 32, 3), (200, 60, 30), np.uint8)

    frames, _ = video.read(write_video(tmp_path / "c.mp4", colour, crf=1))

    np.testing.assert_allclose(frames, colour, atol=4)


@pytest.mark.parametrize("end", CONTAINERS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 60])
def test_uniform_sampling_is_hugging_faces(clips: dict[str, Path], end: str, count: int) -> None:
    expected, _ = decode_all(clips[end])

    frames, seconds = video.read(clips[end], num_frames=count)

    chosen = np.arange(count) * COUNT // count
    np.testing.assert_array_equal(frames, expected[chosen])
    np.testing.assert_allclose(seconds, chosen / 30, atol=0.0006)


@pytest.mark.parametrize("end", CONTAINERS)
@pytest.mark.parametrize("fps", [0.7, 4, 7.3, 29.97, 30, 60])
@pytest.mark.parametrize("start", [0.0, 0.41, 1.5])
def test_fps_gives_the_frame_on_display(
    clips: dict[str, Path], end: str, fps: float, start: float
) -> None:
    expected, times = decode_all(clips[end])
    targets = []
    while Fraction(start) + len(targets) / Fraction(fps) < 2:
        targets.append(Fraction(start) + len(targets) / Fraction(fps))
    chosen = [shown_at(times, target, end) for target in targets]

    frames, seconds = video.read(clips[end], fps=fps, start=start)

    np.testing.assert_array_equal(frames, expected[chosen])
    assert seconds.tolist() == [float(times[i]) for i in chosen]


def test_native_fps_is_every_frame_though_matroska_rounds(clips: dict[str, Path]) -> None:
    """66.67 ms is written as 67, which is late, and 133.33 as 133."""
    frames, _ = video.read(clips["mkv"], fps=30)

    np.testing.assert_array_equal(frames, decode_all(clips["mkv"])[0])


@pytest.mark.parametrize("end", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path: Path, end: str) -> None:
    written = [0.0, 0.1, 0.13, 0.5, 0.9, 0.95, 1.0, 1.8, 2.0]
    path = write_video(tmp_path / f"v.{end}", moving_frames(9), times=written, gop=4)
    expected, _ = decode_all(path)

    frames, seconds = video.read(path)
    sampled, shown = video.read(path, fps=4, end=2.0)

    np.testing.assert_allclose(seconds, written, atol=0.0006)
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_array_equal(sampled, expected[[0, 2, 3, 3, 6, 6, 6, 6]])
    np.testing.assert_allclose(shown, np.array(written)[[0, 2, 3, 3, 6, 6, 6, 6]], atol=0.0006)


def test_start_and_end_choose_by_time(clips: dict[str, Path]) -> None:
    expected, _ = decode_all(clips["mp4"])

    frames, seconds = video.read(clips["mp4"], start=0.5, end=1.0)  # frames 15 to 29
    few, _ = video.read(clips["mp4"], start=0.5, end=1.0, num_frames=4)

    np.testing.assert_array_equal(frames, expected[15:30])
    np.testing.assert_array_equal(seconds, np.arange(15, 30) / 30)
    np.testing.assert_array_equal(few, expected[15 + np.arange(4) * 15 // 4])


def test_both_give_the_first_at_that_rate(clips: dict[str, Path]) -> None:
    expected, _ = decode_all(clips["mp4"])

    frames, _ = video.read(clips["mp4"], fps=10, num_frames=5, start=0.2)

    np.testing.assert_array_equal(frames, expected[[6, 9, 12, 15, 18]])


GROUPS = {
    "one keyframe": {"gop": 250},
    "open": {"gop": 10, "codec_options": {"open-gop": "1"}},
    "no B-frames": {"gop": 7, "bframes": 0},
    "many B-frames": {"gop": 20, "bframes": 6, "codec_options": {"b-pyramid": "normal"}},
    "all keyframes": {"gop": 1, "bframes": 0},
    "refresh": {"gop": 10, "bframes": 0, "codec_options": {"x264-params": "intra-refresh=1"}},
}


@pytest.mark.parametrize("end", CONTAINERS)
@pytest.mark.parametrize("group", GROUPS)
def test_seeking_changes_nothing(tmp_path: Path, end: str, group: str) -> None:
    path = write_video(tmp_path / f"g.{end}", moving_frames(90), **GROUPS[group])
    expected, times = decode_all(path)

    for count in (2, 5, 11):
        frames, seconds = video.read(path, num_frames=count)
        chosen = np.arange(count) * 90 // count
        np.testing.assert_array_equal(frames, expected[chosen])
        assert seconds.tolist() == [float(times[i]) for i in chosen]
    for start in (0.35, 1.0, 2.21, 2.9):
        frames, seconds = gather(video.stream(path, start=start))
        first = next(i for i, t in enumerate(times) if t >= Fraction(start) - Fraction(1, 2000))
        np.testing.assert_array_equal(frames, expected[first:])
        assert seconds == [float(time) for time in times[first:]]


@pytest.mark.parametrize("end", ["mp4", "mkv"])
def test_sparse_sampling_decodes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    path = write_video(tmp_path / f"long.{end}", moving_frames(300), gop=20)
    decoded = []
    decode = video.decode

    def counting(*args: Any) -> Iterator[av.VideoFrame]:
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "decode", counting)

    video.read(path, num_frames=3)  # frames 0, 100 and 200, all of them keyframes

    assert 3 <= len(decoded) <= 9


def test_an_edit_list_hides_frames(tmp_path: Path) -> None:
    """A cut that does not encode anew keeps the frames before it, and says not to show them."""
    whole = write_video(tmp_path / "whole.mp4", moving_frames(COUNT), gop=60)
    cut = tmp_path / "cut.mp4"

    def shift(_: int, packet: av.Packet) -> bool:
        ticks = round(Fraction(10, 30) / packet.time_base)
        packet.pts -= ticks
        packet.dts -= ticks
        return True

    remux(whole, cut, shift)
    expected, _ = decode_all(whole)

    frames, seconds = video.read(cut)
    few, _ = video.read(cut, num_frames=5)

    np.testing.assert_array_equal(frames, expected[10:])
    np.testing.assert_allclose(seconds, np.arange(50) / 30, atol=1e-4)
    np.testing.assert_array_equal(few, expected[10::10])
    streamed, times = gather(video.stream(cut))
    np.testing.assert_array_equal(streamed, expected[10:])
    assert times == seconds.tolist()


def test_other_codecs_and_containers(tmp_path: Path) -> None:
    for codec, name, pix_fmt in (
        ("mpeg4", "a.avi", "yuv420p"),
        ("mjpeg", "b.avi", "yuvj420p"),
        ("mpeg2video", "c.mkv", "yuv420p"),
        ("libvpx", "d.webm", "yuv420p"),
    ):
        with av.open(str(tmp_path / name), "w") as container:
            track = container.add_stream(codec, rate=25)
            track.width, track.height, track.pix_fmt = 64, 48, pix_fmt
            for frame in moving_frames(20):
                container.mux(track.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(track.encode())
        expected, _ = decode_all(tmp_path / name)

        frames, seconds = video.read(tmp_path / name, num_frames=10)

        np.testing.assert_array_equal(frames, expected[::2])
        np.testing.assert_allclose(seconds, np.arange(0, 20, 2) / 25, atol=0.0006)


# Orientation: what the track header says, and what a player then shows

QUARTER = {
    "as stored": ((1, 0, 0, 1), lambda image: image),
    "phone upright": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a quarter clockwise
    "upside down": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "phone upright, other way": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "mirrored upright": ((0, -1, -1, 0), lambda image: np.rot90(image[:, ::-1], -1)),
}


def corners() -> np.ndarray:
    """Red, green, blue and white corners."""
    image = np.empty((32, 64, 3), np.uint8)
    image[:16, :32], image[:16, 32:] = (255, 0, 0), (0, 255, 0)
    image[16:, :32], image[16:, 32:] = (0, 0, 255), (255, 255, 255)
    return image


@pytest.mark.parametrize("name", QUARTER)
def test_frames_are_upright(tmp_path: Path, name: str) -> None:
    matrix, turn = QUARTER[name]
    path = write_video(tmp_path / "r.mp4", [corners()] * 40, crf=1)
    set_matrix(path, matrix)
    upright = turn(corners())

    frames, _ = video.read(path, num_frames=3)  # the last one after a seek
    streamed = list(video.stream(path))

    assert frames.shape == (3, *upright.shape)
    assert len(streamed) == 40
    for frame in (*frames, streamed[0][0], streamed[-1][0]):
        assert frame.flags.c_contiguous
        for y in (4, -4):
            for x in (4, -4):
                np.testing.assert_allclose(frame[y, x], upright[y, x], atol=12)


def test_refuses_a_slant(tmp_path: Path) -> None:
    path = write_video(tmp_path / "r.mp4", [corners()] * 3)
    set_matrix(path, (0.7071, 0.7071, -0.7071, 0.7071))

    with pytest.raises(VideoError, match=r"r\.mp4: .*45\.0 degrees"):
        video.read(path)


# Streaming files


@pytest.mark.parametrize("end", CONTAINERS)
@pytest.mark.parametrize("fps", [None, 3, 7.3, 30, 45])
@pytest.mark.parametrize("span", [(0.0, None), (0.4, 1.21), (1.9, None)])
def test_stream_gives_what_read_gives(
    clips: dict[str, Path], end: str, fps: float | None, span: tuple[float, float | None]
) -> None:
    expected, seconds = video.read(clips[end], fps=fps, start=span[0], end=span[1])

    frames, times = gather(video.stream(clips[end], fps=fps, start=span[0], end=span[1]))

    np.testing.assert_array_equal(frames, expected)
    assert times == seconds.tolist()


def test_stream_is_lazy(clips: dict[str, Path]) -> None:
    before = open_videos()
    frames = video.stream(clips["mp4"])
    assert open_videos() == before

    assert next(frames)[1] == 0.0
    opened = open_videos()
    frames.close()

    if Path("/proc/self/fd").exists():
        assert len(opened) == len(before) + 1
    assert open_videos() == before


def test_file_over_http(clips: dict[str, Path]) -> None:
    """Its size makes it a file: its end is the end, and `read` works."""
    expected, _ = decode_all(clips["fast"])
    with serve([clips["fast"].read_bytes()], sized=True, seekable=True) as (address, _):
        frames, _ = video.read(f"{address}/clip.mp4", num_frames=4)
        streamed, _ = gather(video.stream(f"{address}/clip.mp4"))

    np.testing.assert_array_equal(frames, expected[::15])
    np.testing.assert_array_equal(streamed, expected)


# Damage


def check_ends_loudly(path: Path, reference: Path, message: str) -> None:
    """Frames up to the damage are right, then comes an error that names the file and the time."""
    expected, _ = decode_all(reference)
    good: list[np.ndarray] = []
    with pytest.raises(VideoError, match=message) as caught:
        good.extend(frame for frame, _ in video.stream(path))
    assert str(path) in str(caught.value)
    assert 0 < len(good) < COUNT
    np.testing.assert_array_equal(np.stack(good), expected[: len(good)])
    with pytest.raises(VideoError, match=message):
        video.read(path)


def packet_ends(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return sorted(p.pos + p.size for p in container.demux(video=0) if p.size)


def test_truncated_inside_a_frame(tmp_path: Path, clips: dict[str, Path]) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(clips["fast"].read_bytes()[: packet_ends(clips["fast"])[30] - 20])

    check_ends_loudly(path, clips["fast"], r"a part is missing.*, at \d\.\d+ s|cut off at \d")


def test_truncated_between_two_frames(tmp_path: Path, clips: dict[str, Path]) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(clips["fast"].read_bytes()[: packet_ends(clips["fast"])[30]])

    check_ends_loudly(path, clips["fast"], r"cut off at [01]\.\d+ s")
    with pytest.raises(VideoError, match="cut off"):
        video.read(path, num_frames=2)


def test_truncated_matroska(tmp_path: Path, clips: dict[str, Path]) -> None:
    path = tmp_path / "cut.mkv"
    data = clips["mkv"].read_bytes()
    path.write_bytes(data[: len(data) // 2])

    check_ends_loudly(path, clips["mkv"], r"cut off at [01]\.\d+ s of 2\.000 s")


def test_truncated_before_its_index(tmp_path: Path, clips: dict[str, Path]) -> None:
    path = tmp_path / "cut.mp4"
    data = clips["mp4"].read_bytes()
    path.write_bytes(data[: len(data) // 2])

    with pytest.raises(VideoError, match=r"cut\.mp4: cannot be opened as a video"):
        video.read(path)


@pytest.mark.parametrize("end", ["fast", "mkv"])
def test_damaged_inside(tmp_path: Path, clips: dict[str, Path], end: str) -> None:
    """Five frames' bytes are noise: plain PyAV shows all 60 frames, most of them wrong."""
    path = tmp_path / f"bad{clips[end].suffix}"
    data = bytearray(clips[end].read_bytes())
    with av.open(str(clips[end])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        for packet in packets[25:30]:
            at = data.index(bytes(packet)) + 12  # after the length and the first header
            size = packet.size - 12
            data[at : at + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)

    check_ends_loudly(path, clips[end], r"(cannot be decoded|damaged|missing).*, at [01]\.\d+ s")


@pytest.mark.parametrize("end", ["mp4", "mkv", "ts"])
def test_a_lost_keyframe_is_noticed(tmp_path: Path, clips: dict[str, Path], end: str) -> None:
    """FFmpeg goes on without it, repeating what it has."""
    path = remux(clips["mp4"], tmp_path / f"lost.{end}", lambda i, _: i != 24)

    check_ends_loudly(path, clips["mp4"], r", at 0\.\d+ s")


@pytest.mark.parametrize("number", [0, 24])
def test_an_emptied_keyframe_is_noticed(
    tmp_path: Path, clips: dict[str, Path], number: int
) -> None:
    """FFmpeg skips zeros without a word, and with them all frames to the next keyframe."""
    path = tmp_path / "zeros.mp4"
    data = bytearray(clips["fast"].read_bytes())
    with av.open(str(clips["fast"])) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)

    with pytest.raises(VideoError, match=rf"zeros\.mp4: .*, at {number / 30:.3f} s"):
        list(video.stream(path))
    with pytest.raises(VideoError, match=r"zeros\.mp4: "):
        video.read(path)


def test_damage_elsewhere_does_not_matter_to_a_sample(tmp_path: Path) -> None:
    """Only what is needed is decoded; and what needs the damaged part fails."""
    whole = write_video(tmp_path / "whole.mkv", moving_frames(90), gop=30)
    expected, _ = decode_all(whole)
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    for packet in packets[45:55]:
        at = data.index(packet) + 12
        data[at : at + len(packet) - 12] = np.random.default_rng(0).bytes(len(packet) - 12)
    path = tmp_path / "bad.mkv"
    path.write_bytes(data)

    frames, _ = video.read(path, num_frames=3)  # frames 0, 30 and 60

    np.testing.assert_array_equal(frames, expected[::30])
    with pytest.raises(VideoError, match=r"bad\.mkv: .*, at 1\.\d+ s"):
        video.read(path, num_frames=30)


def test_file_over_http_that_breaks_off_is_no_end(clips: dict[str, Path]) -> None:
    """The server promises more than it sends."""
    data = clips["fast"].read_bytes()
    with serve([data[: len(data) * 2 // 3]], sized=True) as (address, _):
        url = f"{address}/clip.mp4"
        with pytest.raises(VideoError, match=r"clip\.mp4: .*, at \d\.\d+ s"):
            list(video.stream(url))
        with pytest.raises(VideoError, match=r"clip\.mp4: "):
            video.read(url)


# Bad input


def test_missing_and_useless_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video, but some text\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    videofiles.write_audio(tmp_path / "sound.mp4")
    for name, message in {
        "none.mp4": r"none\.mp4: there is no such file",
        "empty.mp4": r"empty\.mp4: is empty",
        "text.mp4": r"text\.mp4: cannot be opened as a video",
        "folder.mp4": r"folder\.mp4: is a directory",
        "sound.mp4": r"sound\.mp4: has no video track \(it has audio\)",
    }.items():
        with pytest.raises(VideoError, match=message):
            video.read(tmp_path / name)
        with pytest.raises(VideoError, match=message):
            list(video.stream(str(tmp_path / name)))


def test_no_timestamps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.h264", moving_frames(5))

    with pytest.raises(VideoError, match=r"raw\.h264: its frames have no timestamps"):
        video.read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames = 0; it must be 1 or more"),
        ({"num_frames": -2}, "num_frames = -2"),
        ({"num_frames": 61}, "num_frames = 61, but it has 60 frames"),
        ({"num_frames": 16, "end": 0.5}, "num_frames = 16, but it has 15 frames"),
        ({"num_frames": 9, "fps": 4}, "num_frames = 9 at fps = 4, .* there are 8"),
        ({"fps": 0}, "fps = 0; it must be above 0"),
        ({"fps": -1.0}, r"fps = -1\.0"),
        ({"fps": float("nan")}, "fps = nan"),
        ({"start": -1.0}, r"start = -1\.0; it must be 0 or more"),
        ({"start": 1.0, "end": 1.0}, r"end = 1\.0; it must be above start = 1\.0"),
        ({"start": 1.0, "end": 0.5}, r"end = 0\.5"),
        ({"start": 2.0}, r"start = 2\.0 is past the end; the clip lasts 2\.000 s"),
        ({"start": 9.0, "fps": 4}, r"start = 9\.0 is past the end"),
        ({"start": 0.501, "end": 0.51}, "no frame begins between"),
    ],
)
def test_impossible_requests(
    clips: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(VideoError, match=message):
        video.read(clips["mp4"], **arguments)
    if "num_frames" not in arguments:
        with pytest.raises(VideoError, match=message):
            list(video.stream(clips["mp4"], **arguments))


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


# Tubelets


def numbered(count: int) -> Iterator[tuple[np.ndarray, float]]:
    """Frames in one buffer that is used again and again."""
    buffer = np.empty((4, 6, 3), np.uint8)
    for i in range(count):
        buffer[:] = i
        yield buffer, i / 10


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tubelets_copy(size: int, caplog: pytest.LogCaptureFixture) -> None:
    tubelets = list(video.tubelets(numbered(6), size))

    assert [seconds for _, seconds in tubelets] == [i / 10 for i in range(size - 1, 6, size)]
    frames = np.concatenate([tubelet for tubelet, _ in tubelets])
    assert frames.shape == (6, 4, 6, 3)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], np.arange(6))
    assert not caplog.records


def test_an_unfinished_tubelet_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(video.tubelets(numbered(8), 3))) == 2
    assert "2 frames at the end do not fill a tubelet of 3" in caplog.text


def test_tubelets_refuse() -> None:
    small, large = np.zeros((4, 6, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)
    with pytest.raises(VideoError, match=r"from 6x4 to 6x8 pixels at 0\.300 s"):
        list(video.tubelets([(small, 0.1), (small, 0.2), (large, 0.3), (large, 0.4)]))
    with pytest.raises(VideoError, match=r"at 0\.100 s is float32 \[4, 6, 3\]"):
        list(video.tubelets([(small.astype(np.float32), 0.1)]))
    with pytest.raises(VideoError, match="tubelet_size = 0"):
        video.tubelets([], 0)


def test_size_changes_in_a_file(tmp_path: Path) -> None:
    """As a camera that is set up anew in the middle records it."""
    path = tmp_path / "both.ts"
    with av.open(str(path), "w") as both:
        track = None
        for shift, size in ((0, (48, 64)), (1, (64, 48))):
            part = write_video(tmp_path / f"{shift}.ts", moving_frames(12, *size))
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                track = track or both.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is not None:
                        packet.pts += shift * 90_000
                        packet.dts += shift * 90_000
                        packet.stream = track
                        both.mux(packet)

    with pytest.raises(VideoError, match=r"both\.ts: .* from 64x48 to 48x64 pixels at 1\.000 s"):
        video.read(path)
    with pytest.raises(VideoError, match=r"from 64x48 to 48x64 pixels at 1\.000 s"):
        list(video.tubelets(video.stream(path)))


def test_video_errors_are_input_errors() -> None:
    assert issubclass(VideoError, InputError)
