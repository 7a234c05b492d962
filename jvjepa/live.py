"""From a video source to a sequence of embeddings: read, preprocess, gate, encode."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jvjepa import gating, video
from jvjepa.decoding import is_live, locate
from jvjepa.gating import Gate
from jvjepa.streaming import Pool, Positions
from jvjepa.weights import Model

_AHEAD = 4  # tubelets that wait, ready, between the reader's thread and the encoder


class Tubelet(NamedTuple):
    """A tubelet on its way to the encoder.

    Args:
        pixels: float32 [2, crop, crop, 3], preprocessed.
        frame: uint8 [H, W, 3], its newest frame as it came.
        time: seconds of its newest frame.
        dropped: tubelets that a live source had to drop so far, because the encoder was slower.
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
    """

    def __init__(
        self,
        model: Model,
        gate: Gate,
        *,
        window: int,
        positions: Positions = "window",
        pool: Pool = "tubelet",
    ) -> None:
        """Compiles the step on a tubelet of zeros."""
        self.model, self.gate, self.window = model, gate, window
        self.positions: Positions = positions
        self.pool: Pool = pool
        self.restart(gate)
        config = model.config.encoder
        shape = (config.tubelet_size, config.crop_size, config.crop_size, 3)
        self._step(np.zeros(shape, np.float32))
        self.restart(gate)

    def restart(self, gate: Gate) -> None:
        """Forgets everything and goes on with another gate; compiles nothing."""
        self.gate = gate
        self.state = gating.init_state(self.model.encoder, 1, self.window)

    def step(self, tubelet: Tubelet) -> Result:
        """Takes in a tubelet."""
        begin = time.perf_counter()
        out = self._step(tubelet.pixels)
        seconds = time.perf_counter() - begin
        return Result(
            tubelet=tubelet,
            embedding=out.embedding[0],
            is_new=bool(out.is_new[0]),
            surprise=float(out.surprise[0]),
            finite=bool(out.finite[0]),
            seconds=seconds,
        )

    def statistics(self) -> gating.Statistics:
        """What the gate has done since the last restart."""
        config = self.model.config.encoder
        return gating.statistics(self.state.gate, config, window=self.window)

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
) -> Iterator[Tubelet]:
    """Reads and preprocesses tubelets in a thread of its own, a few ahead of the caller.

    Of a file every tubelet comes. A live source does not wait: where the caller is slower, the
    oldest tubelet that waits is dropped, and counted.

    Args:
        source: a file, a URL, or "camera:0"; see `jvjepa.video.stream`.
        model: its config says how to preprocess.
        fps: frames per second to take; None takes all.
        start: seconds to skip; files only.
        end: seconds at which to stop; None goes on to the end.

    Yields:
        Tubelets in the order of time.

    Raises:
        VideoError: the source cannot be read; the tubelets before are good.
    """
    place = locate(source, video.Reconnect().timeout)
    live = is_live(place) if place.live is None else place.live
    frames = video.stream(source, fps=fps, start=start, end=end)
    ready: queue.Queue[Tubelet | BaseException | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: Tubelet | BaseException | None) -> int:
        """Hands an item over; returns how many older ones had to go."""
        dropped = 0
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.0 if live else 0.1)
                break
            if live:
                with contextlib.suppress(queue.Empty):
                    dropped += ready.get_nowait() is not None
        return dropped

    def work() -> None:
        dropped = 0
        size = model.config.encoder.tubelet_size
        try:
            with contextlib.closing(video.tubelets(frames, size)) as groups:
                for group, seconds in groups:
                    pixels = video.preprocess(group, model.config)
                    dropped += put(Tubelet(pixels, group[-1], seconds, dropped))
                    if stop.is_set():
                        return
            put(None)
        except BaseException as error:  # handed to the caller's thread, which raises it
            put(error)

    thread = threading.Thread(target=work, name="jvjepa-reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
