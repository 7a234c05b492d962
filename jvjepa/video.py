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
from collections.abc import Callable, Generator, Iterable
from fractions import Fraction

import av
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
    index_file,
    index_frames,
    index_packets,
    is_live,
    locate,
    open_video,
    shown_for,
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

    @property
    def timeout(self) -> tuple[float, float]:
        """Seconds that opening, and each read, may take."""
        return self.open_timeout, self.read_timeout


_DEFAULT_RECONNECT = Reconnect()


def read(
    source: Source,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Reads a clip of a file, or of what a live source shows now.

    With neither `num_frames` nor `fps`, every frame. With `num_frames`, that many spread evenly, by
    Hugging Face's rule (frames `arange(n) * total // n` of those in [start, end)). With `fps`, the
    frame that a player shows at each of start, start + 1/fps, start + 2/fps, ..., so that a
    variable frame rate is right and a frame shown for long is given more than once; with both, the
    first `num_frames` of these.

    Decodes only what is needed: where frames are far apart it jumps to keyframes. The frames are
    the same as if everything had been decoded.

    A live source is read as `stream` reads it, until there are `num_frames` (one after the other:
    nobody knows yet over what to spread them), or until `end`.

    Args:
        source: a path, a URL, or "camera:0"; see `stream`.
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
    place = locate(source, _DEFAULT_RECONNECT.timeout)
    if is_live(place):
        return _read_live(source, num_frames, fps, start, end)
    index = index_packets(place)
    if index is not None:
        try:
            return _read_frames(place, index, num_frames, fps, start, end)
        except UnexpectedError as error:
            # The file is not as its packets say, or is damaged; the decoder has the last word.
            _log.debug("%s; reading it from its beginning", error)
    return _read_frames(place, index_frames(place), num_frames, fps, start, end)


def stream(
    source: Source,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    reconnect: Reconnect = _DEFAULT_RECONNECT,
) -> Generator[tuple[Frame, float], None, None]:
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
    place = locate(source, reconnect.timeout)
    if place.live and start:
        raise VideoError(f"{place.name}: start = {start}; a live source has no past, use 0")
    return _stream(place, fps, start, end, reconnect)


def tubelets(
    frames: Iterable[tuple[Frame, float]], tubelet_size: int = 2
) -> Generator[tuple[NDArray[np.uint8], float], None, None]:
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


def _check_range(fps: float | None, start: float, end: float | None) -> None:
    if fps is not None and not 0 < fps < math.inf:
        raise VideoError(f"fps = {fps}; it must be above 0")
    if not 0 <= start < math.inf:
        raise VideoError(f"start = {start}; it must be 0 or more seconds")
    if end is not None and not start < end < math.inf:
        raise VideoError(f"end = {end}; it must be above start = {start} (seconds)")


def _read_live(
    source: Source, num_frames: int | None, fps: float | None, start: float, end: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    name = locate(source, _DEFAULT_RECONNECT.timeout).name
    if num_frames is None and end is None:
        raise VideoError(f"{name}: is live and has no end; give num_frames or end")
    with contextlib.closing(stream(source, fps=fps, start=start, end=end)) as incoming:
        clip = list(itertools.islice(incoming, num_frames))
    if not clip or (num_frames is not None and len(clip) < num_frames):
        raise VideoError(f"{name}: gave {len(clip)} frames before end = {end}")
    frames, times = zip(*clip, strict=True)
    return np.stack(frames), np.array(times, np.float64)


def _read_frames(
    place: Place,
    index: Index,
    num_frames: int | None,
    fps: float | None,
    start: float,
    end: float | None,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    wanted = index.ticks[_select(place, index, num_frames, fps, start, end)]
    times = np.array([index.clock.seconds(int(tick)) for tick in wanted], np.float64)
    return _fetch(place, index, wanted), times


def _select(
    place: Place,
    index: Index,
    num_frames: int | None,
    fps: float | None,
    start: float,
    end: float | None,
) -> NDArray[np.int64]:
    """int64 [T], which frames of the index `read` gives; they never go back."""
    clock, ticks = index.clock, index.ticks
    length = clock.seconds(index.end)
    if clock.newest(Fraction(start)) >= index.end:
        raise VideoError(
            f"{place.name}: start = {start} is past the end; the clip lasts {length:.3f} s"
        )
    if fps is None:
        stop = index.end if end is None else clock.first(end)
        first, last = np.searchsorted(ticks, (clock.first(start), stop)).tolist()
        total = last - first
        if total == 0:
            raise VideoError(f"{place.name}: no frame begins between {start} s and {end} s")
        if num_frames is None:
            return np.arange(first, last)
        if num_frames > total:
            raise VideoError(f"{place.name}: num_frames = {num_frames}, but it has {total} frames")
        return first + np.arange(num_frames) * total // num_frames

    shown = itertools.takewhile(
        lambda target: clock.shows(target, int(ticks[-1]), index.end),
        clock.targets(fps, start, end),
    )
    limits = [clock.newest(target) for target in itertools.islice(shown, num_frames)]
    if num_frames is not None and len(limits) < num_frames:
        raise VideoError(
            f"{place.name}: num_frames = {num_frames} at fps = {fps}, but from {start} s to "
            f"{min(length, end or length):.3f} s there are {len(limits)}"
        )
    return np.searchsorted(ticks, limits, side="right") - 1


def _fetch(place: Place, index: Index, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 [T, H, W, 3], the frames with these timestamps, which never go back."""
    converter = VideoReformatter()
    clip: NDArray[np.uint8] | None = None
    done = 0
    with open_video(place) as (container, track):
        for key, until in _plan(index, wanted):
            frames = decode(container, track, place, key, index.clock.origin)
            with contextlib.closing(frames):
                while done < until:
                    tick = int(wanted[done])
                    frame = next((frame for frame in frames if frame.pts >= tick), None)
                    seconds = index.clock.seconds(tick)
                    if frame is None or frame.pts > tick:
                        raise UnexpectedError(f"{place.name}: no frame comes for {seconds:.3f} s")
                    image = to_rgb(frame, converter, place)
                    if clip is None:
                        clip = np.empty((len(wanted), *image.shape), np.uint8)
                    if image.shape != clip.shape[1:]:
                        raise VideoError(
                            f"{place.name}: {_change(clip.shape[1:], image.shape, seconds)}"
                        )
                    repeats = int(np.searchsorted(wanted, tick, side="right")) - done
                    clip[done : done + repeats] = image
                    done += repeats
    assert clip is not None  # `wanted` is never empty
    return clip


def _plan(index: Index, wanted: NDArray[np.int64]) -> list[tuple[Key | None, int]]:
    """Where to decode from (None is the beginning), and until how many frames are there."""
    keys: list[Key | None] = [None]
    until = [0]
    at = 0
    for done, tick in enumerate(wanted.tolist()):
        key = index.key_for(tick)
        if key is not None and key.order - at > _SEEK_GAIN:
            keys.append(key)
            until.append(done)
        until[-1] = done + 1
        at = index.orders.get(tick, 0)
    return [(key, stop) for key, stop in zip(keys, until, strict=True) if stop]


def _stream(
    place: Place, fps: float | None, start: float, end: float | None, reconnect: Reconnect
) -> Generator[tuple[Frame, float], None, None]:
    live = is_live(place)
    place = dataclasses.replace(place, live=live)
    if live and start:
        raise VideoError(f"{place.name}: start = {start}; a live source has no past, use 0")
    if live:
        yield from _stream_live(place, fps, end, reconnect)
        return

    key, origin = None, None
    if start:
        index = index_file(place)
        key = index.key_for(int(index.ticks[_select(place, index, None, fps, start, end)[0]]))
        origin = index.clock.origin
    started = False
    if key is not None:
        try:
            for item in _stream_file(place, key, origin, fps, start, end):
                started = True
                yield item
            return
        except UnexpectedError as error:
            if started:
                raise
            _log.debug("%s; decoding it from its beginning", error)
    yield from _stream_file(place, None, None, fps, start, end)


def _stream_file(
    place: Place,
    key: Key | None,
    origin: int | None,
    fps: float | None,
    start: float,
    end: float | None,
) -> Generator[tuple[Frame, float], None, None]:
    converter = VideoReformatter()
    with (
        open_video(place) as (container, track),
        contextlib.closing(decode(container, track, place, key, origin)) as frames,
    ):
        first = next(frames)
        clock = Clock(first.pts if origin is None else origin, track.time_base)
        if fps is None:
            stop = None if end is None else clock.first(end)
            for frame in itertools.chain((first,), frames):
                if stop is not None and frame.pts >= stop:
                    return
                if frame.pts >= clock.first(start):
                    yield to_rgb(frame, converter, place), clock.seconds(frame.pts)
            return

        targets = clock.targets(fps, start, end)
        target = next(targets, None)
        shown, gap = first, None
        for frame in frames:
            while target is not None and clock.newest(target) < frame.pts:
                yield to_rgb(shown, converter, place), clock.seconds(shown.pts)
                target = next(targets, None)
            if target is None:
                return
            shown, gap = frame, frame.pts - shown.pts
        until = shown.pts + shown_for(shown.duration, gap, track)
        while target is not None and clock.shows(target, shown.pts, until):
            yield to_rgb(shown, converter, place), clock.seconds(shown.pts)
            target = next(targets, None)


def _stream_live(
    place: Place, fps: float | None, end: float | None, reconnect: Reconnect
) -> Generator[tuple[Frame, float], None, None]:
    converter = VideoReformatter()
    began: float | None = None  # when the first frame came, on this machine's clock
    newest, gap = 0.0, 0.001  # the last frame's time, and how long after the one before it came
    slot = 0  # time is divided into slots of 1 / fps; the next one to give a frame
    failures = 0
    while True:
        base: float | None = None  # the time of this connection's first frame
        try:
            for frame, seconds in _connect(place):
                if base is None and began is None:
                    began, base = time.monotonic(), 0.0
                elif base is None:
                    assert began is not None
                    base = max(time.monotonic() - began, newest + gap)
                now = base + seconds
                if end is not None and now >= end:
                    return
                gap = now - newest if now > newest else gap
                newest, failures = now, 0
                if fps is not None:
                    # A camera is not exact: a frame may come a tenth of a slot early.
                    here = math.floor(now * fps + 0.1)
                    if here < slot:
                        continue
                    slot = here + 1
                yield to_rgb(frame, converter, place), now
            problem = "it ended"
        except VideoError as error:
            if began is None:
                raise
            problem = str(error)
        if failures == reconnect.attempts:
            raise VideoError(
                f"{place.name}: lost at {newest:.3f} s and not found again in {failures} attempts; "
                f"the last problem: {problem}"
            )
        wait = min(reconnect.first_wait * 2.0 ** min(failures, 60), reconnect.longest_wait)
        failures += 1
        _log.warning(
            "%s: lost at %.3f s (%s); attempt %d of %d in %g s",
            *(place.name, newest, problem, failures, reconnect.attempts, wait),
        )
        reconnect.sleep(wait)


def _connect(place: Place) -> Generator[tuple[av.VideoFrame, float], None, None]:
    """The frames of one connection, and the seconds since the first of them."""
    with (
        open_video(place) as (container, track),
        contextlib.closing(decode(container, track, place)) as frames,
    ):
        first: av.VideoFrame | None = None
        began = time.monotonic()
        for frame in frames:
            if first is None:
                first, began = frame, time.monotonic()
            if first.pts is None:
                # Raw streams have no timestamps: the time of arrival is all there is.
                yield frame, time.monotonic() - began
            elif frame.pts is None:
                raise UnexpectedError(f"{place.name}: a frame has no timestamp")
            else:
                yield frame, float((frame.pts - first.pts) * track.time_base)


def _tubelets(
    frames: Iterable[tuple[Frame, float]], tubelet_size: int
) -> Generator[tuple[NDArray[np.uint8], float], None, None]:
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
            raise VideoError(_change(tubelet.shape[1:], frame.shape, seconds))
        tubelet[filled] = frame
        filled += 1
        if filled == tubelet_size:
            yield tubelet, seconds
            tubelet, filled = np.empty_like(tubelet), 0
    if filled:
        _log.warning("%d frames at the end do not fill a tubelet of %d", filled, tubelet_size)


def _change(old: tuple[int, ...], new: tuple[int, ...], seconds: float) -> str:
    return (
        f"the frames change from {old[1]}x{old[0]} to {new[1]}x{new[0]} pixels at {seconds:.3f} s"
    )
