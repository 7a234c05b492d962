"""The main job from end to end, on a small random checkpoint and a made video, without network."""

import shutil
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from jvjepa import cli, commands
from jvjepa.calibration import cosine
from jvjepa.conversion_command import convert_command
from jvjepa.errors import InputError

_RATE, _HEIGHT, _WIDTH = 30, 240, 320  # frames per second, pixels


def demo(folder: Path, console: Console) -> int:
    """Makes a checkpoint and a clip, converts, verifies, and streams gated and ungated.

    Args:
        folder: where to work; what an earlier demo left there is removed.
        console: where to print.

    Returns:
        0, or 1 if the converted weights differ from the original.

    Raises:
        InputError: the folder holds something else, or a package is missing.
    """
    from jvjepa.convert.random_checkpoint import save_random_checkpoint

    mark = folder / ".jvjepa-demo"
    if folder.exists():
        if not mark.exists():
            raise InputError(f"{folder} is not from an earlier demo; choose another with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.touch()
    source, model, clip = folder / "huggingface", folder / "model", folder / "clip.mp4"

    console.rule("a random checkpoint in Hugging Face's format, and a clip of 20 s")
    save_random_checkpoint(source)
    save_clip(clip)
    console.print(f"made {source} and {clip}")

    console.rule("jvjepa convert")
    convert_command(cli.Convert(source=str(source), out=model), console)
    console.rule("jvjepa verify")
    if commands.verify(cli.Verify(model=model, source=str(source)), console):
        return 1

    console.rule(f"jvjepa stream --settle {cli.Stream.window - 1}")
    gated, ungated, picture = (folder / n for n in ("gated.npz", "ungated.npz", "timeline.png"))
    stream = {"model": model, "video": str(clip), "settle": cli.Stream.window - 1}
    seconds = _stream(cli.Stream(**stream, out=gated, plot=picture), console)
    console.rule("jvjepa stream --tau 0 (everything encoded)")
    all_seconds = _stream(cli.Stream(**stream, out=ungated, tau=0.0), console)
    _compare(gated, ungated, console)
    console.print(f"speed-up of all steps together: {all_seconds / seconds:.2f} x")
    console.print(
        f"timeline: {picture}\n\nWith a real checkpoint and a video of yours:\n"
        "  jvjepa convert vjepa2-vitl-fpc64-256 models/vitl\n"
        "  jvjepa stream models/vitl VIDEO --out embeddings.npz --plot timeline.png"
    )
    return 0


def save_clip(path: Path, *, seed: int = 0) -> None:
    """Writes 20 s of H.264: a still room, something that comes and goes, a slow pan, a cut.

    Seconds 0-4 still, 4-9 a box enters, waits and leaves, 9-12 still, 12-17 a slow pan, 17-20
    another room. There is sensor noise all the time.

    Args:
        path: the .mp4 file.
        seed: of rooms and noise.
    """
    rng = np.random.default_rng(seed)
    rooms = [_room(rng), _room(rng)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for i in range(20 * _RATE):
            picture = _scene(i / _RATE, rooms)
            noise = rng.normal(scale=2.0, size=picture.shape)
            frame = np.clip(picture + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _stream(options: cli.Stream, console: Console) -> float:
    seconds = commands.stream_video(options, console)
    if seconds is None:
        raise KeyboardInterrupt  # what was saved is only a part; there is nothing to compare
    return seconds


def _scene(seconds: float, rooms: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    room = rooms[0] if seconds < 17 else rooms[1]
    pan = int(_WIDTH / 2 * np.clip((seconds - 12) / 5, 0, 1)) if seconds < 17 else 0
    picture = room[:, pan : pan + _WIDTH].copy()
    if 4 <= seconds < 9:
        way = np.interp(seconds, [4, 5.5, 7.5, 9], [-0.25, 0.4, 0.4, 1.0])
        left, right = (int(np.clip(x, 0, _WIDTH)) for x in (_WIDTH * way, _WIDTH * (way + 0.25)))
        picture[80:220, left:right] = (200, 60, 50)
    return picture


def _room(rng: np.random.Generator) -> NDArray[np.float64]:
    """A wall and a floor with furniture, [_HEIGHT, 2 * _WIDTH, 3]."""
    room = np.empty((_HEIGHT, 2 * _WIDTH, 3))
    room[:160], room[160:] = rng.uniform(90, 200, 3), rng.uniform(40, 120, 3)
    room *= np.linspace(0.8, 1.1, 2 * _WIDTH)[None, :, None]
    for _ in range(14):
        x, y = rng.integers(0, 2 * _WIDTH), rng.integers(20, 200)
        w, h = rng.integers(15, 90), rng.integers(15, 90)
        room[y : y + h, x : x + w] = rng.uniform(10, 240, 3)
    return room


def _compare(gated: Path, ungated: Path, console: Console) -> None:
    with np.load(gated) as g, np.load(ungated) as u:
        cosines = cosine(g["embeddings"], u["embeddings"])
        times, is_new = g["times"], g["is_new"]
    console.rule("what the gate did")
    parts = ((0, 4, "still room"), (4, 9, "something moves"), (9, 12, "still again"))
    parts += ((12, 17, "slow pan"), (17, 20, "cut to another room"))
    for begin, end, what in parts:
        here = (times >= begin) & (times < end)
        console.print(
            f"{begin:2d}-{end:2d} s {what:20s} encoded {is_new[here].sum():3d} of {here.sum():3d}, "
            f"worst cosine to the ungated stream {cosines[here].min():.4f}"
        )
