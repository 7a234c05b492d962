"""Rated videos and kept features for tests of video-quality training."""

import csv
import hashlib
from pathlib import Path

import numpy as np
from quality import PROMPTS

from jvjepa.quality import SCORES
from jvjepa.train.degradations import write_rated_videos
from jvjepa.train.mos_data import Ratings
from jvjepa.train.mos_features import Examples, Store
from jvjepa.train.synthetic import SyntheticConfig


def write_rated(folder: Path, count: int, seed: int = 0) -> Path:
    """Degraded videos of 6 frames and 32 pixels; prompts in words that the tiny tokenizer knows."""
    config = SyntheticConfig(num_frames=6, fps=6, height=32, width=32)
    path = write_rated_videos(folder, count, config, seed=seed)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        for i, row in enumerate(rows):
            table.writerow({**row, "Prompt": PROMPTS[i % len(PROMPTS)]})
    return path


def damage(path: Path) -> None:
    """Cuts a video off in its middle."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def kept_examples(folder: Path, videos: np.ndarray, texts: np.ndarray, scores: np.ndarray,
                  made_of: dict[str, object]) -> Examples:  # fmt: skip
    """Examples whose features no encoder made."""
    names = tuple(f"{i}.mp4" for i in range(len(videos)))
    store = Store(folder)
    keys = tuple(hashlib.sha256(video.tobytes()).hexdigest() for video in videos)
    for key, feature in zip(keys, videos, strict=True):
        store.save(key, feature)
    assert scores.shape[1] == len(SCORES)
    ratings = Ratings(
        source=f"{folder}.csv",
        names=names,
        paths=tuple(folder / name for name in names),
        prompts=names,
        scores=scores,
    )
    return Examples(ratings=ratings, videos=keys, texts=texts, store=store, bad={}, made_of=made_of)
