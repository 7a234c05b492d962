"""When a gate lets a tubelet through; `jvjepa.gating` and the runtime without JAX share it."""

import dataclasses
from typing import Literal, get_args

from jvjepa.errors import ConfigError

Reference = Literal["encoded", "previous"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """When to encode.

    Args:
        tau: encode where the surprise is at least this, 0 to 2; 0 encodes everything. `jvjepa
            calibrate` finds the value for a camera.
        max_hold: encode at the latest after this many skipped in a row.
        settle: encode this many more after each that was surprising. The embedding right after a
            change still sees a window full of the time before, and would be held; with W-1 it is
            held when the window is full of what is new.
        reference: compare with the last "encoded" one, or with the "previous" one as the library
            saccadic does, which slow drift never triggers.

    Raises:
        ConfigError: a value is impossible.
    """

    tau: float = 0.015
    max_hold: int = 64
    settle: int = 0
    reference: Reference = "encoded"

    def __post_init__(self) -> None:
        """Checks every field."""
        if not 0.0 <= self.tau <= 2.0:
            raise ConfigError(f"tau = {self.tau}; it must be between 0 and 2")
        for name in ("max_hold", "settle"):
            if not 0 <= getattr(self, name) < 2**31:  # they become int32
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be 0 to {2**31 - 1}")
        if self.reference not in get_args(Reference):
            right = get_args(Reference)
            raise ConfigError(f"reference = {self.reference!r}; it must be one of {right}")
