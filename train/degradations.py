"""Made videos of known quality: what is done to them says what their scores are.

Each score but the last has a cause of its own, of a strength s from 0 to 1, and is 5 - 4 s:

| score | what lowers it |
|---|---|
| Traditional | blur, noise, or compression, one of them in a video |
| Alignment | a prompt with the other shade, or another direction: half of s each, by the angle |
| Aesthetic | faded colours |
| Temporal | frames that are repeated, or dropped, one of them in a video |
| Overall | no cause of its own: the mean of the lowest of the four and of their mean |

Videos are those of `jvjepa.train.synthetic`, prompts of the form "a dark shape moving down left".
"""

import csv
import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from jvjepa.errors import InputError
from jvjepa.storage import new_folder
from jvjepa.train.mos_data import COLUMNS, HIGHEST, LOWEST, NAME, PROMPT
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig, render, write_video

RATINGS_FILE = "labels.csv"
RECIPES_FILE = "recipes.csv"
TRADITIONAL = ("blur", "noise", "compression")
TEMPORAL = ("repeat", "drop")
INTACT = 0.25  # the share of videos in which a cause is absent

Frames = NDArray[np.uint8]  # [T, H, W, 3]

# What a strength of 1 is.
_BLUR = 0.035  # of the height, the deviation of the Gaussian
_NOISE = 40.0  # of 255, the deviation
_CRF = (18, 45)  # at a strength of 0 and of 1
_FADE = 0.85  # the share of contrast and saturation that is lost
_REPEATED = 0.75  # the share of frames
_DROPPED = 0.6  # the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to a video. Strengths are 0, nothing, to 1.

    Args:
        direction: in which the shape moves, a place in `DIRECTIONS`.
        bright: whether it is brighter than the ground.
        prompted_direction: in which the prompt says that it moves.
        prompted_bright: whether the prompt says that it is bright, and not dark.
        traditional: one of `TRADITIONAL`.
        traditional_strength: of that.
        fade: strength.
        temporal: one of `TEMPORAL`.
        temporal_strength: of that.
    """

    direction: int
    bright: bool
    prompted_direction: int
    prompted_bright: bool
    traditional: str
    traditional_strength: float
    fade: float
    temporal: str
    temporal_strength: float

    @property
    def prompt(self) -> str:
        """What the video is said to show."""
        return prompt(self.prompted_direction, bright=self.prompted_bright)

    @property
    def scores(self) -> tuple[float, ...]:
        """The five scores, in the order of `jvjepa.quality.SCORES`."""
        steps = abs(self.direction - self.prompted_direction)
        angle = min(steps, len(DIRECTIONS) - steps) / (len(DIRECTIONS) / 2)
        wrong = (angle + (self.bright != self.prompted_bright)) / 2
        strengths = (self.traditional_strength, wrong, self.fade, self.temporal_strength)
        four = [HIGHEST - (HIGHEST - LOWEST) * strength for strength in strengths]
        return *four, (min(four) + sum(four) / len(four)) / 2


def prompt(direction: int, *, bright: bool) -> str:
    """The text for a place in `DIRECTIONS` and a shade."""
    return f"a {'bright' if bright else 'dark'} shape moving {DIRECTIONS[direction]}"


def is_bright(frames: Frames) -> bool:
    """Whether what moves in uint8 [T, H, W, 3] is brighter than what stands still."""
    grey = frames.mean(axis=-1)
    return bool(np.sum(grey - np.median(grey, axis=0)) > 0)


def draw_recipe(direction: int, bright: bool, draw: np.random.Generator) -> Recipe:
    """Draws what to do to a video; all causes are independent.

    Args:
        direction: in which the shape moves.
        bright: whether it is brighter than the ground.
        draw: where the numbers come from.

    Returns:
        Each cause absent in a quarter of the videos, and else of a uniform strength; the prompted
        direction right in a quarter, the shade in half of them.
    """

    def strength() -> float:
        return 0.0 if draw.random() < INTACT else float(draw.random())

    turn = 0 if draw.random() < INTACT else int(draw.integers(1, len(DIRECTIONS)))
    return Recipe(
        direction=direction,
        bright=bright,
        prompted_direction=(direction + turn) % len(DIRECTIONS),
        prompted_bright=bool(draw.random() < 0.5),
        traditional=str(draw.choice(TRADITIONAL)),
        traditional_strength=strength(),
        fade=strength(),
        temporal=str(draw.choice(TEMPORAL)),
        temporal_strength=strength(),
    )


def degrade(frames: Frames, recipe: Recipe, draw: np.random.Generator) -> tuple[Frames, int]:
    """Does to a video what a recipe says, but for the prompt.

    Args:
        frames: uint8 [T, H, W, 3].
        recipe: what to do.
        draw: which frames are repeated or dropped, and the noise.

    Returns:
        uint8 [t, H, W, 3], t below T where frames are dropped, and the `crf` to write them with.
    """
    alter = {"repeat": repeat, "drop": drop}[recipe.temporal]
    frames = fade(alter(frames, recipe.temporal_strength, draw), recipe.fade)
    kind, strength = recipe.traditional, recipe.traditional_strength
    if kind == "blur":
        frames = blur(frames, strength)
    if kind == "noise":
        frames = noise(frames, strength, draw)
    low, high = _CRF
    return frames, round(low + (high - low) * strength) if kind == "compression" else low


def blur(frames: Frames, strength: float) -> Frames:
    """Blurs each frame with a Gaussian."""
    deviation = _BLUR * strength * frames.shape[1]
    sides = (0, deviation, deviation, 0)
    return _rounded(ndimage.gaussian_filter(frames.astype(np.float32), sides, mode="nearest"))


def noise(frames: Frames, strength: float, draw: np.random.Generator) -> Frames:
    """Adds normal noise, another to each value."""
    added = draw.standard_normal(frames.shape, np.float32) * np.float32(_NOISE * strength)
    return _rounded(frames + added)


def fade(frames: Frames, strength: float) -> Frames:
    """Takes contrast and saturation away: all colours move towards the mean grey of the video."""
    grey = np.float32(frames.mean())
    return _rounded(grey + np.float32(1 - _FADE * strength) * (frames.astype(np.float32) - grey))


def repeat(frames: Frames, strength: float, draw: np.random.Generator) -> Frames:
    """Shows the frame before instead of some frames, as a video that stutters."""
    others = 1 + draw.permutation(len(frames) - 1)
    place = np.arange(len(frames))
    place[others[: round(_REPEATED * strength * len(others))]] = 0
    return frames[np.maximum.accumulate(place)]


def drop(frames: Frames, strength: float, draw: np.random.Generator) -> Frames:
    """Leaves frames out; the video is shorter, and jumps. The first and the last one stay."""
    inner = 1 + draw.permutation(len(frames) - 2)
    left_out = inner[: round(_DROPPED * strength * len(inner))]
    return np.delete(frames, left_out, axis=0)


def write_rated_videos(
    folder: str | os.PathLike[str],
    count: int,
    config: SyntheticConfig | None = None,
    *,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Writes degraded H.264 videos, and their prompts and scores.

    Args:
        folder: to make; it appears when all of it is written.
        count: videos; of eight in a row each moves in another direction.
        config: what they are like before; None takes the defaults.
        seed: of all that is random.
        force: replace `folder` where it exists.

    Returns:
        The path of the CSV, `folder`/labels.csv, for `jvjepa.train.mos_data.read_ratings`;
        recipes.csv beside it says what was done to each video.

    Raises:
        InputError: `count` is below 1, or `folder` exists and `force` is False.
    """
    if count < 1:
        raise InputError(f"count = {count}; it must be 1 or more")
    config = config or SyntheticConfig()
    folder = Path(folder)
    recipes: dict[str, Recipe] = {}
    with new_folder(folder, RECIPES_FILE, force=force) as work:
        for i in range(count):
            draw = np.random.default_rng((seed, i, 1))
            direction, name = i % len(DIRECTIONS), f"{i:05d}.mp4"
            clean = render(direction, (seed, i), config)
            recipes[name] = draw_recipe(direction, is_bright(clean), draw)
            frames, crf = degrade(clean, recipes[name], draw)
            write_video(work / name, frames, config.fps, crf=crf)
        _write_tables(work, recipes)
    return folder / RATINGS_FILE


def _write_tables(folder: Path, recipes: dict[str, Recipe]) -> None:
    with open(folder / RATINGS_FILE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((NAME, PROMPT, *COLUMNS))
        for name, recipe in recipes.items():
            table.writerow((name, recipe.prompt, *(f"{score:.4f}" for score in recipe.scores)))
    with open(folder / RECIPES_FILE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((NAME, *(field.name for field in dataclasses.fields(Recipe))))
        for name, recipe in recipes.items():
            table.writerow((name, *dataclasses.astuple(recipe)))


def _rounded(frames: NDArray[np.float32]) -> Frames:
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)
