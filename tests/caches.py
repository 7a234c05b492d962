"""Caches of features that no encoder made."""

import dataclasses

import numpy as np
from models import tiny_config

from jvjepa.config import EncoderConfig
from jvjepa.train.data import ClipConfig
from jvjepa.train.feature_cache import Features
from jvjepa.train.frozen_features import FeatureConfig

ENCODER = tiny_config(head_width=12, num_heads=2, num_layers=1, crop_size=32)  # D = 24
WIDTH = ENCODER.hidden_size
CLIP = ClipConfig(num_frames=4, crop_size=32, temporal="uniform", spatial="centre")
MIRRORED = dataclasses.replace(CLIP, spatial="random", flip=1.0)


def cache(
    values: np.ndarray,
    labels: np.ndarray | list[int],
    *,
    config: FeatureConfig | None = None,
    encoder: EncoderConfig = ENCODER,
    name: str = "list.csv",
) -> Features:
    """Features [rows, views, clips, t, n, D] that no encoder made."""
    views = (CLIP, MIRRORED)[: values.shape[1]]
    config = config or FeatureConfig(
        views=tuple(dataclasses.replace(view, clips=values.shape[2]) for view in views)
    )
    return Features(
        values=values,
        labels=np.asarray(labels, np.int32),
        ids=np.arange(len(values), dtype=np.int32),
        config=config,
        encoder=encoder,
        source=name,
        classes=(),
        bad={},
        made_of={"encoder": "e" * 64},
    )


def random_cache(
    rows: int = 10, shape: tuple[int, ...] = (1, 1, 2, 3), classes: int = 3, seed: int = 0
) -> Features:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, *shape, WIDTH)) + rng.normal(size=WIDTH)
    return cache(values.astype(np.float32), np.arange(rows) % classes)


def separable(rows: int, seed: int) -> Features:
    """Three classes; each has a direction, which the tokens of the second tubelet have."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, 1, 1, 2, 3, WIDTH)) * 0.5
    labels = np.arange(rows) % 3
    directions = np.random.default_rng(99).normal(size=(3, WIDTH))
    values[:, 0, 0, 1] += directions[labels][:, None]
    return cache(values.astype(np.float32), labels)
