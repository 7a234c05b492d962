import dataclasses
import math

import numpy as np
import pytest
from caches import random_cache, separable
from models import relative_error

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.neighbours import (
    NeighbourConfig,
    mean_features,
    neighbour_accuracy,
    votes,
)


def reference_votes(
    config: NeighbourConfig,
    references: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray | None,
    classes: int,
) -> np.ndarray:
    """One query after the other, float64."""
    found = []
    asked = references if queries is None else queries
    for i, query in enumerate(asked.astype(np.float64)):
        near = []
        for j, other in enumerate(references.astype(np.float64)):
            if queries is not None or i != j:
                cosine = query @ other / math.sqrt(query @ query) / math.sqrt(other @ other)
                near.append((-cosine, j))
        row = np.zeros(classes)
        for cosine, j in sorted(near)[: config.k]:
            row[labels[j]] += math.exp(-cosine / config.temperature)
        found.append(row / row.sum())
    return np.array(found)


@pytest.mark.parametrize("alone", [True, False], ids=["leave one out", "two sets"])
@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_votes(k: int, chunk: int, alone: bool) -> None:
    rng = np.random.default_rng(k + chunk)
    references = (rng.normal(size=(23, 9)) * rng.uniform(0.1, 9, (23, 1))).astype(np.float32)
    labels = rng.integers(4, size=23).astype(np.int32)
    queries = None if alone else rng.normal(size=(17, 9)).astype(np.float32)
    config = NeighbourConfig(k=k, chunk=chunk, temperature=0.2)

    found = votes(config, references, labels, queries, classes=5)
    right = reference_votes(config, references, labels, queries, 5)
    assert relative_error(found, right) <= 1e-5
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_nobody_votes_on_itself() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    labels = np.array([0, 1, 0, 1], np.int32)
    alone = votes(NeighbourConfig(k=1), vectors, labels, classes=2)
    np.testing.assert_array_equal(alone.argmax(axis=1), [1, 0, 1, 0])
    asked = votes(NeighbourConfig(k=1), vectors, labels, vectors, classes=2)
    np.testing.assert_array_equal(asked.argmax(axis=1), [0, 0, 0, 0])  # of equal ones the first


def test_neighbour_accuracy() -> None:
    training, validation = separable(30, 0), separable(12, 1)
    config = NeighbourConfig(k=3)
    means = [
        some.values.astype(np.float64).mean(axis=(1, 2, 3, 4)) for some in (training, validation)
    ]
    for queries, features in ((None, training), (means[1], validation)):
        right = reference_votes(config, means[0], training.labels, queries, 3)
        right = (right.argmax(axis=1) == features.labels).mean()
        other = None if queries is None else validation
        assert neighbour_accuracy(config, training, other) == pytest.approx(right)
        assert right > 0.9
    assert relative_error(mean_features(training), means[0]) <= 1e-6
    half = dataclasses.replace(training, values=training.values.astype(np.float16))
    assert relative_error(mean_features(half), means[0]) <= 2e-3


def test_neighbours_that_cannot_vote() -> None:
    vectors, labels = np.ones((3, 4), np.float32), np.array([0, 1, 1], np.int32)
    config = NeighbourConfig()
    zero = vectors * np.array([[1], [0], [np.nan]], np.float32)
    for arguments, classes, message in (
        ((zero, labels), 2, "references: rows 1, 2 are zero or not finite"),
        ((vectors, labels, zero), 2, "queries: rows 1, 2 are zero"),
        ((vectors, labels[:2]), 2, r"references are \[3, 4\], labels \[2\]"),
        ((vectors[0], labels), 2, r"references are \[4\]"),
        ((vectors, labels), 1, "labels are 0 to 1; they must be 0 to 0"),
        ((vectors, labels - 1), 2, "labels are -1 to 0"),
        ((vectors[:1], labels[:1]), 2, "there are 1 references; 2 are the least"),
        ((vectors, labels, vectors[:, :3]), 2, r"queries are \[3, 3\]"),
    ):
        with pytest.raises(InputError, match=message):
            votes(config, *arguments, classes=classes)
    features = random_cache()
    with pytest.raises(InputError, match="encoder = f"):
        neighbour_accuracy(
            config, features, dataclasses.replace(features, made_of={"encoder": "f"})
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("k", 0), ("k", 2.0), ("chunk", 0), ("chunk", True)]
    + [("temperature", x) for x in (0, -1.0, math.inf, math.nan, "0.07")],
)
def test_bad_neighbour_options(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"NeighbourConfig.{field} = "):
        NeighbourConfig(**{field: value})
