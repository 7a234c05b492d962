"""Options that several commands of `jvjepa` share, as dataclasses to inherit from."""

import dataclasses
from pathlib import Path
from typing import Literal

from jvjepa.area import parse_areas
from jvjepa.attention import Backend
from jvjepa.cache import CacheDType
from jvjepa.streaming import Pool, Positions
from jvjepa.weights import Model, load

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How to run the model."""

    dtype: DType | None = None
    """Dtype of the computation; by default that of the weights."""
    attention: Backend = "auto"
    """Attention backend."""
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2; by default what was stored at conversion."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""
    lora: Path | None = None
    """LoRA adapters to merge into the weights."""

    def load(self) -> Model:
        """Loads the model of a command."""
        areas = parse_areas(self.area, self.area_layers)
        how = {"dtype": self.dtype, "attention": self.attention}
        return load(self.model, **how, areas=areas, lora=self.lora)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Running):
    """What to read of a video, and how to run the model."""

    fps: float | None = None
    """Frames per second to take; by default all frames are taken."""
    start: float = 0.0
    """Seconds to skip (files only)."""
    end: float | None = None
    """Seconds at which to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming(Reading):
    """The streaming encoder's options."""

    window: int = 8
    """Tubelets (pairs of frames) that a token sees."""
    max_hold: int = 64
    """Encode at the latest after this many skipped tubelets."""
    settle: int = 0
    """Encode this many more after each surprise, until the window is full of what is new."""
    positions: Positions = "window"
    """Count the frame axis in the window, or from the start of the stream."""
    pool: Pool = "tubelet"
    """Embed the newest tubelet, or the window."""
    cache: CacheDType | None = None
    """Keep the window's keys and values in 8 bits; by default in the dtype of the computation."""
