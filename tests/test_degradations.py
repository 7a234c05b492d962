import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from jvjepa import video
from jvjepa.errors import InputError
from jvjepa.train import degradations
from jvjepa.train.degradations import (
    Recipe,
    blur,
    degrade,
    draw_recipe,
    drop,
    fade,
    is_bright,
    noise,
    repeat,
    write_rated_videos,
)
from jvjepa.train.mos_data import read_ratings
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig, render

CONFIG = SyntheticConfig(num_frames=16, fps=8, height=48, width=64, occluded=0.0)
FRAMES = render(0, 3, CONFIG)
GOOD = Recipe(
    direction=2,
    bright=True,
    prompted_direction=2,
    prompted_bright=True,
    traditional="blur",
    traditional_strength=0.0,
    fade=0.0,
    temporal="drop",
    temporal_strength=0.0,
)
STRENGTHS = np.linspace(0, 1, 6)


def drawing() -> np.random.Generator:
    return np.random.default_rng(0)


def sharpness(frames: np.ndarray) -> float:
    return float(np.mean([ndimage.laplace(f[..., 0].astype(float)).var() for f in frames]))


def test_nothing_is_done_at_no_strength() -> None:
    for alter in (blur, fade):
        np.testing.assert_array_equal(alter(FRAMES, 0.0), FRAMES)
    for alter in (noise, repeat, drop):
        np.testing.assert_array_equal(alter(FRAMES, 0.0, drawing()), FRAMES)
    frames, crf = degrade(FRAMES, GOOD, drawing())
    np.testing.assert_array_equal(frames, FRAMES)
    assert crf == 18


def test_more_strength_does_more() -> None:
    measured = {
        "blur": [-sharpness(blur(FRAMES, s)) for s in STRENGTHS],
        "noise": [np.std(noise(FRAMES, s, drawing()) - FRAMES.astype(float)) for s in STRENGTHS],
        "fade": [-np.std(fade(FRAMES, s).astype(float)) for s in STRENGTHS],
        "repeat": [_repeats(repeat(FRAMES, s, drawing())) for s in STRENGTHS],
        "drop": [-len(drop(FRAMES, s, drawing())) for s in STRENGTHS],
    }
    for kind, values in measured.items():
        assert np.all(np.diff(values) > 0), kind
    assert measured["repeat"][-1] == round(0.75 * 15)
    assert -measured["drop"][-1] == 16 - round(0.6 * 14)
    assert measured["fade"][-1] / measured["fade"][0] == pytest.approx(0.15, abs=0.02)


def _repeats(frames: np.ndarray) -> int:
    return sum(np.array_equal(a, b) for a, b in zip(frames[1:], frames, strict=False))


def test_frames_stay_in_order() -> None:
    numbered = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1)
    stuttering = repeat(numbered, 0.8, drawing()).ravel()
    assert stuttering[0] == 0
    assert np.all(np.diff(stuttering.astype(int)) >= 0)
    assert np.all(stuttering <= np.arange(16))  # a frame is late, never early
    short = drop(numbered, 0.8, drawing()).ravel()
    assert (short[0], short[-1]) == (0, 15)
    assert np.all(np.diff(short.astype(int)) > 0)


def test_each_score_has_a_cause_of_its_own() -> None:
    assert GOOD.scores == (5, 5, 5, 5, 5)
    causes = ({"traditional_strength": 0.5}, {"prompted_direction": 6}, {"fade": 0.25})
    causes += ({"temporal_strength": 1.0},)
    right = (3.0, 3.0, 4.0, 1.0)
    for i, (cause, score) in enumerate(zip(causes, right, strict=True)):
        scores = dataclasses.replace(GOOD, **cause).scores
        assert scores[i] == score
        assert [x for j, x in enumerate(scores[:4]) if j != i] == [5, 5, 5]
        assert scores[4] == pytest.approx((score + (15 + score) / 4) / 2)
    every = dataclasses.replace(GOOD, **{k: v for cause in causes for k, v in cause.items()})
    assert every.scores == (3, 3, 4, 1, pytest.approx((1 + 11 / 4) / 2))


@pytest.mark.parametrize("direction", range(8))
@pytest.mark.parametrize("bright", [True, False])
def test_alignment_is_how_much_of_the_prompt_is_wrong(direction: int, bright: bool) -> None:
    angles = {0: 5, 1: 4.5, 2: 4, 3: 3.5, 4: 3, 5: 3.5, 6: 4, 7: 4.5}
    for (turn, score), named in itertools.product(angles.items(), (True, False)):
        prompted = {"prompted_direction": (direction + turn) % 8, "prompted_bright": named}
        recipe = dataclasses.replace(GOOD, direction=direction, bright=bright, **prompted)
        assert recipe.scores[1] == (score if named == bright else score - 2)
        shade = "bright" if named else "dark"
        assert recipe.prompt == f"a {shade} shape moving {DIRECTIONS[(direction + turn) % 8]}"


def test_bright_is_what_is_brighter_than_the_ground() -> None:
    frames = np.full((6, 8, 8, 3), 100, np.uint8)
    for i in range(6):
        frames[i, 4, i] = 180
    assert is_bright(frames)
    assert not is_bright(255 - frames)
    drawn = [is_bright(render(i % 8, i, CONFIG)) for i in range(40)]
    assert 5 < sum(drawn) < 35


def test_causes_are_independent_and_cover_their_range() -> None:
    draw = drawing()
    recipes = [draw_recipe(i % 8, i % 3 == 0, draw) for i in range(2000)]
    scores = np.array([recipe.scores for recipe in recipes])
    assert scores.min() >= 1
    assert scores.max() == 5
    together = np.corrcoef(scores[:, :4].T) - np.eye(4)
    assert np.abs(together).max() < 0.08
    assert np.all(np.corrcoef(scores.T)[4, :4] > 0.3)
    for i in range(4):
        intact = 0.125 if i == 1 else 0.25
        assert abs(np.mean(scores[:, i] == 5) - intact) < 0.05
        assert scores[:, i].min() < 1.1
    assert {recipe.traditional for recipe in recipes} == {"blur", "noise", "compression"}
    assert {recipe.temporal for recipe in recipes} == {"repeat", "drop"}


def test_compression_loses_detail(tmp_path: Path) -> None:
    """Of written files, the strongest is the smallest and the furthest from what was written."""
    sizes, errors = [], []
    for strength in (0.0, 0.5, 1.0):
        recipe = dataclasses.replace(GOOD, traditional="compression", traditional_strength=strength)
        frames, crf = degrade(FRAMES, recipe, drawing())
        degradations.write_video(tmp_path / "clip.mp4", frames, 8, crf=crf)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
        shown, _ = video.read(tmp_path / "clip.mp4")
        errors.append(np.abs(shown.astype(float) - FRAMES).mean())
    assert sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < errors[1] < errors[2]


def test_a_set_is_read_back(tmp_path: Path) -> None:
    path = write_rated_videos(tmp_path / "set", 9, CONFIG, seed=5)
    assert path == tmp_path / "set" / "labels.csv"
    ratings = read_ratings(path)
    assert len(ratings) == 9
    with open(tmp_path / "set" / "recipes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for i, row in enumerate(rows):
        values = {name: _read(kind, row[name]) for name, kind in kinds.items()}
        recipe = Recipe(**values)
        assert recipe.direction == i % 8
        assert ratings.prompts[i] == recipe.prompt
        np.testing.assert_allclose(ratings.scores[i], recipe.scores, atol=1e-4)
        frames, _ = video.read(ratings.paths[i])
        gone = recipe.temporal == "drop" and recipe.temporal_strength > 0.2
        assert (len(frames) < 16) == gone or recipe.temporal_strength < 0.2
    again = read_ratings(write_rated_videos(tmp_path / "again", 9, CONFIG, seed=5))
    assert again.digest == ratings.digest
    for one, other in zip(ratings.paths, again.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()
    other = read_ratings(write_rated_videos(tmp_path / "other", 9, CONFIG, seed=6))
    assert not np.array_equal(other.scores, ratings.scores)


def _read(kind: type, text: str) -> object:
    return text == "True" if kind is bool else kind(text)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"count = 0"):
        write_rated_videos(tmp_path / "set", 0)
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match=r"set exists"):
        write_rated_videos(tmp_path / "set", 1)
    short = dataclasses.replace(CONFIG, num_frames=2)
    path = write_rated_videos(tmp_path / "short", 4, short, seed=1)  # nothing to drop
    assert all(len(video.read(name)[0]) == 2 for name in read_ratings(path).paths)
