"""What a run measures: a line of JSON for each step, TensorBoard's events, and a line of progress.

`metrics.jsonl` has objects like {"step": 10, "loss": 0.25, "probe/accuracy": 0.5}, with ascending
steps. JSON knows no NaN and no infinity; they are null.
"""

import contextlib
import datetime
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jvjepa.errors import InputError
from jvjepa.recording import named
from jvjepa.storage import new_file

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
_FLUSHED = 10.0  # seconds between writes to the disk of TensorBoard's events
_LINES = 10.0  # seconds between lines of progress where there is no terminal


class MetricsLog:
    """Appends what was measured to `metrics.jsonl`, and to TensorBoard's events.

    A run that goes on drops what it had measured from `step` on, since it will do that again; so
    does TensorBoard, which finds a mark.

    Args:
        folder: of the run; it must exist.
        step: the first that is to come.
        enabled: False writes nothing, for all processes but one.

    Raises:
        InputError: `metrics.jsonl` is damaged: not merely its last line torn.
    """

    def __init__(self, folder: Path, *, step: int, enabled: bool = True) -> None:
        """Opens both files."""
        self._path, self._folder = Path(folder) / METRICS_FILE, Path(folder) / EVENTS_FOLDER
        self._next = step
        self._file = self._events = None
        if not enabled:
            return
        with named(self._path):
            if self._path.exists():
                _drop(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
        with named(self._folder):
            self._folder.mkdir(exist_ok=True)
            # its name has whole seconds: without the step, the next one might be the same
            self._events = EventsWriter(str(self._folder / "events"), f".{step}")
            self._write(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            self._flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step; the line is in the file when this returns.

        Args:
            step: more than at the last call.
            values: by name, "loss" or "probe/accuracy".

        Raises:
            InputError: the step is not above the last, or a value is named "step".
        """
        if step < self._next or "step" in values:
            raise InputError(
                f"step = {step}, values of {', '.join(values)}; the step must be {self._next} or "
                "more, and no value be named step"
            )
        self._next = step + 1
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        with named(self._path):
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        with named(self._folder):
            self._write(Event(step=step, summary=Summary(value=scalars)))
            if time.monotonic() - self._flushed > _FLUSHED:
                self._flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left, and closes both files."""
        with contextlib.ExitStack() as files:
            for file, path in ((self._file, self._path), (self._events, self._folder)):
                if file is not None:
                    files.enter_context(named(path))
                    files.callback(file.close)
        self._file = self._events = None


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl`; a last line that a kill has torn is left out.

    Args:
        path: the file.

    Returns:
        {"step": 10, "loss": 0.25}, and so on; None is what was not a finite number.

    Raises:
        InputError: a line is no such row, or the steps do not ascend; it names file and line.
    """
    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # only the last one can
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise InputError(f"{path}, line {number} is no object with a whole number step")
            if rows and row["step"] <= rows[-1]["step"]:
                raise InputError(
                    f"{path}, line {number} has step {row['step']} after {rows[-1]['step']}; "
                    "steps must ascend"
                )
            rows.append(row)
    return rows


def _drop(path: Path, step: int) -> None:
    """Leaves the rows below a step, in a file that replaces the old one."""
    rows = [row for row in read(path) if row["step"] < step]
    with new_file(path) as work, open(work, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Shown:
    """A line of progress; see `progress`."""

    def __init__(self, console: Console, total: int, first: int) -> None:
        """Begins at a step."""
        self._console, self._total, self._first = console, total, first
        self._began, self._printed = time.monotonic(), -math.inf
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=first)

    def update(
        self,
        step: int,
        loss: float,
        clips_per_second: float | None = None,
        share_of_peak: float | None = None,
    ) -> None:
        """Shows where the run is.

        Args:
            step: updates made.
            loss: of the last one.
            clips_per_second: over all devices; None where it is not known.
            share_of_peak: of the machine's rate, 0 to 1; None where it is not known.
        """
        speed = "" if clips_per_second is None else f" · {clips_per_second:.3g} clips/s"
        share = "" if share_of_peak is None else f" · {share_of_peak:.0%} of peak"
        text = f"loss {loss:.4g}{speed}{share}"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        done = step >= self._total
        if not self._console.is_terminal and (done or now - self._printed >= _LINES):
            self._printed = now
            made = max(1, step - self._first)
            seconds = round((now - self._began) / made * (self._total - step))
            line = f"{step}/{self._total} · {text} · {datetime.timedelta(seconds=seconds)} left"
            self._console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(console: Console | None, total: int, first: int = 0) -> Iterator[Shown]:
    """Shows a bar on a terminal, elsewhere a line at once, every ten seconds, and at the end.

    Args:
        console: where; None shows nothing.
        total: steps of the run.
        first: the step that it begins at.

    Yields:
        The line, to `update`.
    """
    shown = Shown(Console(quiet=True) if console is None else console, total, first)
    with shown._bar:
        yield shown
