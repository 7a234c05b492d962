"""The command line as a program: help, signals, processes, full disks."""

import dataclasses
import shutil
import signal
import socket
import sys
from pathlib import Path

import jax
import pytest
from commandline import listing, refused, run, save_assets, start, the_error

import jvjepa
from jvjepa import cli


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `scene.mp4`, and `hf`, a Hugging Face checkpoint; read only."""
    return save_assets(tmp_path_factory.mktemp("cli"))


COMMANDS = [
    *("convert", "verify", "export-hf", "embed", "stream", "calibrate", "demo", "info"),
    *("export", "quantize", "mos"),
]


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run("--help")
    assert exit_code.value.code == 0
    text = capfd.readouterr().out
    assert all(f"• {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run(command, "--help")
    assert exit_code.value.code == 0
    text, errors = capfd.readouterr()
    assert text.startswith(f"usage: jvjepa {command} ")
    assert errors == ""


def test_an_error_of_the_system_names_its_file(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(assets / "model", tmp_path / "model"))
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert refused(capfd, "info", model) == f"{model / 'config.json'}: Is a directory"


@pytest.mark.parametrize(
    "error",
    [MemoryError("no 9 bytes"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 bytes.\n+")],
)
def test_too_little_memory_is_an_error_of_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert "not enough memory: " in (line := refused(capfd, "info", "none"))
    assert "no 9 bytes" in line
    assert line.endswith("take less")


def test_what_is_no_lack_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run("info", "none")


@pytest.mark.parametrize("name", ["vjepa2-vitl-fpc64-256", "none"])
def test_signals_are_handled_as_before_when_a_command_has_ended(name: str) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run("info", name)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_process_reports_one_line_and_no_traceback(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.npz"
    process = start("embed", assets / "model", tmp_path / "none.mp4", "--out", out)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert text == ""
    assert the_error(errors) == f"{tmp_path / 'none.mp4'}: there is no such file"


@pytest.mark.parametrize("command", ["convert", "export-hf", "embed", "stream"])
def test_a_full_disk(assets: Path, tmp_path: Path, command: str) -> None:
    source = assets / "hf"
    if command == "export-hf":
        source = tmp_path / "ours"
        assert run("convert", assets / "hf", source) == 0
    folder = tmp_path / "full"
    folder.mkdir()
    out = folder / "out.npz"
    arguments = {
        "convert": [source, out],
        "export-hf": [source, out],
        "embed": [assets / "model", assets / "scene.mp4", "--tokens", "--out", out],
        "stream": [assets / "model", assets / "scene.mp4", "--out", out],
    }[command]
    process = start(command, *arguments, largest_file=4)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert the_error(errors) == f"{out}: File too large"
    assert listing(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_before_anything_is_there(assets: Path, tmp_path: Path, number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and sends nothing
        server.settimeout(120)
        source = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        process = start("stream", assets / "model", source, "--out", tmp_path / "o.npz")
        connection, _ = server.accept()
        with connection:
            process.send_signal(number)
            text, errors = process.communicate(timeout=120)
    assert (process.returncode, text, errors) == (130, "", "interrupted\n")
    assert listing(tmp_path) == []


def test_matplotlib_is_not_needed_without_a_plot(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    stream = ("stream", assets / "model", assets / "scene.mp4", "--out", tmp_path / "o.npz")
    assert run(*stream) == 0


def test_the_tiny_checkpoint_is_what_the_tests_think(assets: Path) -> None:
    config = jvjepa.load(assets / "model").config
    assert dataclasses.replace(config.encoder, frames_per_clip=4) == config.encoder
    assert (config.encoder.hidden_size, config.encoder.num_layers, config.crop_size) == (48, 2, 64)
