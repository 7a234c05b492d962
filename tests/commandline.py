"""What tests of the command line need: a tiny checkpoint, a clip of a scene, and runs of it."""

import contextlib
import dataclasses
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hfcheckpoints
import jax
import numpy as np
import pytest
from models import random_params, tiny_config
from numpy.typing import NDArray
from videofiles import moving_frames, write_video

import jvjepa
from jvjepa import cli

FPS = 20
STILL, MOVING, CUT = 30, 20, 20  # frames of the three parts of the scene
FRAMES = STILL + MOVING + CUT
FRAMES_PER_CLIP = 4  # that the tiny checkpoint says it was trained with


def tiny_model() -> jvjepa.Model:
    """Width 48, 2 layers, 64 pixels; in memory only."""
    config = dataclasses.replace(tiny_config(num_layers=2), frames_per_clip=FRAMES_PER_CLIP)
    encoder = jvjepa.Encoder(config)
    return jvjepa.Model(
        config=jvjepa.ModelConfig(encoder=config, predictor=None, classifier=None),
        encoder=encoder,
        predictor=None,
        classifier=None,
        params={"encoder": random_params(encoder)},
        source=None,
    )


def save_tiny(folder: Path) -> Path:
    """Writes `tiny_model()` as a converted checkpoint."""
    jvjepa.save(folder, tiny_model())
    return folder


def write_scene(path: Path) -> Path:
    """70 frames of H.264 at 20 a second: a still part, a moving part, and after a cut a still one.

    The index stands at the beginning, so that a file that is cut short begins as the whole one.
    """
    still = np.repeat(moving_frames(1, 48, 64), STILL, axis=0)
    moving = moving_frames(MOVING, 48, 64)
    other = np.repeat(moving_frames(1, 48, 64, seed=1), CUT, axis=0)
    frames = np.concatenate([still, moving, other])
    return write_video(path, frames, FPS, container_options={"movflags": "faststart"})


def save_assets(folder: Path) -> Path:
    """Fills a folder with `model`, `scene.mp4`, and `hf`, a Hugging Face checkpoint."""
    save_tiny(folder / "model")
    write_scene(folder / "scene.mp4")
    hfcheckpoints.save_checkpoint(folder / "hf", hfcheckpoints.tiny_config(head_width=24))
    return folder


def cut_short(source: Path, target: Path, share: float) -> Path:
    """Copies the beginning of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(share * len(data))])
    return target


def run(*arguments: str | Path) -> int:
    """Runs the command line in this process; returns its exit code."""
    return cli.main([str(argument) for argument in arguments])


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail cleanly; returns the one line that it prints to stderr."""
    capfd.readouterr()
    assert run(*arguments) == 2
    return the_error(capfd.readouterr().err)


def the_error(stderr: str) -> str:
    """The message of a command that failed cleanly."""
    assert stderr.startswith("error: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("error: ").rstrip("\n")


def listing(folder: Path) -> list[str]:
    """Every name in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def start(*arguments: str | Path, largest_file: int | None = None) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own.

    Args:
        arguments: of the command line.
        largest_file: KiB; writing a larger one fails, as on a full disk.
    """
    command = [sys.executable, "-m", "jvjepa.cli", *map(str, arguments)]
    if largest_file is not None:
        command = ["bash", "-c", f'ulimit -f {largest_file} && exec "$@"', "-", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """A larger file cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def load_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    """All arrays of an .npz."""
    with np.load(path) as arrays:
        return dict(arrays)


def encode(model: jvjepa.Model, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 [N, D], the tokens of a clip."""
    pixels = jvjepa.video.preprocess(frames, model.config)[None]
    return np.asarray(
        jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, pixels)[0], np.float32
    )
