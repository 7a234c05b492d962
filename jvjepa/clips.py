"""Videos in a folder; clips whose frames are chosen by number, cut as they are decoded."""

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jvjepa import video
from jvjepa.decoding import (
    Index,
    Source,
    UnexpectedError,
    index_frames,
    index_packets,
    is_live,
    locate,
)
from jvjepa.errors import VideoError
from jvjepa.preprocessing import HasCropSize, crops

SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split()
)
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def find_videos(folder: Path) -> list[Path]:
    """Finds the videos in a folder and in those inside it, told by their names.

    Args:
        folder: the folder; what begins with a dot in it is left out, links are followed.

    Returns:
        Their paths from there, sorted.
    """
    found: list[Path] = []
    seen: set[str] = set()  # links may lead in a circle
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        at = Path(root).relative_to(folder)
        found += [
            at / name
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found, key=lambda path: path.parts)


def with_index(source: Source, run: Callable[[Index], _T]) -> _T:
    """Does something with a file whose frames are counted first.

    Args:
        source: a path, or the URL of a file.
        run: is given the index. It is called again with another one, which decoding the file gives,
            where the first, which the file's packets give, turns out not to be right.

    Returns:
        What `run` returns.

    Raises:
        VideoError: the video is missing, damaged or live.
    """
    place = locate(source, video.Reconnect().timeout)
    if is_live(place):
        raise VideoError(f"{place.name}: is live and has no end; a file would be right")
    index = index_packets(place)
    if index is not None:
        try:
            return run(index)
        except UnexpectedError as error:
            # The file is not as its packets say, or is damaged; the decoder has the last word.
            _log.debug("%s; counting its frames by decoding it", error)
    return run(index_frames(place))


def shown_at(index: Index, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """The seconds at which a file first shows the frames of these numbers; of the same shape."""
    times = [index.clock.seconds(int(index.ticks[i])) for i in chosen.flat]
    return np.array(times, np.float64).reshape(chosen.shape)


def read_views(
    source: Source, times: NDArray[np.float64], config: HasCropSize, views: int
) -> Iterator[NDArray[np.float32]]:
    """Reads clips and cuts their views, frame by frame, so that no clip is held uncut.

    Args:
        source: as in `with_index`, inside of which this is to run.
        times: [clips, T], from `shown_at`; a frame may be in a clip more than once.
        config: gives the crop's size.
        views: crops of each frame, see `jvjepa.preprocessing.crops`.

    Yields:
        Of each clip float32 [M, T, crop, crop, 3].

    Raises:
        VideoError: the file is damaged, or its frames change their size.
    """
    name = locate(source, video.Reconnect().timeout).name
    shape: tuple[int, ...] | None = None
    for clip in times:
        wanted, places = np.unique(clip, return_inverse=True)
        kept = []
        with contextlib.closing(video.stream(source, start=float(wanted[0]))) as frames:
            due = ((frame, at) for frame, at in frames if at in wanted)
            for frame, at in itertools.islice(due, len(wanted)):
                shape = shape or frame.shape
                if frame.shape != shape:
                    sizes = " to ".join(f"{w} x {h}" for h, w, _ in (shape, frame.shape))
                    raise VideoError(f"{name}: its size changes from {sizes} at {at:.3f} s")
                kept.append(crops(frame[None], config, views))
        if len(kept) < len(wanted):
            raise UnexpectedError(f"{name}: no frame comes for {wanted[len(kept)]:.3f} s")
        yield np.concatenate(kept, axis=1)[:, places]
