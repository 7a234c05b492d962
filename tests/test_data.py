import itertools
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import cut_short
from numpy.typing import NDArray
from videofiles import moving_frames, write_video

from jvjepa import preprocessing
from jvjepa.errors import ConfigError, InputError, VideoError
from jvjepa.train.augment import Window, cut, random_window, view
from jvjepa.train.data import (
    Batch,
    ClipConfig,
    batches,
    evaluation_batches,
    normalise,
    read_clip,
)
from jvjepa.train.manifest import DataError, Manifest, read_manifest

VIDEOS = 10
SMALL = ClipConfig(num_frames=3, fps=5, crop_size=16)
FIXED = ClipConfig(num_frames=3, fps=5, crop_size=16, temporal="uniform", spatial="centre")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of two seconds; the label of number i is 3 i."""
    folder = tmp_path_factory.mktemp("set")
    for i in range(VIDEOS):
        options = {"container_options": {"movflags": "faststart"}}
        write_video(folder / f"{i}.mp4", moving_frames(20, 40, 56, seed=i), 10, **options)
    return folder


def listed(folder: Path, names: Iterable[str]) -> Manifest:
    path = folder / "list.csv"
    path.write_text("".join(f"{name} {3 * i}\n" for i, name in enumerate(names)))
    return read_manifest(path)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return listed(folder, [f"{i}.mp4" for i in range(VIDEOS)])


def take(manifest: Manifest, count: int, **options: int) -> list[Batch]:
    arguments = {"batch_size": 4, "seed": 5} | options
    with batches(manifest, SMALL, **arguments) as loader:
        return list(itertools.islice(loader, count))


def assert_same(some: Iterable[Batch], others: Iterable[Batch]) -> None:
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


# Order


def test_a_batch(manifest: Manifest) -> None:
    [batch] = take(manifest, 1)

    assert (batch.video.shape, batch.video.dtype) == ((4, 3, 16, 16, 3), np.uint8)
    assert batch.labels.dtype == batch.ids.dtype == np.int32
    np.testing.assert_array_equal(batch.labels, 3 * batch.ids)
    for video, row in zip(batch.video, batch.ids.tolist(), strict=True):
        np.testing.assert_array_equal(video, read_clip(manifest, SMALL, row, seed=5))


def test_every_epoch_is_shuffled_anew_and_drops_what_is_left(manifest: Manifest) -> None:
    with batches(manifest, SMALL, batch_size=4, seed=5) as loader:
        assert loader.steps_per_epoch == 2
        steps = list(itertools.islice(loader, 40))
        assert loader.step == 40

    epochs = [
        [*a.ids.tolist(), *b.ids.tolist()] for a, b in zip(steps[::2], steps[1::2], strict=True)
    ]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    left_out = Counter(row for epoch in epochs for row in set(range(VIDEOS)) - set(epoch))
    assert len(left_out) > 5  # not always the same
    seen = [v for batch in steps for v, row in zip(batch.video, batch.ids, strict=True) if row == 0]
    assert len({video.tobytes() for video in seen}) == len(seen)  # cut anew


def test_the_seed_decides(manifest: Manifest) -> None:
    assert_same(take(manifest, 3), take(manifest, 3))
    one, other = take(manifest, 1, seed=6)[0], take(manifest, 1)[0]
    assert one.ids.tolist() != other.ids.tolist()
    assert (read_clip(manifest, SMALL, 0) != read_clip(manifest, SMALL, 0, seed=1)).any()
    assert (read_clip(manifest, SMALL, 0) != read_clip(manifest, SMALL, 0, epoch=1)).any()


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_goes_on_where_it_was(manifest: Manifest, step: int) -> None:
    assert_same(take(manifest, 3, step=step), take(manifest, step + 3)[step:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batch_of_one(manifest: Manifest, hosts: int) -> None:
    whole = take(manifest, 4)
    parts = [take(manifest, 4, process_index=i, process_count=hosts) for i in range(hosts)]

    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert all(len(share.ids) == 4 // hosts for share in shares)
        together = Batch(*(np.concatenate(column) for column in zip(*shares, strict=True)))
        order = [together.ids.tolist().index(row) for row in batch.ids]
        assert_same([batch], [Batch(*(part[order] for part in together))])


def test_workers_change_nothing(manifest: Manifest) -> None:
    assert_same(take(manifest, 5, step=1, workers=2), take(manifest, 6)[1:])


# Place in time


def numbered(path: Path, count: int, fps: float) -> str:
    """Frame i is as bright as 6 i."""
    frames = np.repeat(np.arange(count, dtype=np.uint8) * 6, 32 * 32 * 3)
    return str(write_video(path, frames.reshape(count, 32, 32, 3), fps, crf=1))


def numbers(pixels: NDArray[np.uint8]) -> list[int]:
    return np.rint(pixels.mean(axis=(1, 2, 3)) / 6).astype(int).tolist()


def single(path: str, start: float = 0.0, end: float = np.inf) -> Manifest:
    columns = {"starts": np.array([start]), "ends": np.array([end])}
    return Manifest(source="one", paths=(path,), labels=np.array([-1], np.int32), **columns)


def test_uniform_clips_lie_in_the_middle_of_equal_parts(tmp_path: Path) -> None:
    whole = single(numbered(tmp_path / "n.mp4", 40, 20))  # 2 seconds

    def frames(count: int, fps: float, clips: int, rows: Manifest = whole) -> list[list[int]]:
        config = ClipConfig(num_frames=count, fps=fps, clips=clips, crop_size=8, temporal="uniform")
        return [numbers(read_clip(rows, config, 0, clip)) for clip in range(clips)]

    assert frames(4, 20, 1) == [[18, 19, 20, 21]]
    assert frames(4, 10, 2) == [[6, 8, 10, 12], [26, 28, 30, 32]]
    # Clips of one second that overlap: the first begins with the video, the last ends with it.
    assert frames(5, 5, 3) == [[0, 4, 8, 12, 16], [10, 14, 18, 22, 26], [20, 24, 28, 32, 36]]
    part = single(whole.paths[0], 0.5, 1.5)
    assert frames(2, 10, 1, part) == [[18, 20]]
    assert frames(5, 5, 1, part) == [[10, 14, 18, 22, 26]]


def test_short_videos_repeat_their_last_frame(tmp_path: Path) -> None:
    whole = single(numbered(tmp_path / "n.mp4", 20, 10))
    for temporal in ("uniform", "random"):
        config = ClipConfig(num_frames=6, fps=2, crop_size=8, temporal=temporal, clips=2)
        for clip in range(2):
            assert numbers(read_clip(whole, config, 0, clip)) == [0, 5, 10, 15, 15, 15]
    part = single(whole.paths[0], 0.5, 1.2)
    assert numbers(read_clip(part, config, 0)) == [5, 10, 10, 10, 10, 10]


def test_random_clips_lie_anywhere_in_their_part(tmp_path: Path) -> None:
    whole = single(numbered(tmp_path / "n.mp4", 40, 20))
    config = ClipConfig(num_frames=4, fps=10, clips=2, crop_size=8)

    for clip, lowest in ((0, 0), (1, 20)):
        found = [numbers(read_clip(whole, config, 0, clip, epoch=i)) for i in range(60)]
        begins = [frames[0] for frames in found]
        assert all(frames == list(range(frames[0], frames[0] + 8, 2)) for frames in found)
        assert min(begins) >= lowest
        assert max(begins) <= lowest + 12  # the part is 20 frames, a clip 8
        assert len(set(begins)) > 8


def test_a_start_past_the_end(tmp_path: Path) -> None:
    path = numbered(tmp_path / "n.mp4", 20, 10)
    for start in (2.0, 1.999, 7.0):
        with pytest.raises(VideoError, match=r"n\.mp4: start = .*, but it lasts 2\.000 s"):
            read_clip(single(path, start), SMALL, 0)
    assert numbers(read_clip(single(path, 1.99), SMALL, 0)) == [19, 19, 19]


def test_live_sources_are_no_training_data() -> None:
    with pytest.raises(VideoError, match="is live and has no end; training needs files"):
        read_clip(single("rtsp://host/1"), SMALL, 0)


# Place in the frame


def resized(image: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """A triangle filter over each axis, as wide as a pixel of the result, in float64."""
    out = image.astype(np.float64)
    for axis in (0, 1):
        count = image.shape[axis]
        scale = count / size
        at = (np.arange(size)[:, None] + 0.5) * scale
        weight = np.clip(1 - abs(np.arange(count) + 0.5 - at) / max(scale, 1), 0, None)
        weight /= weight.sum(axis=1, keepdims=True)
        out = np.moveaxis(np.tensordot(weight, out, (1, axis)), 0, axis)
    return out


@pytest.mark.parametrize("window", [(0, 0, 37, 53), (3, 10, 30, 21), (12, 1, 7, 9), (36, 52, 1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_cut_against_numpy(window: tuple[int, int, int, int], flip: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), np.uint8)
    top, left, height, width = window

    found = cut(frames, Window(*window), 16, flip=flip)

    for frame, square in zip(frames, found, strict=True):
        expected = resized(frame[top : top + height, left : left + width], 16)
        expected = expected[:, ::-1] if flip else expected
        assert np.abs(square - expected).max() <= 1.01  # rounded to uint8 after each axis
        assert np.abs(square - expected).mean() < 0.5


@pytest.mark.parametrize("shape", [(37, 53), (64, 48), (32, 32), (20, 90)])
def test_the_views_are_those_of_preprocess(shape: tuple[int, int]) -> None:
    class Config:
        crop_size = 28

    frames = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), np.uint8)

    found = normalise(jnp.asarray(view(frames, 28, 0, 1)))

    np.testing.assert_allclose(found, preprocessing.preprocess(frames, Config()), atol=1e-6)
    views = preprocessing.crops(frames, Config(), 3)
    for i in range(3):
        found = normalise(jnp.asarray(view(frames, 28, i, 3)))
        np.testing.assert_allclose(found, views[min(i, len(views) - 1)], atol=1e-6)


def test_random_windows_are_drawn_as_metas() -> None:
    """Against a sampler that draws many at once and keeps those that fit."""
    height, width, scale, aspect = 120, 160, (0.3, 1.0), (0.75, 1.35)
    generator = np.random.default_rng(0)
    found = np.array(
        [random_window(generator, height, width, scale, aspect) for _ in range(20_000)]
    )
    area = np.random.default_rng(1).uniform(*scale, 60_000) * height * width
    ratio = np.exp(np.random.default_rng(2).uniform(*np.log(aspect), 60_000))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w <= width) & (h <= height)
    top = np.random.default_rng(3).random(60_000) * (height - h + 1) // 1
    left = np.random.default_rng(4).random(60_000) * (width - w + 1) // 1
    expected = np.stack([top, left, h, w], axis=1)[fits]

    assert (found >= 0).all()
    assert (found[:, 0] + found[:, 2]).max() == height
    assert (found[:, 1] + found[:, 3]).max() == width
    for column in range(4):
        levels = np.linspace(0, 160, 33)
        share = [(x[:, column, None] <= levels).mean(axis=0) for x in (found, expected)]
        assert np.abs(share[0] - share[1]).max() < 0.02


@pytest.mark.parametrize(
    ("shape", "window"), [((30, 300), (0, 130, 30, 40)), ((300, 30), (130, 0, 40, 30))]
)
def test_a_window_that_never_fits(shape: tuple[int, int], window: tuple[int, ...]) -> None:
    found = random_window(np.random.default_rng(0), *shape, (0.9, 1.0), (0.75, 4 / 3))

    assert found == window


def test_a_clip_is_cut_as_its_frames_are(tmp_path: Path) -> None:
    """With the whole frame as the only window there is nothing to draw but the flip."""
    still = moving_frames(1, 48, 64).repeat(10, axis=0)
    path = str(write_video(tmp_path / "s.mp4", still, 10, crf=1))
    whole = {"scale": (1.0, 1.0), "aspect": (4 / 3, 4 / 3)}
    expected = resized(still[0], 16)

    for flip in (0.0, 1.0):
        config = ClipConfig(num_frames=3, fps=5, crop_size=16, flip=flip, **whole)
        clip = read_clip(single(path), config, 0)
        mirrored = expected[:, ::-1] if flip else expected
        assert np.abs(clip - mirrored).mean() < 4  # H.264 and its halved colour
        assert np.abs(clip - mirrored[:, ::-1]).mean() > 20

    # Frames of a still video differ by what the codec adds, so take the same ones.
    config = ClipConfig(num_frames=3, fps=5, crop_size=16, temporal="uniform", **whole)
    found = [read_clip(single(path), config, 0, epoch=i).tobytes() for i in range(60)]
    counts = Counter(found).values()
    assert len(counts) == 2
    assert min(counts) > 15
    random = read_clip(single(path), ClipConfig(num_frames=3, fps=5, crop_size=16), 0)
    assert (np.abs(random.astype(int) - random[0]) <= 8).all()  # one window for all frames


# Bad files


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Manifest:
    """Number 3 is damaged and number 7 missing."""
    names = [str(folder / f"{i}.mp4") for i in range(VIDEOS)]
    names[3] = str(cut_short(folder / "3.mp4", tmp_path / "damaged.mp4", 0.6))
    names[7] = "gone.mp4"
    return listed(tmp_path, names)


def test_bad_files_are_replaced_named_and_counted(
    damaged: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    with batches(damaged, SMALL, batch_size=5, seed=5, max_bad=0.2) as loader:
        steps = list(itertools.islice(loader, 8))  # four epochs
        bad = loader.bad

    assert {Path(path).name for path in bad} == {"damaged.mp4", "gone.mp4"}
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(logged) == 2
    assert sum("damaged.mp4: is cut off" in line for line in logged) == 1
    assert sum("gone.mp4: there is no such file" in line for line in logged) == 1
    for batch in steps:
        assert not {3, 7} & set(batch.ids.tolist())
        np.testing.assert_array_equal(batch.labels, 3 * batch.ids)
        assert all(video.std() > 5 for video in batch.video)  # of pictures, and not of nothing
    for one, other in zip(steps[::2], steps[1::2], strict=True):  # each good one, and two again
        assert set(one.ids.tolist()) | set(other.ids.tolist()) == set(range(VIDEOS)) - {3, 7}


def test_replacements_follow_from_the_seed_too(damaged: Manifest) -> None:
    whole = take(damaged, 4, batch_size=10, max_bad=0.2)
    assert_same(take(damaged, 2, batch_size=10, max_bad=0.2, step=2), whole[2:])
    halves = [
        take(damaged, 4, batch_size=10, max_bad=0.4, process_index=i, process_count=2)
        for i in range(2)
    ]
    for batch, one, other in zip(whole, *halves, strict=True):
        assert sorted(batch.ids) == sorted([*one.ids, *other.ids])


def test_too_many_bad_files_stop_the_run(damaged: Manifest) -> None:
    with (
        batches(damaged, SMALL, batch_size=10, max_bad=0.1) as loader,
        pytest.raises(DataError, match="2 clips cannot be read, and max_bad allows 1 of") as error,
    ):
        next(loader)
    assert "damaged.mp4: is cut off" in str(error.value)
    assert "gone.mp4: there is no such file" in str(error.value)
    # Counted anew in every epoch: else a long run would end of the same two files.
    with batches(damaged, SMALL, batch_size=10, max_bad=0.2) as loader:
        assert len(list(itertools.islice(loader, 5))) == 5


def test_a_worker_stops_the_run(damaged: Manifest) -> None:
    with (
        batches(damaged, SMALL, batch_size=10, workers=1) as loader,
        pytest.raises(DataError, match=r"list\.csv: 1 clips cannot be read, and max_bad allows 0"),
    ):
        next(loader)


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    manifest = listed(tmp_path, [f"{i}.mp4" for i in range(8)])
    with (
        batches(manifest, SMALL, batch_size=2, max_bad=1.0) as loader,
        pytest.raises(DataError, match=r"8 clips .*: .*no such file; .*; and 3 more"),
    ):
        next(loader)


# Evaluation


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_clip_once(manifest: Manifest, hosts: int) -> None:
    config = ClipConfig(
        num_frames=2, fps=5, crop_size=16, clips=2, temporal="uniform", spatial="centre"
    )
    ids = []
    for host in range(hosts):
        share = {"process_index": host, "process_count": hosts}
        with evaluation_batches(manifest, config, batch_size=6, **share) as loader:
            found = list(loader)
        assert [len(batch.ids) for batch in found] == [6 // hosts] * 4
        assert loader.steps_per_epoch == 4
        ids += [row for batch in found for row in batch.ids.tolist()]
    assert Counter(ids) == {-1: 4} | dict.fromkeys(range(VIDEOS), 2)
    if hosts == 1:
        assert ids == [i // 2 for i in range(20)] + [-1] * 4
        assert found[0].labels.tolist() == [0, 0, 3, 3, 6, 6]
        np.testing.assert_array_equal(found[0].video[3], read_clip(manifest, config, 1, 1))
        np.testing.assert_array_equal(found[3].video[5], read_clip(manifest, config, 9, 1))


def test_evaluation_does_not_count_replacements(damaged: Manifest) -> None:
    with evaluation_batches(damaged, FIXED, batch_size=4, max_bad=0.2) as loader:
        ids = [row for batch in loader for row in batch.ids.tolist()]
    assert ids == [0, 1, 2, -1, 4, 5, 6, -1, 8, 9, -1, -1]


# The device's part


def test_normalise_is_that_of_preprocess() -> None:
    """Of a square of the right size, preprocessing of 224 of 256 pixels cuts the middle out."""

    class Config:
        crop_size = 224

    frames = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    expected = preprocessing.preprocess(frames, Config())
    middle = jnp.asarray(frames[None, :, 16:240, 16:240])

    found = jax.jit(normalise)(middle)
    half = jax.jit(normalise, static_argnames="dtype")(middle, dtype=jnp.bfloat16)

    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))


def test_normalise_refuses() -> None:
    with pytest.raises(InputError, match=r"video is float32 \[2, 8, 8, 3\]; right is uint8"):
        normalise(jnp.zeros((2, 8, 8, 3)))
    with pytest.raises(InputError, match=r"uint8 \[2, 3, 8, 8\]"):
        normalise(jnp.zeros((2, 3, 8, 8), jnp.uint8))


# Bad requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0; it must be a multiple"),
        ({"batch_size": 11}, r"batch_size = 11; .*list\.csv gives 10 clips"),
        ({"batch_size": 3, "process_count": 2}, "multiple of process_count = 2"),
        ({"process_index": 2, "process_count": 2}, "process_index = 2 of process_count = 2"),
        ({"process_count": 0}, "process_count = 0"),
        ({"seed": -1}, "seed = -1; it must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"step": -1}, "step = -1; it must be 0 or more"),
        ({"workers": -1}, "workers = -1"),
        ({"max_bad": 1.5}, r"max_bad = 1\.5; it must be a share, 0 to 1"),
        ({"max_bad": float("nan")}, "max_bad = nan"),
    ],
)
def test_impossible_requests(manifest: Manifest, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(manifest, SMALL, **{"batch_size": 4} | options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_frames", 0),
        ("fps", 0.0),
        ("fps", float("inf")),
        ("crop_size", 0),
        ("clips", 0),
        ("temporal", "all"),
        ("spatial", "center"),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.1)),
        ("scale", (0.5, 0.4)),
        ("aspect", (0.0, 1.0)),
        ("aspect", (2.0, 1.0)),
        ("flip", 1.5),
        ("flip", float("nan")),
    ],
)
def test_impossible_configurations(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} = "):
        ClipConfig(**{field: value})


def test_closed(manifest: Manifest) -> None:
    loader = batches(manifest, SMALL, batch_size=4)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []
