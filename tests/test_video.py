"""Reading video: samples, times, rotation. Nothing leaves the loopback interface."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from videofiles import (
    CONTAINERS,
    COUNT,
    decode_all,
    gather,
    moving_frames,
    open_videos,
    remux,
    serve,
    set_matrix,
    write_video,
)

from jvjepa import video
from jvjepa.errors import InputError, VideoError

pytestmark = pytest.mark.usefixtures("no_file_stays_open")

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


# Bad requests


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
