"""The course of a run: its metrics, looked at one update late, logged, and shown."""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
from rich.console import Console

from jvjepa.errors import TrainingError
from jvjepa.train.checkpoint import Checkpoints
from jvjepa.train.metrics import MetricsLog, progress
from jvjepa.train.rate import matmul_rate
from jvjepa.train.task import Task
from jvjepa.typing import Array


class _Update(NamedTuple):
    """An update that was started."""

    number: int
    clips: int
    metrics: dict[str, Array]


class Watch:
    """Looks at every update of a run; to be used in a `with` block.

    An update is looked at when the next one has been started, so that the devices do not wait.

    Args:
        task: what is trained.
        folder: of the run.
        checkpoints: its checkpoints, for messages.
        first: updates that were made before.
        steps: updates of the whole run.
        log_every: updates from one row of metrics to the next.
        console: where to show progress; None shows nothing.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        checkpoints: Checkpoints,
        first: int,
        steps: int,
        log_every: int,
        console: Console | None,
    ) -> None:
        """Measures the machine, if the task says what there is to compute."""
        self._checkpoints, self._log_every, self._flops = checkpoints, log_every, task.flops
        self._rate = matmul_rate(task.dtype) * jax.device_count() if task.flops else math.nan
        self._under_way: _Update | None = None
        self._row: dict[str, float] = {}
        self._since: tuple[int, float] | None = None  # where speed is measured from: step and time
        self._speed: float | None = None  # clips per second, as measured last
        main = jax.process_index() == 0
        with ExitStack() as stack:
            log = MetricsLog(folder, step=first + 1, enabled=main)
            self._log = stack.enter_context(log)
            self._shown = stack.enter_context(progress(console if main else None, steps, first))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def started(self, number: int, metrics: dict[str, Array], clips: int) -> None:
        """Takes in an update that was started, and looks at the one before.

        Args:
            number: of the update, from 1.
            metrics: each float32 [].
            clips: that it is about.

        Raises:
            TrainingError: the one before was not finite, or another process has died.
        """
        if self._under_way is not None:
            before = self._under_way.number
            self._look(measure=True)
            if before % self._log_every == 0:
                self.write({})
                self._since = (before, time.monotonic())
        self._under_way = _Update(number, clips, metrics)

    def finish(self) -> None:
        """Waits for the newest update, and looks at it; speed is measured from the next one on.

        Raises:
            TrainingError: as `started`.
        """
        self._look(measure=False)
        self._since = None

    def _look(self, *, measure: bool) -> None:
        """Looks at the newest update; its speed is known only when another one has been started.

        A processor computes an update while it is started, other devices do behind it: the times
        at which updates are started tell the speed of both.
        """
        assert self._under_way is not None
        number, clips, metrics = self._under_way
        self._under_way = None
        try:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() == 1:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"step {number}: another process of the run has died ({reason}); {self._left()}"
            ) from error
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            bad = [f"{name} = {x}" for name, x in values.items() if not math.isfinite(x)]
            self._checkpoints.wait()  # all processes are here
            raise TrainingError(f"step {number}: {', '.join(bad)}; {self._left()}")
        if measure:
            now = time.monotonic()
            if self._since is None:
                self._since = (number, now)
            else:
                self._speed = (number - self._since[0]) * clips / (now - self._since[1])
        share = None
        if self._speed is not None:
            values["clips_per_second"] = self._speed
            if self._flops:
                share = values["share_of_peak"] = self._speed * self._flops / self._rate
        self._number, self._row = number, values
        self._shown.update(number, values["loss"], self._speed, share)

    def write(self, values: dict[str, float]) -> None:
        """Writes a row: the metrics of the update that was looked at last, and `values`."""
        self._log.log(self._number, {**self._row, **values})

    def _left(self) -> str:
        latest = self._checkpoints.latest
        which = (
            "there is no checkpoint yet" if latest is None else f"the newest is of step {latest}"
        )
        return f"checkpoints in {self._checkpoints.folder}: {which}"
