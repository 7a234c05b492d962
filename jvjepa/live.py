"""From a video source to a sequence of embeddings: read, preprocess, gate, encode."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Generator
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jvjepa import gating, video
from jvjepa.cache import CacheDType
from jvjepa.decoding import is_live, locate
from jvjepa.gate import Gate
from jvjepa.preprocessing import HasCropSize
from jvjepa.streaming import Pool, Positions
from jvjepa.weights import Model

_AHEAD = 4  # tubelets that wait, ready, between the reader's thread and the encoder
_PATIENCE = 1.0  # seconds for the reader to stop; one that waits for a camera stops when it answers


class Tubelet(NamedTuple):
    """A tubelet on its way to the encoder.

    Args:
        pixels: float32 [2, crop, crop, 3], preprocessed.
        frame: uint8 [H, W, 3], its newest frame as it came.
        time: seconds of its newest frame.
        dropped: how many before it a live source had to drop, because the encoder was slower.
    """

    pixels: NDArray[np.float32]
    frame: NDArray[np.uint8]
    time: float
    dropped: int


class Result(NamedTuple):
    """What a tubelet led to.

    Args:
        tubelet: the tubelet.
        embedding: float32 [D].
        is_new: whether it was encoded; otherwise `embedding` is the last one again.
        surprise: 1 - cosine to the gate's reference.
        finite: whether its pixels were finite.
        seconds: what the step took, from pixels on the host to the embedding on the host.
    """

    tubelet: Tubelet
    embedding: NDArray[np.float32]
    is_new: bool
    surprise: float
    finite: bool
    seconds: float


class Session:
    """One gated stream of a model, ready to step: its state, compiled once.

    Args:
        model: a loaded checkpoint.
        gate: when to encode.
        window: tubelets that a token sees.
        positions: see `jvjepa.streaming.step`.
        pool: see `jvjepa.streaming.step`.
        cache: see `jvjepa.streaming.init_state`.
    """

    def __init__(
        self,
        model: Model,
        gate: Gate,
        *,
        window: int,
        positions: Positions = "window",
        pool: Pool = "tubelet",
        cache: CacheDType | None = None,
    ) -> None:
        """Compiles the step on a tubelet of zeros."""
        self.model, self.gate, self.window = model, gate, window
        self.positions: Positions = positions
        self.pool: Pool = pool
        self.cache: CacheDType | None = cache
        self.restart(gate)
        config = model.config.encoder
        shape = (config.tubelet_size, config.crop_size, config.crop_size, 3)
        self._step(np.zeros(shape, np.float32))
        self.restart(gate)

    def restart(self, gate: Gate) -> None:
        """Forgets everything and goes on with another gate; compiles nothing."""
        self.gate, self.seen, self.encoded = gate, 0, 0
        self.state = gating.init_state(self.model.encoder, 1, self.window, cache=self.cache)

    def step(self, tubelet: Tubelet) -> Result:
        """Takes in a tubelet."""
        begin = time.perf_counter()
        out = self._step(tubelet.pixels)
        seconds = time.perf_counter() - begin
        is_new = bool(out.is_new[0])
        self.seen, self.encoded = self.seen + 1, self.encoded + is_new
        return Result(
            tubelet=tubelet,
            embedding=out.embedding[0],
            is_new=is_new,
            surprise=float(out.surprise[0]),
            finite=bool(out.finite[0]),
            seconds=seconds,
        )

    @property
    def tubelet_size(self) -> int:
        """Frames of a tubelet."""
        return self.model.config.encoder.tubelet_size

    def statistics(self) -> gating.Statistics:
        """What the gate has done since the last restart, also after a step was interrupted."""
        # An interrupted step has donated the state and given none back: its counters are gone.
        gate = self.state.gate._replace(
            seen=np.array([self.seen]),
            encoded=np.array([self.encoded]),
            steps=self.seen,
            runs=self.encoded,
        )
        return gating.statistics(gate, self.model.config.encoder, window=self.window)

    def _step(self, pixels: NDArray[np.float32]) -> gating.GatedOutput:
        how = {"positions": self.positions, "pool": self.pool}
        self.state, out = gating.step(
            self.model.encoder,
            self.model.params["encoder"],
            self.state,
            pixels[None],
            self.gate,
            **how,
        )
        return jax.device_get(out._replace(tokens=None))


def tubelets(
    source: str,
    model: Model,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Generator[Tubelet, None, None]:
    """Reads and preprocesses tubelets for a model; see `read_tubelets`."""
    config = model.config
    span = {"fps": fps, "start": start, "end": end}
    return read_tubelets(source, config, config.encoder.tubelet_size, **span)


def read_tubelets(
    source: str,
    crop: HasCropSize,
    tubelet_size: int,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Generator[Tubelet, None, None]:
    """Reads and preprocesses tubelets in a thread of its own, a few ahead of the caller.

    Of a file every tubelet comes. A live source does not wait: where the caller is slower, the
    oldest tubelet that waits is dropped, and counted. The thread starts with the first tubelet that
    is asked for, and stops when the generator is closed.

    Args:
        source: a file, a URL, or "camera:0"; see `jvjepa.video.stream`.
        crop: says how to preprocess.
        tubelet_size: frames of a tubelet.
        fps: frames per second to take; None takes all.
        start: seconds to skip; files only.
        end: seconds at which to stop; None goes on to the end.

    Yields:
        Tubelets in the order of time.

    Raises:
        VideoError: the source cannot be read; the tubelets before are good.
    """
    place = locate(source, video.Reconnect().timeout)
    belt = _Belt(drops=is_live(place))
    again = video.Reconnect(sleep=belt.sleep)
    frames = video.stream(source, fps=fps, start=start, end=end, reconnect=again)

    def work() -> None:
        try:
            with contextlib.closing(frames):
                for group, seconds in video.tubelets(frames, tubelet_size):
                    pixels = video.preprocess(group, crop)
                    belt.put(Tubelet(pixels, group[-1], seconds, dropped=0))
            belt.end(None)
        except _ClosedError:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it
            belt.end(error)

    thread = threading.Thread(target=work, name="jvjepa-reader", daemon=True)
    thread.start()
    taken = 0
    try:
        while (found := belt.take()) is not None:
            number, tubelet = found
            yield tubelet._replace(dropped=number - taken)
            taken += 1
    finally:
        belt.close()
        thread.join(_PATIENCE)


class _ClosedError(Exception):
    """Tells the reader's thread that nobody takes its tubelets any more."""


class _Belt:
    """Carries tubelets, numbered, from the reader's thread to the caller's.

    The end is not one of the things on it: it waits for nothing, and pushes nothing off.
    """

    def __init__(self, *, drops: bool) -> None:
        """Begins empty; one that `drops` pushes off the oldest where others let the reader wait."""
        self.drops = drops
        self.changed = threading.Condition()
        self.waiting: deque[tuple[int, Tubelet]] = deque()
        self.count = 0
        self.closed = self.ended = False
        self.error: BaseException | None = None

    def put(self, tubelet: Tubelet) -> None:
        """Lays a tubelet down; raises _ClosedError if nobody will take it."""
        with self.changed:
            if self.drops and len(self.waiting) == _AHEAD:
                self.waiting.popleft()
            self.changed.wait_for(lambda: self.closed or len(self.waiting) < _AHEAD)
            if self.closed:
                raise _ClosedError
            self.waiting.append((self.count, tubelet))
            self.count += 1
            self.changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """Says that no more will come, and why."""
        with self.changed:
            self.ended, self.error = True, error
            self.changed.notify_all()

    def take(self) -> tuple[int, Tubelet] | None:
        """Waits for the next tubelet and its number; None at the end, or the reader's error."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.ended)
            if self.waiting:
                self.changed.notify_all()
                return self.waiting.popleft()
        if self.error is not None:
            raise self.error
        return None

    def close(self) -> None:
        """Tells the reader to stop."""
        with self.changed:
            self.closed = True
            self.waiting.clear()
            self.changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """What the reader does between two connections; raises _ClosedError as `put` does."""
        with self.changed:
            if self.changed.wait_for(lambda: self.closed, seconds):
                raise _ClosedError
