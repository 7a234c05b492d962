"""A probe without training: what the nearest features vote for.

Reference: `eval_knn.py` of DINO (arXiv:2104.14294).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.feature_cache import Features, check_classes, check_kind, count_classes
from jvjepa.train.manifest import few
from jvjepa.typing import Array

_ROWS = 64  # videos that are read from a cache together


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighbourConfig:
    """How neighbours vote. The defaults are DINO's.

    Args:
        k: how many vote; of a smaller set all.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
        chunk: how many are compared with the whole set at a time; it bounds the memory.

    Raises:
        ConfigError: a value is impossible.
    """

    k: int = 20
    temperature: float = 0.07
    chunk: int = 256

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("k", "chunk"):
            value = getattr(self, name)
            self._check(type(value) is int and value > 0, name, "a whole number above 0")
        fits = type(self.temperature) in (int, float) and 0 < self.temperature < math.inf
        self._check(fits, "temperature", "a number above 0")

    def _check(self, ok: bool, field: str, right: str) -> None:
        if not ok:
            value = getattr(self, field)
            raise ConfigError(f"NeighbourConfig.{field} = {value!r}; it must be {right}")


def neighbour_accuracy(
    config: NeighbourConfig, training: Features, validation: Features | None = None
) -> float:
    """Measures how often the neighbours are right.

    Args:
        config: how they vote.
        training: features whose labels are known.
        validation: those to classify, of the same encoder and kind; None takes the training set,
            of which each votes on all others but not on itself.

    Returns:
        The share of videos whose class gets the most votes, 0 to 1.

    Raises:
        DataError: labels are missing, or leave some out.
        InputError: the two sets do not fit together, or a mean is zero.
    """
    classes = count_classes(training)
    references, labels, queries = mean_features(training), training.labels, None
    if validation is not None:
        check_classes(validation, classes)
        check_kind(validation, training.config, training.made_of["encoder"])
        queries, labels = mean_features(validation), validation.labels
    found = votes(config, references, training.labels, queries, classes=classes)
    return float(np.mean(found.argmax(axis=1) == labels))


def mean_features(features: Features) -> NDArray[np.float32]:
    """Averages all that there is of each video: to float32 [rows, D].

    Raises:
        InputError: a mean is zero and has no direction.
    """
    starts = range(0, len(features), _ROWS)
    parts = (features.values[start : start + _ROWS].astype(np.float32) for start in starts)
    return np.concatenate([part.mean(axis=(1, 2, 3, 4)) for part in parts])


def votes(
    config: NeighbourConfig,
    references: NDArray[np.float32],
    labels: NDArray[np.int32],
    queries: NDArray[np.float32] | None = None,
    *,
    classes: int,
) -> NDArray[np.float32]:
    """Counts the votes of the nearest references, by the cosine.

    Args:
        config: how they vote.
        references: float [R, D].
        labels: int [R], of the references, 0 to classes - 1.
        queries: float [Q, D]; None takes the references, and none votes on itself.
        classes: how many there are.

    Returns:
        float32 [Q, classes]; each row's votes sum to 1. Of references that are as near as each
        other, the first ones vote.

    Raises:
        InputError: shapes or labels do not fit, or a vector is zero or not finite.
    """
    if references.ndim != 2 or labels.shape != references.shape[:1]:
        raise InputError(
            f"references are {list(references.shape)}, labels {list(labels.shape)}; right are "
            "[R, D] and [R]"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(
            f"labels are {labels.min()} to {labels.max()}; they must be 0 to {classes - 1}"
        )
    alone = queries is None
    others = len(references) - alone
    if others < 1:
        raise InputError(f"there are {len(references)} references; {1 + alone} are the least")
    unit = _directions("references", references)
    asked = unit if queries is None else _directions("queries", queries)
    if asked.shape[1:] != unit.shape[1:]:
        raise InputError(
            f"queries are {list(asked.shape)}; they must be [Q, D = {unit.shape[1]}], as the "
            "references are"
        )
    chunk, k = min(config.chunk, len(asked)), min(config.k, others)
    count = functools.partial(_votes, k, classes, config.temperature)
    near, known = jnp.asarray(unit), jnp.asarray(labels, jnp.int32)
    found = []
    for begin in range(0, len(asked), chunk):
        # The last ones come with some before them, so that all chunks have one shape.
        first = min(begin, len(asked) - chunk)
        own = np.arange(first, first + chunk, dtype=np.int32) if alone else np.full(chunk, -1)
        some = jnp.asarray(asked[first : first + chunk])
        share = count(near, known, some, jnp.asarray(own, jnp.int32))
        found.append(np.asarray(share)[begin - first :])
    return np.concatenate(found)


def _directions(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    wrong = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(wrong):
        raise InputError(f"{name}: rows {few(wrong)} are zero or not finite, and have no direction")
    return (vectors / lengths).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _votes(
    k: int,
    classes: int,
    temperature: float,
    references: Array,
    labels: Array,
    queries: Array,
    own: Array,
) -> Array:
    cosines = jnp.matmul(queries, references.T, precision="highest")
    itself = own[:, None] == jnp.arange(len(references), dtype=jnp.int32)[None]
    nearest, places = jax.lax.top_k(jnp.where(itself, -jnp.inf, cosines), k)
    weights = jax.nn.softmax(nearest / temperature)
    chosen = jax.nn.one_hot(labels[places], classes, dtype=jnp.float32)  # [Q, k, classes]
    return jnp.sum(weights[..., None] * chosen, axis=1)
