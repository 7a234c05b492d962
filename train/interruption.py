"""SIGINT and SIGTERM as a wish that a loop looks at between two updates."""

import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from jvjepa.errors import TrainingError


class Interruption:
    """Takes in SIGINT and SIGTERM while its `with` block lasts; a second one acts at once.

    Outside of the main thread, where Python cannot take in signals, it does nothing.
    """

    def __init__(self) -> None:
        """Takes in nothing yet."""
        self._came = False
        self._before: dict[int, object] = {}

    def wanted(self) -> bool:
        """Whether one of them came, to any process; all processes have to ask equally often.

        Raises:
            TrainingError: another process has died.
        """
        if jax.process_count() == 1:
            return self._came
        try:
            return bool(np.any(multihost_utils.process_allgather(np.array(self._came))))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"another process of the run has died ({reason}); start all again, with resume"
            ) from error

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True
