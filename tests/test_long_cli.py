"""`jvjepa embed --max-tokens`: what it writes, prints and refuses."""

import logging
import tracemalloc
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import pytest
from commandline import (
    cut_short,
    listing,
    load_npz,
    refused,
    run,
    save_tiny,
    small_files,
    tiny_model,
    write_scene,
)
from models import relative_error
from numpy.typing import NDArray
from videofiles import moving_frames, write_video

from jvjepa import long
from jvjepa.long import Part, embed_clips, embed_stream
from jvjepa.recording import save_npz

TOLERANCE = 1e-6

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `scene.mp4`, read only."""
    folder = tmp_path_factory.mktemp("long")
    save_tiny(folder / "model")
    write_scene(folder / "scene.mp4")
    return folder


def embed(assets: Path, out: Path, *options: str | int) -> int:
    return run("embed", assets / "model", assets / "scene.mp4", "--out", out, *map(str, options))


def test_the_command_writes_clips(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.npz"
    assert embed(assets, out, "--max-tokens", 100) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    lines = text.splitlines()
    assert lines[0] == (
        "clips (the default: exact, each on its own): 6 tubelets of 16 tokens fit in 100, so a "
        "clip has 12 frames"
    )
    assert lines[1].startswith(
        "6 clips of 12 frames, the last of 10: 70 frames from 0.00 to 3.45 s, 560 tokens, "
    )
    assert lines[1].endswith(f"wrote {out}")
    assert len(lines) == 2
    assert listing(tmp_path) == ["o.npz"]

    parts = list(embed_clips(tiny_model(), assets / "scene.mp4", max_tokens=100))
    found = load_npz(out)
    assert list(found) == ["embedding", "embeddings", "times", "num_tokens"]
    assert_holds(found, parts)
    assert found["num_tokens"].tolist() == [96] * 5 + [80]
    assert not np.allclose(found["embedding"], found["embeddings"].mean(0), rtol=1e-6, atol=0)


def assert_holds(found: dict[str, NDArray[np.generic]], parts: Sequence[Part]) -> None:
    tokens = np.concatenate([part.tokens for part in parts])
    expected = {
        "embeddings": np.stack([part.embedding for part in parts]),
        "times": np.stack([part.times[[0, -1]] for part in parts]),
        "num_tokens": np.array([len(part.tokens) for part in parts]),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert found["embedding"].dtype == np.float32
    assert relative_error(found["embedding"], tokens.astype(np.float64).mean(0)) <= TOLERANCE


def test_the_command_writes_tokens_and_overlaps(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.npz"
    options = ("--max-tokens", 96, "--long", "clips", "--overlap", 2, "--tokens", "--end", 2)
    assert embed(assets, out, *options) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == (
        "clips: 6 tubelets of 16 tokens fit in 96, so a clip has 12 frames, 2 of them shared with "
        "the clip before"
    )
    assert lines[1].startswith(
        "4 clips of 12 frames, the last of 10: 40 frames from 0.00 to 1.95 s"
    )
    how = {"max_tokens": 96, "overlap": 2, "end": 2.0}
    parts = list(embed_clips(tiny_model(), assets / "scene.mp4", **how))
    found = load_npz(out)
    assert_holds(found, parts)
    tokens = np.concatenate([part.tokens for part in parts])
    np.testing.assert_array_equal(found["tokens"], tokens, strict=True)
    split = np.split(found["tokens"], np.cumsum(found["num_tokens"])[:-1])
    np.testing.assert_array_equal(split[2], parts[2].tokens)


def test_the_command_streams(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.npz"
    options = ("--max-tokens", 50, "--long", "stream", "--frame-step", 4, "--tokens")
    assert embed(assets, out, *options) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    lines = text.splitlines()
    assert lines[0] == (
        "stream: 3 tubelets of 16 tokens fit in 50, so a tubelet sees itself and the 2 before it"
    )
    assert lines[1].startswith("9 tubelets of 2 frames: 18 frames from 0.00 to 3.40 s, 144 tokens,")
    scene = assets / "scene.mp4"
    parts = list(embed_stream(tiny_model(), scene, max_tokens=50, frame_step=4))
    found = load_npz(out)
    assert_holds(found, parts)
    np.testing.assert_array_equal(found["tokens"], np.concatenate([p.tokens for p in parts]))


def test_one_clip_is_what_embed_gives_without_the_option(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, plain = tmp_path / "one.npz", tmp_path / "plain.npz"
    assert embed(assets, one, "--max-tokens", 10**9, "--tokens", "--end", 0.6) == 0
    assert (
        "\n1 clip of 12 frames: 12 frames from 0.00 to 0.55 s, 96 tokens" in capfd.readouterr().out
    )
    assert embed(assets, plain, "--num-frames", 12, "--tokens", "--end", 0.6) == 0
    long, short = load_npz(one), load_npz(plain)
    assert relative_error(long["tokens"], short["tokens"]) <= TOLERANCE
    assert relative_error(long["embedding"], short["embedding"]) <= TOLERANCE
    np.testing.assert_array_equal(long["times"], short["times"][None, [0, -1]])


def test_the_command_in_bfloat16(assets: Path, tmp_path: Path) -> None:
    exact, half = tmp_path / "exact.npz", tmp_path / "half.npz"
    for mode, limit in (("clips", 96), ("stream", 48)):
        options = ("--max-tokens", limit, "--long", mode, "--end", 0.6, "--tokens", "--force")
        assert embed(assets, exact, *options) == 0
        assert embed(assets, half, *options, "--dtype", "bfloat16") == 0
        ours, rounded = load_npz(exact), load_npz(half)
        assert rounded["embeddings"].dtype == rounded["tokens"].dtype == np.float32
        assert 0 < relative_error(rounded["embeddings"], ours["embeddings"]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overlap", "2"], "--overlap is for --max-tokens; give that too"),
        (["--frame-step", "2"], "--frame-step is for --max-tokens; give that too"),
        (["--long", "stream"], "--long is for --max-tokens; give that too"),
        (["--max-tokens", "99", "--num-frames", "4"], "--num-frames is for one clip; "),
        (["--max-tokens", "99", "--repeat-frame"], "--repeat-frame is for pictures"),
        (
            ["--max-tokens", "99", "--long", "stream", "--overlap", "0"],
            "--overlap is for --long clips",
        ),
        (["--max-tokens", "15"], "max_tokens = 15; it must be at least 16"),
        (["--max-tokens", "99", "--overlap", "12"], "overlap = 12; clips have 12 frames"),
        (["--max-tokens", "99", "--start", "100"], "start = 100.0 is past the end"),
        (["--max-tokens", "99", "--end", "0.04"], "has no whole tubelet of 2 frames"),
    ],
)
def test_the_command_refuses(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    where = (assets / "model", assets / "scene.mp4", "--out", tmp_path / "o.npz")
    assert message in refused(capfd, "embed", *where, *options)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("mode", "limit"), [("clips", 96), ("stream", 48)])
def test_a_damaged_video_writes_nothing(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: str, limit: int
) -> None:
    damaged = cut_short(assets / "scene.mp4", tmp_path / "cut.mp4", 0.7)
    out = tmp_path / "o.npz"
    options = ("--max-tokens", str(limit), "--long", mode, "--tokens", "--force")
    out.write_bytes(b"precious")
    message = refused(capfd, "embed", assets / "model", damaged, "--out", out, *options)
    assert message.startswith(f"{damaged}: ")
    assert "cut off" in message
    assert out.read_bytes() == b"precious"
    assert listing(tmp_path) == ["cut.mp4", "o.npz"]


# All tokens are 107,520 bytes, and the whole file a few thousand more.
@pytest.mark.parametrize("size", [40_000, 108_000])
def test_a_full_disk_leaves_nothing(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    out = tmp_path / "o.npz"
    with small_files(size):
        assert embed(assets, out, "--max-tokens", 96, "--tokens") == 2
    assert capfd.readouterr().err == f"error: {out}: File too large\n"
    assert listing(tmp_path) == []


def test_an_interruption_leaves_nothing(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> Generator[tuple[np.ndarray, float], None, None]:
        yield from ((np.zeros((64, 64, 3), np.uint8), float(i)) for i in range(30))
        raise KeyboardInterrupt

    monkeypatch.setattr(long.video, "stream", interrupted)
    assert embed(assets, tmp_path / "o.npz", "--max-tokens", 96) == 130
    assert capfd.readouterr().err == "interrupted\n"
    assert listing(tmp_path) == []


def test_the_frames_that_are_left_out_are_named(
    assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert embed(assets, tmp_path / "o.npz", "--max-tokens", 96, "--frame-step", 2) == 0
    assert caplog.messages == ["1 frames at the end do not fill a tubelet of 2"]
    assert load_npz(tmp_path / "o.npz")["num_tokens"].tolist() == [96, 96, 80]


# Memory


def traced_peak(work: Callable[[], object]) -> int:
    """Bytes of Python's and NumPy's memory."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", ["clips", "stream"])
def test_memory_does_not_grow_with_the_video(assets: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "o.npz"
    options = ("--out", out, "--force", "--long", mode, "--max-tokens")
    limit = {"clips": 96, "stream": 48}[mode]

    def peak(count: int) -> int:
        path = write_video(tmp_path / f"{count}.mp4", moving_frames(count, 48, 48))
        return traced_peak(lambda: run("embed", assets / "model", path, *options, str(limit)))

    peak(24)  # compiles, and loads what is loaded once
    short, long = peak(48), peak(360)
    assert load_npz(out)["num_tokens"].sum() == 180 * 16
    pixels = 312 * 64 * 64 * 3 * 4  # of the frames that are more
    assert long - short < pixels / 50


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    out, pieces, size = tmp_path / "o.npz", 40, 2**20

    def write() -> None:
        with long._Rows(out) as rows:
            for i in range(pieces):
                rows.append("tokens", np.full((1024, size // 4096), i, np.float32))
            save_npz(out, rows.arrays())

    # 16 MiB is what NumPy copies at a time.
    assert traced_peak(write) < 20 * size < pieces * size
    tokens = load_npz(out)["tokens"]
    expected = np.arange(pieces, dtype=np.float32).repeat(1024)
    np.testing.assert_array_equal(tokens, np.broadcast_to(expected[:, None], tokens.shape))
    assert tokens.nbytes == pieces * size
