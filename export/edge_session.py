"""`jvjepa stream` on an exported folder: `jvjepa.live.Session`'s face on an `EdgeStream`."""

import time
from pathlib import Path

import numpy as np

from jvjepa.errors import InputError
from jvjepa.export.runtime import EdgeStream
from jvjepa.gate import Gate
from jvjepa.gating import Statistics
from jvjepa.live import Result, Tubelet
from jvjepa.streaming import Pool


class EdgeSession:
    """One gated stream of an exported model.

    Args:
        folder: the export.
        gate: when to encode.
        pool: see `jvjepa.streaming.step`.
        provider: see `EdgeStream`.

    Raises:
        InputError: as `EdgeStream`; or the step was exported for a size to which frames are not
            cut.
    """

    def __init__(self, folder: Path, gate: Gate, *, pool: Pool, provider: str) -> None:
        """Loads the graphs."""
        self.gate = gate
        self.stream = EdgeStream(folder, gate=gate, pool=pool, provider=provider)
        if self.stream.crop_size is None:
            raise InputError(f"{folder} was exported for a size to which frames are not cut")
        self.crop_size, self.width = self.stream.crop_size, self.stream.width
        self.tubelet_size = self.stream.tubelet_size
        self.seen = self.encoded = 0

    def step(self, tubelet: Tubelet) -> Result:
        """Takes in a tubelet."""
        begin = time.perf_counter()
        out = self.stream.step_pixels(tubelet.pixels)
        seconds = time.perf_counter() - begin
        self.seen, self.encoded = self.seen + 1, self.encoded + out.is_new
        return Result(
            tubelet=tubelet,
            embedding=out.embedding,
            is_new=out.is_new,
            surprise=out.surprise,
            finite=not np.isnan(out.surprise),
            seconds=seconds,
        )

    def statistics(self) -> Statistics:
        """What the gate has done; the gate's own share of the compute is left out."""
        seen, encoded = (np.array([count]) for count in (self.seen, self.encoded))
        share = self.encoded / self.seen if self.seen else np.nan
        return Statistics(seen, encoded, seen - encoded, share)
