import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from videofiles import decode_all

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.manifest import read_manifest
from jvjepa.train.synthetic import (
    DIRECTIONS,
    SyntheticConfig,
    TextureConfig,
    render,
    write_videos,
)


def moved(frames: np.ndarray) -> np.ndarray:
    """[2], pixels right and down: from where the shape is in the first to where it is in the last.

    The shape is what differs from the median over time, which shows the background.
    """
    ground = np.median(frames, axis=0)
    places = []
    for frame in (frames[0], frames[-1]):
        there = np.abs(frame - ground).max(axis=-1) > 40
        places.append([axis.mean() for axis in np.nonzero(there)][::-1])
    return np.subtract(places[1], places[0])


def direction_of(motion: np.ndarray) -> int:
    """Which of the eight directions is nearest."""
    return round(np.arctan2(motion[1], motion[0]) / (np.pi / 4)) % 8


def test_labels_match_the_motion_in_the_files(tmp_path: Path) -> None:
    manifest = read_manifest(write_videos(tmp_path / "set", 32, seed=3))

    assert manifest.labels.tolist() == [i % 8 for i in range(32)]
    videos = [decode_all(path)[0] for path in manifest.paths]
    assert {video.shape for video in videos} == {(32, 96, 128, 3)}
    assert [direction_of(moved(video)) for video in videos] == manifest.labels.tolist()
    speeds = [np.hypot(*moved(video)) for video in videos]
    assert max(speeds) > 2 * min(speeds)
    assert (tmp_path / "set" / "labels.txt").read_text().splitlines() == list(DIRECTIONS)


@pytest.mark.parametrize("occluded", [0.0, 1.0])
@pytest.mark.parametrize("size", [(64, 160), (96, 64)])
def test_labels_match_at_any_size(occluded: float, size: tuple[int, int]) -> None:
    config = SyntheticConfig(height=size[0], width=size[1], occluded=occluded, num_frames=24)

    for seed in range(2):
        for label in range(8):
            frames = render(label, seed, config)
            assert frames.shape == (24, *size, 3)
            assert direction_of(moved(frames)) == label, (label, seed)


def test_something_stands_in_the_way() -> None:
    """The share of the shape that can be seen falls only where there is a bar."""
    for occluded in (False, True):
        config = SyntheticConfig(occluded=float(occluded))
        least = []
        for seed in range(16):
            frames = render(seed % 8, seed, config).astype(float)
            differs = np.abs(frames - np.median(frames, axis=0)).max(axis=-1) > 40
            seen = differs.sum(axis=(1, 2))
            least.append(seen.min() / seen.max())
        assert (np.mean(least) < 0.5) == occluded, least


def test_a_single_frame_does_not_tell() -> None:
    """Labels that are opposite to each other have the shape in the same places."""
    config = SyntheticConfig(occluded=0.0)  # behind a bar it cannot be found
    places = {0: [], 4: []}
    for label, found in places.items():
        for seed in range(24):
            frames = render(label, seed, config).astype(float)
            differs = np.abs(frames - np.median(frames, axis=0)).max(axis=-1) > 40
            found.append(np.nonzero(differs[16])[1].mean())
    assert abs(np.mean(places[0]) - np.mean(places[4])) < 8  # of 128 pixels


def shift(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[2], whole pixels right and down that fit best, up to 8: of the middle, by correlation."""
    inside = slice(8, -8)
    scores = {}
    for x in range(-8, 9):
        for y in range(-8, 9):
            moved = np.roll(before, (y, x), axis=(0, 1))[inside, inside]
            scores[x, y] = np.corrcoef(moved.ravel(), after[inside, inside].ravel())[0, 1]
    return np.array(max(scores, key=scores.get))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_texture_drifts_as_its_label_says(noise: float) -> None:
    config = TextureConfig(height=48, width=64, num_frames=4, speed=(3.0, 5.0), noise=noise)
    for label in range(8):
        frames = render(label, label, config)
        assert frames.shape == (4, 48, 64, 3)
        assert (frames == frames[..., :1]).all()  # grey
        grey = frames[..., 0].astype(float)
        for before, after in itertools.pairwise(grey):
            motion = shift(before, after)
            assert direction_of(motion) == label, (label, motion)
            assert 3 <= abs(motion).max() <= 5


def test_textures_differ_in_nothing_but_their_motion() -> None:
    config = TextureConfig(height=64, width=64, num_frames=4, noise=0.0)
    videos = [render(label, 3, config).astype(float) for label in range(8)]
    first = videos[0][0]
    for video in videos:
        assert np.corrcoef(first.ravel(), video[0].ravel())[0, 1] > 0.999
        assert abs(video.mean() - 128) < 10
        assert abs(video.std() - 48) < 3
    other = render(0, 4, config)[0]
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.2


def test_a_texture_does_not_come_back() -> None:
    """What leaves on one side does not come in on the other."""
    config = TextureConfig(height=96, width=64, num_frames=24, speed=(4.0, 4.0), noise=0.0)
    frames = render(0, 1, config)[..., 0].astype(float)
    alike = [np.corrcoef(frames[0].ravel(), frame.ravel())[0, 1] for frame in frames[12:]]
    assert np.max(alike) < 0.5


def test_the_seed_decides() -> None:
    np.testing.assert_array_equal(render(3, 5), render(3, 5))
    assert (render(3, 5) != render(3, 6)).any()
    backgrounds = {render(0, seed)[0, 0, 0].tobytes() for seed in range(10)}
    assert len(backgrounds) == 10


def test_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_videos(tmp_path / name, 3, SyntheticConfig(num_frames=4), seed=1)
    for i in range(3):
        one, other = (tmp_path / name / f"{i:05d}.mp4" for name in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label = 8; it must be 0 to 7"):
        render(8, 0)
    with pytest.raises(InputError, match="count = 0"):
        write_videos(tmp_path / "x", 0)
    for field, value in (
        ("num_frames", 1),
        ("fps", 0),
        ("height", 30),
        ("width", 65),
        ("crf", 52),
        ("occluded", 1.1),
    ):
        with pytest.raises(ConfigError, match=f"{field} = "):
            SyntheticConfig(**{field: value})
    for field, value in (("speed", (0.0, 1.0)), ("speed", (2.0, 1.0)), ("noise", -0.1)):
        with pytest.raises(ConfigError, match=f"{field} = "):
            TextureConfig(**{field: value})
    with pytest.raises(ConfigError, match="height = 30"):
        TextureConfig(height=30)


def test_the_noise_of_a_texture_outlives_its_file(tmp_path: Path) -> None:
    config = TextureConfig(num_frames=4, height=32, width=32)
    lost = {}
    for crf in (0, 18):
        given = dataclasses.replace(config, crf=crf)
        manifest = read_manifest(write_videos(tmp_path / str(crf), 2, given))
        read = np.stack([decode_all(path)[0] for path in manifest.paths]).astype(float)
        drawn = np.stack([render(label, (0, label), given) for label in (0, 1)])
        lost[crf] = np.abs(read - drawn).mean()
    assert lost[0] < 1.5  # the rounding of the colour space
    assert lost[18] > 2 * lost[0]


def test_never_replaces_a_folder_unasked(tmp_path: Path) -> None:
    config = SyntheticConfig(num_frames=2)
    write_videos(tmp_path / "set", 2, config)
    with pytest.raises(InputError, match="exists"):
        write_videos(tmp_path / "set", 1, config)
    write_videos(tmp_path / "set", 1, config, force=True)
    assert len(read_manifest(tmp_path / "set" / "manifest.csv")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
