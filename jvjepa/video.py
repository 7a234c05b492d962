"""Reading video: clips from files, endless frames from cameras and streams, and tubelets of them.

    frames, times = video.read("clip.mp4", num_frames=16)
    for tubelet, time in video.tubelets(video.stream("rtsp://camera/1", fps=4)):
        ...

Frames are uint8 RGB and upright (a phone's rotation or mirroring is applied). Times are seconds
since the first frame that the file shows, taken from its timestamps and not from its frame rate.

What is damaged is an error and never a grey, repeated or missing frame; `jvjepa.decoding` says how.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from jvjepa.decoding import (
    Clock,
    Frame,
    Index,
    Key,
    Place,
    Source,
    UnexpectedError,
    decode,
    index_frames,
    index_packets,
    is_live,
    locate,
    open_video,
    to_rgb,
)
from jvjepa.errors import ConfigError, VideoError
from jvjepa.preprocessing import preprocess as preprocess

_log = logging.getLogger(__name__)
_SEEK_GAIN = 16  # packets; decoding fewer than this on the way to a keyframe is not worth a seek


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconnect:
    """How a live source that is lost is found again. The very first connection is not retried.

    Args:
        attempts: connections tried in a row before giving up; 0 never reconnects. A frame that
            arrives starts the count again.
        first_wait: seconds before the first attempt; it doubles with each further one.
        longest_wait: seconds that no wait is longer than.
        open_timeout: seconds that a connection (to a live source or a file's URL) may take.
        read_timeout: seconds without data after which a connection counts as lost.
        sleep: waits for some seconds; tests give another one.

    Raises:
        ConfigError: a value is impossible.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 30.0
    open_timeout: float = 10.0
    read_timeout: float = 10.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.attempts < 0:
            raise ConfigError(f"attempts = {self.attempts}; it must be 0 or more")
        for name in ("first_wait", "longest_wait", "open_timeout", "read_timeout"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value}; it must be a positive number of seconds")
        if self.longest_wait < self.first_wait:
            raise ConfigError(
                f"longest_wait = {self.longest_wait}; it must be at least "
                f"first_wait = {self.first_wait}"
            )


_DEFAULT_RECONNECT = Reconnect()


def read(
    source: Source,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Reads a clip of a file.

    With neither `num_frames` nor `fps`, every frame. With `num_frames`, that many spread evenly, by
    Hugging Face's rule (frames `arange(n) * total // n` of those in [start, end)). With `fps`, the
    frame that a player shows at each of start, start + 1/fps, start + 2/fps, ..., so that a
    variable frame rate is right and a frame shown for long is given more than once; with both, the
    first `num_frames` of these.

    Decodes only what is needed: where frames are far apart it jumps to keyframes. The frames are
    the same as if everything had been decoded.

    Args:
        source: a path, or the URL of a file.
        num_frames: how many frames, 1 or more.
        fps: frames per second, above 0.
        start: seconds since the first frame, 0 or more.
        end: seconds since the first frame, above `start`, itself excluded; None is the file's end.

    Returns:
        uint8 [T, H, W, 3], RGB, and float64 [T], the seconds at which the file first shows each.

    Raises:
        VideoError: the file is missing, no video, damaged or too short, or a value is impossible.
    """
    if num_frames is not None and num_frames < 1:
        raise VideoError(f"num_frames = {num_frames}; it must be 1 or more")
    _check_range(fps, start, end)
    place = _locate(source)
    if place.live or (place.live is None and _is_live(place)):
        raise VideoError(f"{place.name}: is live and has no end; use video.stream")

    index = _index_packets(place)
    if index is not None:
        try:
            return _read_frames(place, index, num_frames, fps, start, end)
        except _Unexpected as error:
            # The file is not as its packets say, or is damaged; the decoder has the last word.
            _log.debug("%s; reading it from its beginning", error)
    return _read_frames(place, _index_frames(place), num_frames, fps, start, end)


def stream(
    source: Source,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    reconnect: Reconnect = _DEFAULT_RECONNECT,
) -> Iterator[tuple[Frame, float]]:
    """Decodes a file, a URL or a camera frame by frame, in constant memory.

    Live are cameras, rtsp, rtmp, rtp, udp, srt and tcp URLs, and what an http server sends without
    saying how long it is (neither a duration nor a size). A live source that fails is connected to
    again. Anything else is a file: its end is the end, and what `read` gives `stream` gives.

    Args:
        source: a path, a URL, or "camera:0" for the first camera (Linux only, through v4l2).
        fps: frames per second, above 0. A file gives the frames that `read` gives at this rate; of
            a live source, frames that come too early are dropped.
        start: seconds to skip, 0 or more; files only.
        end: seconds at which to stop, itself excluded; None goes on to the end.
        reconnect: time limits, and what to do when a live source is lost.

    Yields:
        uint8 [H, W, 3], RGB, and its time: seconds since the first frame. Times always grow, across
        reconnections as well (except that with `fps` a file may give a frame more than once).

    Raises:
        VideoError: the source cannot be opened or a value is impossible; in the course of it, a
            file is damaged (the message says at which second; the frames before it are good), or a
            live source is lost for good.
    """
    _check_range(fps, start, end)
    place = dataclasses.replace(
        _locate(source), timeout=(reconnect.open_timeout, reconnect.read_timeout)
    )
    if place.live and start:
        raise VideoError(f"{place.name}: start = {start}; a live source has no past, use 0")
    return _stream(place, fps, start, end, reconnect)


def tubelets(
    frames: Iterable[tuple[Frame, float]], tubelet_size: int = 2
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Groups frames into tubelets.

    Frames at the end that do not fill a tubelet are dropped, and a warning is logged.

    Args:
        frames: (uint8 [H, W, 3], seconds) as `stream` yields them. They are copied.
        tubelet_size: frames in a tubelet, 1 or more.

    Yields:
        uint8 [tubelet_size, H, W, 3] in new memory, and the time of its newest frame.

    Raises:
        VideoError: a frame has another size than the first, or is not uint8 [H, W, 3].
    """
    if tubelet_size < 1:
        raise VideoError(f"tubelet_size = {tubelet_size}; it must be 1 or more")
    return _tubelets(frames, tubelet_size)


def _tubelets(
    frames: Iterable[tuple[Frame, float]], tubelet_size: int
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    tubelet: NDArray[np.uint8] | None = None
    filled = 0
    for frame, seconds in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise VideoError(
                f"the frame at {seconds:.3f} s is {frame.dtype} {list(frame.shape)}; "
                "right is uint8 [H, W, 3]"
            )
        if tubelet is None:
            tubelet = np.empty((tubelet_size, *frame.shape), np.uint8)
        if frame.shape != tubelet.shape[1:]:
            old, new = (f"{shape[1]}x{shape[0]}" for shape in (tubelet.shape[1:], frame.shape))
            raise VideoError(f"the frames change from {old} to {new} pixels at {seconds:.3f} s")
        tubelet[filled] = frame
        filled += 1
        if filled == tubelet_size:
            yield tubelet, seconds
            tubelet, filled = np.empty_like(tubelet), 0
    if filled:
        _log.warning("%d frames at the end do not fill a tubelet of %d", filled, tubelet_size)


