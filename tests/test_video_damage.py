"""Video files that are damaged, cut off, or no video at all. Every one is made here."""

from pathlib import Path

import av
import numpy as np
import pytest
import videofiles
from videofiles import COUNT, decode_all, moving_frames, remux, serve, write_video

from jvjepa import video
from jvjepa.errors import VideoError

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


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


# No video at all


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
