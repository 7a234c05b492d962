"""Opening and decoding video with FFmpeg, without its habit of hiding damage.

What is damaged is an error and never a grey, repeated or missing frame. FFmpeg hides damage unless
it is told not to, so the decoder runs with `err_detect=explode`, without frame threads (with them
it hands out damaged frames before it notices), every packet must give its frame, and the file must
hold what its header promises. Damage that leaves a valid stream, a changed bit for instance that
makes one coefficient another, cannot be seen by any decoder. Nor can whole frames that are gone
from Matroska or MPEG-TS, which do not count them, if nothing left depends on them; nor a cut end
of MPEG-TS, whose header promises nothing.
"""

import bisect
import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from jvjepa.errors import VideoError

Frame = NDArray[np.uint8]  # [H, W, 3] RGB
Source = str | os.PathLike[str]

_LIVE_SCHEMES = {"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp"}
# One packet of these is one frame, so that packets tell the frames' times and none may be missing.
_ONE_FRAME_A_PACKET = {"h264", "hevc", "av1", "vp9", "mpeg4", "mjpeg"}
_MOST_PACKETS_TO_A_KEYFRAME = 3000  # of a live stream; a minute or more
_COARSEST_TIMESTAMP = Fraction(1, 1000)  # seconds; Matroska rounds to this
_SHORTEST_TAIL = 0.05  # seconds; a header's duration may be this wrong


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a video is.

    Args:
        address: what FFmpeg opens.
        name: what messages call it; without passwords.
        live: whether it is live; None is known once it is open.
        format: FFmpeg's name of its format; None lets FFmpeg find out.
        timeout: seconds that opening and each read may take; None for local files.
    """

    address: str
    name: str
    live: bool | None
    format: str | None = None
    timeout: tuple[float, float] | None = None


def locate(source: Source, timeout: tuple[float, float]) -> Place:
    """Finds out what `source` is, without opening it; `timeout` as in `Place`."""
    text = os.fspath(source)
    if text.startswith("camera:"):
        number = text.removeprefix("camera:")
        if not number.isdecimal():
            raise VideoError(f"{text}: a camera has a number, as in camera:0")
        if sys.platform != "linux":
            raise VideoError(
                f"{text}: cameras can be opened on Linux (v4l2) and not on {sys.platform}; "
                "use the camera's rtsp:// or http:// address"
            )
        device = pathlib.Path(f"/dev/video{number}")
        if not device.exists():
            there = sorted(str(path) for path in pathlib.Path("/dev").glob("video*"))
            raise VideoError(
                f"{text}: there is no {device}; there is {', '.join(there) or 'no camera'}"
            )
        return Place(str(device), text, live=True, format="v4l2", timeout=timeout)
    if "://" in text:
        url = urllib.parse.urlsplit(text)
        name = url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
        live = True if url.scheme.lower() in _LIVE_SCHEMES else None
        return Place(text, name, live=live, timeout=timeout)
    path = pathlib.Path(text)
    if path.is_dir():
        raise VideoError(f"{text}: is a directory and not a video file")
    if not path.exists():
        raise VideoError(f"{text}: there is no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{text}: is empty (0 bytes)")
    # With the prefix, a colon in a file's name is not taken for a protocol.
    return Place(f"file:{text}", text, live=False)


@contextlib.contextmanager
def open_video(place: Place) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first track of moving pictures, and closes it whatever happens."""
    options = {"rtsp_transport": "tcp"} if place.address.startswith("rtsp") else {}
    began = time.monotonic()
    try:
        container = av.open(
            place.address, format=place.format, options=options, timeout=place.timeout
        )
    except (av.FFmpegError, OSError) as error:
        # What is interrupted because of its time limit (rtsp) may call it invalid data.
        late = place.timeout is not None and time.monotonic() - began >= place.timeout[0]
        why = "no answer in time" if late else _reason(error)
        raise VideoError(f"{place.name}: cannot be opened as a video ({why})") from error
    with container:
        tracks = [
            track
            for track in container.streams.video
            if not track.disposition & Disposition.attached_pic  # the picture on a record's sleeve
        ]
        if not tracks:
            kinds = ", ".join(sorted({track.type for track in container.streams})) or "nothing"
            raise VideoError(f"{place.name}: has no video track (it has {kinds})")
        track = tracks[0]
        if track.codec_context is None:
            raise VideoError(f"{place.name}: no decoder for its video track in this FFmpeg")
        track.thread_type = "SLICE"
        track.codec_context.options = {"err_detect": "explode"}
        yield container, track


def _reason(error: Exception) -> str:
    # Not str(error): that repeats the address, which may hold a password.
    if isinstance(error, av.error.ExitError):
        return "no data in time"
    return getattr(error, "strerror", None) or type(error).__name__


def is_live(place: Place) -> bool:
    """Whether a source has no end: one that must be opened says neither its length nor its size."""
    if place.live is not None:
        return place.live
    with open_video(place) as (container, _):
        return container.duration is None and container.size <= 0


class UnexpectedError(VideoError):
    """The decoder did not give what the packets or the header promised."""


class Key(NamedTuple):
    """A keyframe: its timestamp, what to seek to, and its place in the order of decoding."""

    tick: int
    seek: int
    order: int


class Clock(NamedTuple):
    """Converts the ticks of a file's timestamps.

    Times that a caller asks for count as reached a little early, because timestamps are rounded:
    Matroska says 67 ms for the frame at 66.67 ms.
    """

    origin: int
    time_base: Fraction

    def seconds(self, tick: int) -> float:
        """The time of a frame."""
        return (tick - self.origin) * self.time_base.numerator / self.time_base.denominator

    def newest(self, seconds: Fraction) -> int:
        """The greatest tick that is shown at this time."""
        return self.origin + math.floor((seconds + self._tolerance()) / self.time_base)

    def first(self, seconds: float) -> int:
        """The smallest tick that is not before this time."""
        return self.origin + math.ceil((Fraction(seconds) - self._tolerance()) / self.time_base)

    def targets(self, fps: float, start: float, end: float | None) -> Iterator[Fraction]:
        """The times start, start + 1/fps, ... below `end`, in seconds; None never ends."""
        step, at = 1 / Fraction(fps), Fraction(start)
        while end is None or at + self._tolerance() < Fraction(end):
            yield at
            at += step

    def shows(self, seconds: Fraction, last: int, end: int) -> bool:
        """Whether a file whose last frame is shown from tick `last` to `end` shows one then.

        The end is the sum of two rounded numbers, so it is less exact than a timestamp.
        """
        until = (end - self.origin) * self.time_base - 2 * self._tolerance()
        return self.newest(seconds) <= last or seconds < until

    def _tolerance(self) -> Fraction:
        return min(self.time_base, _COARSEST_TIMESTAMP) / 2


@dataclasses.dataclass(frozen=True)
class Index:
    """The frames of a file.

    Args:
        clock: of the file's timestamps.
        ticks: int64 [n], growing, the timestamps of the frames that are shown.
        end: the tick at which the last frame has been shown.
        keys: the keyframes in the order of decoding, whose timestamps grow too; none where the file
            can only be decoded from its beginning.
        orders: the place in the order of decoding of each frame; empty without `keys`.
    """

    clock: Clock
    ticks: NDArray[np.int64]
    end: int
    keys: tuple[Key, ...] = ()
    orders: dict[int, int] = dataclasses.field(default_factory=dict)

    def key_for(self, tick: int) -> Key | None:
        """The last keyframe from which the frame can be decoded; None is the beginning."""
        found = bisect.bisect_right(self.keys, tick, key=lambda key: key.tick) - 1
        return self.keys[found] if found > 0 else None

    @property
    def seconds(self) -> float:
        """When the last frame has been shown."""
        return self.clock.seconds(self.end)


def index_packets(place: Place) -> Index | None:
    """Lists the frames of a file without decoding; None where its packets do not tell.

    Raises:
        VideoError: the file cannot be opened, or is cut off.
    """
    durations: dict[int, int] = {}
    orders: dict[int, int] = {}
    keys: list[Key] = []
    packets = 0
    with open_video(place) as (container, track):
        if track.codec_context.name not in _ONE_FRAME_A_PACKET:
            return None
        clock = Clock(0, track.time_base)
        joining = _joins(container, place)
        try:
            for packet in container.demux(track):
                packets += not _is_last(packet)
                joining = joining and not packet.is_keyframe
                if packet.size == 0 or joining:
                    continue
                if packet.pts is None or packet.pts in orders:
                    return None
                if packet.is_corrupt:
                    at = clock._replace(origin=min(durations, default=packet.pts))
                    raise _cut_off(place, at.seconds(packet.pts))
                orders[packet.pts] = packets
                if packet.is_keyframe and (not keys or packet.pts > keys[-1].tick):
                    first = packet.pts if packet.dts is None else min(packet.pts, packet.dts)
                    keys.append(Key(packet.pts, first, packets))
                if not packet.is_discard:
                    durations[packet.pts] = packet.duration or 0
        except av.FFmpegError as error:
            raise VideoError(f"{place.name}: cannot be read ({_reason(error)})") from error
        if not durations:
            return None
        ticks = np.array(sorted(durations), np.int64)
        last = int(ticks[-1])
        clock = clock._replace(origin=int(ticks[0]))
        gap = int(ticks[-1] - ticks[-2]) if len(ticks) > 1 else None
        end = last + shown_for(durations[last], gap, track)
        _check_complete(container, track, place, packets, clock, end)
    return Index(clock, ticks, end, tuple(keys), orders)


def index_frames(place: Place) -> Index:
    """Lists the frames of a file by decoding it all.

    Raises:
        VideoError: the file cannot be opened, or is damaged.
    """
    ticks: list[int] = []
    duration: int | None = None
    with open_video(place) as (container, track):
        for frame in decode(container, track, place):
            ticks.append(frame.pts)
            duration = frame.duration
        gap = ticks[-1] - ticks[-2] if len(ticks) > 1 else None
        end = ticks[-1] + shown_for(duration, gap, track)
        return Index(Clock(ticks[0], track.time_base), np.array(ticks, np.int64), end)


def index_file(place: Place) -> Index:
    """Lists the frames of a file, without decoding if its packets tell."""
    return index_packets(place) or index_frames(place)


def decode(
    container: InputContainer,
    track: VideoStream,
    place: Place,
    key: Key | None = None,
    origin: int | None = None,
) -> Generator[av.VideoFrame, None, None]:
    """Decodes from a keyframe, or from the first one, to the end; no frame is damaged or left out.

    Args:
        container: as `open_video` gives it, newly opened.
        track: its video track.
        place: where it is.
        key: where to start; None is the beginning.
        origin: the tick that messages call 0 s; None is that of the first frame.

    Yields:
        Frames in the order in which they are shown, with timestamps that grow. Only a live source
        may yield frames without timestamps.

    Raises:
        UnexpectedError: it is damaged; the message says where.
    """
    awaited: set[int] = set()  # ticks of packets whose frames have not come yet
    counts = track.codec_context.name in _ONE_FRAME_A_PACKET
    clock = Clock(origin or 0, track.time_base)
    first: int | None = None  # the tick of the first packet, a keyframe
    newest: int | None = None
    at: int | None = None  # what messages say
    gap = duration = None
    packets = frames = 0
    waiting = key is not None or _joins(container, place)
    interlaced = False

    def damaged(what: str) -> UnexpectedError:
        where = "at its beginning" if at is None else f"at {max(clock.seconds(at), 0.0):.3f} s"
        return UnexpectedError(f"{place.name}: {what}, {where}")

    try:
        if key is not None:
            container.seek(key.seek, stream=track)
        for packet in container.demux(track):
            if not _is_last(packet):
                packets += 1
                if waiting and place.live and packets > _MOST_PACKETS_TO_A_KEYFRAME:
                    raise damaged(f"no keyframe in {packets} packets")
                waiting = waiting and not (
                    packet.is_keyframe and (key is None or packet.pts == key.tick)
                )
                if waiting or packet.size == 0:  # an empty one says "show the last for longer"
                    continue
                at = packet.pts
                if first is None and at is not None:
                    first = at
                    clock = clock._replace(origin=at if origin is None else origin)
                if packet.is_corrupt:
                    raise damaged("a part is missing (is it cut off?)")
                if counts and packet.pts is not None and not packet.is_discard:
                    awaited.add(packet.pts)
            for frame in packet.decode():
                at = frame.pts
                interlaced = frame.interlaced_frame
                if frame.is_corrupt:
                    raise damaged("a frame is damaged")
                if frame.pts is None and not place.live:
                    raise UnexpectedError(
                        f"{place.name}: its frames have no timestamps; put it into a container "
                        "such as mp4 or mkv"
                    )
                if frame.pts is not None:
                    if newest is not None and frame.pts <= newest:
                        raise damaged("timestamps do not grow")
                    # What is shown before the first keyframe may depend on one that is not there,
                    # and after joining a live stream a decoder may need frames to find its feet.
                    # Two packets can make one interlaced frame.
                    lost = [tick for tick in awaited if first <= tick < frame.pts]
                    if lost and not interlaced and not (place.live and not frames):
                        at = min(lost)
                        raise damaged("a frame is missing")
                    awaited = {tick for tick in awaited if tick > frame.pts}
                    clock = clock if frames or key else clock._replace(origin=frame.pts)
                    gap = None if newest is None else frame.pts - newest
                    newest, duration = frame.pts, frame.duration
                frames += 1
                yield frame
                at = newest
    except av.FFmpegError as error:
        raise damaged(f"cannot be decoded ({_reason(error)})") from error
    if not frames:
        raise damaged("no frame can be decoded")
    if awaited and not interlaced:
        at = min(awaited)
        raise damaged("a frame is missing")
    if key is None and not place.live and newest is not None:
        end = newest + shown_for(duration, gap, track)
        _check_complete(container, track, place, packets, clock, end)


def to_rgb(frame: av.VideoFrame, converter: VideoReformatter, place: Place) -> Frame:
    """Converts a frame to RGB and turns it upright.

    Args:
        frame: of any pixel format.
        converter: any; it remembers what it needs for the next frame.
        place: where it is from.

    Returns:
        uint8 [H, W, 3].

    Raises:
        VideoError: the file asks for a rotation that is no multiple of 90 degrees.
    """
    image = converter.reformat(frame, format="rgb24").to_ndarray()
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError as error:  # of PyAV, for a kind of data that it has no name for, as EXIF
        raise VideoError(
            f"{place.name}: its frames carry data that PyAV cannot read: {error}"
        ) from None
    if data is None:
        return image
    # A point (x, y), y down, is shown at (a x + c y, b x + d y). The whole matrix, because PyAV's
    # `frame.rotation` takes a mirrored video for one turned by 180 degrees.
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if a == d == 0 and b != 0 != c:
        image = image.transpose(1, 0, 2)
        a, d = c, b
    elif not (b == c == 0 and a != 0 != d):
        angle = math.degrees(math.atan2(b, a))
        raise VideoError(
            f"{place.name}: is to be shown turned by {angle:.1f} degrees; only multiples of 90 work"
        )
    return np.ascontiguousarray(image[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])


def _is_last(packet: av.Packet) -> bool:
    """Whether it is no packet, but PyAV's mark of the end."""
    return packet.size == 0 and packet.dts is None


def _joins(container: InputContainer, place: Place) -> bool:
    """Whether it may begin in the middle: then what precedes the first keyframe cannot be shown.

    Elsewhere the first packet is a keyframe, and if it does not look like one it is damaged.
    """
    return bool(place.live) or container.format.name in {"mpegts", "mpeg"}


def shown_for(duration: int | None, gap: int | None, track: VideoStream) -> int:
    """How long the last frame is shown, in ticks.

    Args:
        duration: what the file says; None or 0 where it does not.
        gap: how long the frame before was shown; None where there was none.
        track: whose average rate is the last resort.
    """
    if duration or gap:
        return duration or gap
    return round(1 / (track.average_rate * track.time_base)) if track.average_rate else 1


def _check_complete(
    container: InputContainer,
    track: VideoStream,
    place: Place,
    packets: int,
    clock: Clock,
    end: int,
) -> None:
    """Raises VideoError if the header promises more than there is."""
    if "mp4" in container.format.name:
        if packets < len(track.index_entries):
            raise _cut_off(place, clock.seconds(end))
        return
    # The tag is of the track. The container's is of its longest track, so it tells if it is alone.
    promised = _seconds(track.metadata.get("DURATION", ""))
    if promised is None and len(container.streams) == 1 and container.duration is not None:
        promised = container.duration / av.time_base
    frame = float(1 / track.average_rate) if track.average_rate else 0.0
    # Some writers count from 0 and some from the first frame: believe what promises less.
    there = max(clock.seconds(end), float(end * track.time_base))
    if promised is not None and promised - there > max(_SHORTEST_TAIL, 1.5 * frame):
        raise _cut_off(place, clock.seconds(end), f" of {promised:.3f} s")


def _cut_off(place: Place, seconds: float, promised: str = "") -> UnexpectedError:
    return UnexpectedError(f"{place.name}: is cut off at {seconds:.3f} s{promised}")


def _seconds(text: str) -> float | None:
    """Of a Matroska tag such as 00:01:02.500000000; None of anything else."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds
