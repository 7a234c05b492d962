"""Makes video files for tests, and breaks them."""

import contextlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

CLOCK = 90_000  # ticks per second that frames with `times` are written with
COUNT = 60  # frames in each of `write_clips`
CONTAINERS = ["mp4", "mkv", "ts"]


def moving_frames(
    count: int, height: int = 48, width: int = 64, seed: int = 0
) -> NDArray[np.uint8]:
    """uint8 [count, H, W, 3]: blocks of colour that move, so that no frame is like another."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    texture = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
    frames = np.stack([np.roll(texture, 3 * i, axis=1) for i in range(count)])
    frames[:, : height // 4] = (np.arange(count) * 5 % 256)[:, None, None, None]
    return frames


def write_video(
    path: str | Path,
    frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    fps: float = 30,
    *,
    times: Sequence[float] | None = None,
    gop: int = 12,
    bframes: int = 2,
    crf: float = 18,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes H.264.

    Args:
        path: where; its suffix chooses the container.
        frames: uint8 [T, H, W, 3], RGB, even sides.
        fps: frames per second, where `times` is not given.
        times: seconds of each frame, growing; for a variable frame rate.
        gop: frames from keyframe to keyframe.
        bframes: B-frames in a row.
        crf: quality, 0 (lossless) to 51.
        codec_options: more for x264.
        container_options: more for the container, such as {"movflags": "faststart"}.

    Returns:
        `path`.
    """
    rate = Fraction(fps).limit_denominator(1001)
    options = {"g": str(gop), "bf": str(bframes), "crf": str(crf), "sc_threshold": "0"}
    with av.open(str(path), "w", options=container_options or {}) as container:
        track = container.add_stream("libx264", rate=rate, options=options | (codec_options or {}))
        track.height, track.width = frames[0].shape[:2]
        track.pix_fmt = "yuv420p"
        base = 1 / rate if times is None else Fraction(1, CLOCK)
        track.codec_context.time_base = base
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            picture.time_base = base
            picture.pts = i if times is None else round(times[i] * CLOCK)
            container.mux(track.encode(picture))
        container.mux(track.encode())
    return Path(path)


def write_clips(folder: Path) -> dict[str, Path]:
    """60 frames at 30 per second, a keyframe every 12, two B-frames in a row."""
    frames = moving_frames(COUNT)
    clips = {end: write_video(folder / f"clip.{end}", frames) for end in CONTAINERS}
    faststart = {"movflags": "faststart"}
    clips["fast"] = write_video(folder / "fast.mp4", frames, container_options=faststart)
    return clips


def write_audio(path: str | Path) -> Path:
    """Writes a tenth of a second of silence, and no video."""
    with av.open(str(path), "w") as container:
        track = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        silence.pts = 0
        container.mux(track.encode(silence))
        container.mux(track.encode())
    return Path(path)


def decode_all(path: str | Path) -> tuple[NDArray[np.uint8], list[Fraction]]:
    """uint8 [T, H, W, 3] and seconds: what plain PyAV shows, with nothing clever."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        times = [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times


def gather(items: Iterator[tuple[Any, float]]) -> tuple[np.ndarray, list[float]]:
    """Stacks what `video.stream` yields."""
    frames, times = zip(*items, strict=True)
    return np.stack(frames), list(times)


def open_videos() -> list[str]:
    """The video files that this process holds open; none where there is no /proc."""
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


def remux(source: str | Path, target: str | Path, change: Callable[[int, av.Packet], bool]) -> Path:
    """Copies packets; `change(i, packet)` may change one and says whether to keep it."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        track = old.streams.video[0]
        copy = new.add_stream_from_template(track)
        for i, packet in enumerate(old.demux(track)):
            if packet.dts is not None and change(i, packet):
                packet.stream = copy
                new.mux(packet)
    return Path(target)


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Writes (a, b, c, d) into an mp4's track header, as a phone that is held askew does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)


@contextlib.contextmanager
def serve(
    answers: Sequence[bytes], *, sized: bool = False, seekable: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """A web server on the loopback interface that gives each connection the next answer.

    Args:
        answers: the body for each GET in turn; the last one again and again. An empty one is 503.
        sized: say how long the body is, as for a file; otherwise just hang up at its end.
        seekable: answer requests for ranges (needs `sized`).

    Yields:
        The server's address, and the list of the requests that came, which grows.
    """
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers[min(len(requests), len(answers) - 1)]
            requests.append(self.path)
            if not body:
                self.send_error(503)
                return
            first = 0
            asked = self.headers.get("Range", "")
            if seekable and asked.startswith("bytes="):
                first = int(asked.removeprefix("bytes=").split("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if sized:
                self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader may hang up first
                self.wfile.write(body[first:])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()
