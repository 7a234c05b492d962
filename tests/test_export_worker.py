"""The process that exports: what it needs of the one that asks, and how both end."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from commandline import listing
from exports import saved, tiny

from jvjepa.errors import InputError
from jvjepa.export import exporting, manifest
from jvjepa.export.exporting import Source, export
from jvjepa.export.options import Options
from jvjepa.export.worker import call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("worker") / "model", tiny())


def test_results_and_what_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("it", math.gcd, 12, 18) == 6
    assert call("it", print, "seen") is None
    call("it", warnings.warn, "seen too")
    text, errors = capfd.readouterr()
    assert text == "seen\n"
    assert "UserWarning: seen too" in errors


def test_what_is_raised() -> None:
    with pytest.raises(OSError, match="No such file") as found:
        call("it", os.stat, "/none")
    assert found.value.filename == "/none"
    assert found.value.__notes__[0].startswith("Traceback")


def test_a_process_without_a_result(capfd: pytest.CaptureFixture[str]) -> None:
    for function, argument in ((os._exit, 3), (os._exit, 0)):
        message = f"it ended with exit status {argument} and without a result; what it printed"
        with pytest.raises(InputError, match=message):
            call("it", function, argument)
    assert capfd.readouterr().err == ""
    with pytest.raises(InputError, match="it ended with exit status 1 and without a result"):
        call("it", _raise_what_cannot_be_read)
    assert "test_export_worker.OddError: odd" in capfd.readouterr().err


class OddError(Exception):
    """One that can be pickled, and not be read again."""

    def __init__(self, *, message: str) -> None:
        super().__init__(message)


def _raise_what_cannot_be_read() -> None:
    raise OddError(message="odd")


def test_a_process_that_is_killed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "export_here", _die)
    message = r"exported .*model was killed \(signal 9\); for lack of memory, if nobody did it"
    with pytest.raises(InputError, match=message):
        export(Source(model=model), tmp_path / "out", Options())
    assert listing(tmp_path) == []


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_script_that_is_no_file(model: Path, tmp_path: Path) -> None:
    """And that does not ask whether it is the main one."""
    script = f"""
from pathlib import Path
from jvjepa.export.exporting import Source, export
from jvjepa.export.options import Options
export(Source(model=Path({str(model)!r})), Path({str(tmp_path / "out")!r}), Options(what=("gate",)))
print("exported")
"""
    command = [sys.executable, "-W", "error", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exported\n", "")
    assert set(manifest.read(tmp_path / "out").artefacts) == {"gate"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended(model: Path, tmp_path: Path, number: int) -> None:
    """Its process ends with it: who holds the pipes lets go of them."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_export_worker
from jvjepa import cli
from jvjepa.export import exporting
exporting.export_here = test_export_worker.wait
sys.exit(cli.main(["export", {str(model)!r}, {str(tmp_path / "out")!r}]))
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    while not list(tmp_path.glob(".out.*/begun")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        return
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert listing(tmp_path) == []


def wait(_: Source, folder: Path, __: Options) -> None:
    """An export that does not end; it writes all the time."""
    for index in range(100_000):
        with contextlib.suppress(OSError):
            (folder / f"file {index}").touch()
        (folder / "begun").touch()
        time.sleep(0.01)
