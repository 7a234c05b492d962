"""The log of a run: each step once whatever ended it, in two formats; and the line of progress."""

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jvjepa.errors import InputError
from jvjepa.train import metrics
from jvjepa.train.metrics import METRICS_FILE, MetricsLog, progress, read


def write(folder: Path, steps: range, first: int | None = None) -> None:
    with MetricsLog(folder, step=steps.start if first is None else first) as log:
        for step in steps:
            log.log(step, {"loss": 1 / (step + 1)})


def events(folder: Path) -> Iterator[Event]:
    """TensorBoard's record files, in the order in which it reads them."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            body, data = data[12 : 12 + length], data[16 + length :]
            assert len(body) == length
            yield Event.FromString(body)


def shown_by_tensorboard(folder: Path) -> dict[int, dict[str, float]]:
    """What is left when marks of a new start drop what comes from their step on."""
    shown: dict[int, dict[str, float]] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {step: values for step, values in shown.items() if step < event.step}
        if event.HasField("summary"):
            shown[event.step] = {x.tag: x.simple_value for x in event.summary.value}
    return shown


# --- Rows ----------------------------------------------------------------------------------------


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    with MetricsLog(tmp_path, step=0) as log:
        assert read(path) == []
        log.log(1, {"loss": 0.25, "probe/accuracy": np.float32(0.5)})
        assert read(path) == [{"step": 1, "loss": 0.25, "probe/accuracy": 0.5}]
        log.log(5, {"loss": jnp.float32(0.125)})
        assert path.read_text().splitlines()[1] == '{"step": 5, "loss": 0.125}'
    found = shown_by_tensorboard(tmp_path)
    assert found == {1: {"loss": 0.25, "probe/accuracy": 0.5}, 5: {"loss": 0.125}}


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=0) as log:
        log.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert row == {"step": 0, "a": None, "b": None, "c": None, "d": 1.0}
    assert read(tmp_path / METRICS_FILE) == [row]
    shown = shown_by_tensorboard(tmp_path)[0]
    assert math.isnan(shown["a"])
    assert (shown["b"], shown["c"], shown["d"]) == (math.inf, -math.inf, 1.0)


@pytest.mark.parametrize("start", [0, 1, 7, 10, 30])
def test_going_on_has_each_step_once(tmp_path: Path, start: int) -> None:
    write(tmp_path, range(10))
    write(tmp_path, range(start, start + 5))
    kept = [*range(min(10, start)), *range(start, start + 5)]
    right = [{"step": step, "loss": 1 / (step + 1)} for step in kept]
    assert read(tmp_path / METRICS_FILE) == right
    shown = shown_by_tensorboard(tmp_path)
    assert list(shown) == kept
    for row in right:
        assert shown[row["step"]]["loss"] == np.float32(row["loss"])


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(3))
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read(path)] == [0, 1]
    write(tmp_path, range(2, 4))
    assert [row["step"] for row in read(path)] == [0, 1, 2, 3]
    assert path.read_bytes().startswith(whole)


def test_nothing_is_written_where_not_enabled(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=0, enabled=False) as log:
        log.log(1, {"loss": 1.0})
        with pytest.raises(InputError):
            log.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_files_are_closed(tmp_path: Path) -> None:
    def open_here() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    with MetricsLog(tmp_path, step=0) as log:
        assert open_here() == 2
        log.log(0, {"loss": 1.0})
    assert open_here() == 0
    log.close()


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 4, "loss"', "line 3 is not JSON"),
        ("\xff", "line 3 is not JSON"),
        ("", "line 3 is not JSON"),
        ("[1]", "line 3 is no object with a whole number step"),
        ('{"loss": 1}', "line 3 is no object with a whole number step"),
        ('{"step": true}', "line 3 is no object with a whole number step"),
        ('{"step": 1}', "line 3 has step 1 after 1; steps must ascend"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, range(2))
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b'\n{"step": 9}\n')
    before = path.read_bytes()
    for attempt in (lambda: read(path), lambda: MetricsLog(tmp_path, step=1)):
        with pytest.raises(InputError) as raised:
            attempt()
        assert str(raised.value).startswith(f"{path}, {message}")
        assert "\n" not in str(raised.value)
    assert path.read_bytes() == before


def test_steps_must_ascend(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=4) as log:
        for step, values in ((3, {"loss": 1.0}), (4, {"step": 1.0})):
            with pytest.raises(InputError, match=f"step = {step}, .* must be 4 or more"):
                log.log(step, values)
        log.log(6, {"loss": 1.0})
        with pytest.raises(InputError, match=r"step = 6, values of loss; .* must be 7 or more"):
            log.log(6, {"loss": 1.0})
    assert [row["step"] for row in read(tmp_path / METRICS_FILE)] == [6]


FULL = """
import resource, signal, sys
from pathlib import Path
from jvjepa.train.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with MetricsLog(Path(sys.argv[1]), step=0) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    for step in range(100000):
        log.log(step, {"loss": 0.5})
"""


def test_a_full_disk_is_an_error_and_the_log_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), "20000"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "OSError: [Errno 27] File too large: '" in done.stderr
    rows = [row["step"] for row in read(tmp_path / METRICS_FILE)]
    assert rows == list(range(len(rows)))
    assert len(rows) > 100
    write(tmp_path, range(len(rows), len(rows) + 3))
    again = [row["step"] for row in read(tmp_path / METRICS_FILE)]
    assert again == list(range(len(rows) + 3))


KILLED = """
import itertools, sys
from pathlib import Path
from jvjepa.train.metrics import MetricsLog
with MetricsLog(Path(sys.argv[1]), step=int(sys.argv[2])) as log:
    for step in itertools.count(int(sys.argv[2])):
        log.log(step, {"loss": 0.5})
        print(step, flush=True)
"""


def test_a_kill_loses_no_row(tmp_path: Path) -> None:
    first = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        lines = [process.stdout.readline() for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        rows = [row["step"] for row in read(tmp_path / METRICS_FILE)]
        assert rows == list(range(len(rows)))
        assert len(rows) > int(lines[-1])
        first = len(rows) - 10


# --- Progress ------------------------------------------------------------------------------------


class Clock:
    """`time.monotonic`, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with progress(Console(file=out, force_terminal=False, width=40), 4000, first=1000) as shown:
        for step in range(1001, 4001):
            clock.now += 2.0
            shown.update(step, loss=step / 8, clips_per_second=1234.5, share_of_peak=0.375)
    lines = out.getvalue().splitlines()
    assert lines[0] == ("1001/4000 · loss 125.1 · 1.23e+03 clips/s · 38% of peak · 1:39:58 left")
    assert [int(line.split("/")[0]) for line in lines] == [*range(1001, 4001, 5), 4000]
    assert lines[-1].endswith("0:00:00 left")


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress(console, 20, first=10) as shown:
        shown.update(15, loss=0.5, clips_per_second=32.0)
        shown.update(20, loss=0.25, clips_per_second=64.0, share_of_peak=0.5)
    for part in ("20/20", "loss 0.25", "64 clips/s", "50% of peak"):
        assert part in out.getvalue()


def test_no_console_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress(None, 2) as shown:
        for step in (1, 2):
            shown.update(step, 1.0, 2.0)
    assert capfd.readouterr() == ("", "")
