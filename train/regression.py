"""A student that learns the features of a teacher: the loss, and how near it is."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from jvjepa.errors import ConfigError
from jvjepa.layers import normalize
from jvjepa.train.losses import NORM_EPS, feature_regression
from jvjepa.typing import Array

Weighting = Literal["uniform", "relative"]
_TINY = 1e-6  # errors below it do not count any more


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """What counts, and how much.

    Args:
        token: weight of the loss of single tokens.
        pooled: weight of the loss of the mean token of each tubelet, which is what a stream gives.
        cosine: weight of the cosine distance in both, beside the smooth L1.
        weighting: of the tubelets of a clip: "uniform", or "relative": the loss is the mean of
            the logarithms of their errors: what counts is the share of its own error that each
            loses. The first tubelets of a causal student cannot know what their teacher has seen,
            and their errors, which stay, drown the small ones of the last tubelets otherwise. The
            errors are means over the clips seen together: with `accumulate`, a part of the batch.

    Raises:
        ConfigError: a weight is negative, or there is no loss, or no such weighting.
    """

    token: float = 1.0
    pooled: float = 1.0
    cosine: float = 1.0
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("token", "pooled", "cosine"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} = {value!r}; it must be a weight, 0 or more")
        choices = get_args(Weighting)
        if self.weighting not in choices:
            raise ConfigError(f"weighting = {self.weighting!r}; it must be one of {choices}")
        if self.token == self.pooled == 0:
            raise ConfigError("token = pooled = 0; there is no loss then")


def regression_loss(
    config: RegressionConfig, student: Array, teacher: Array, tubelets: int
) -> tuple[Array, dict[str, Array]]:
    """Compares features that were normed without parameters, as targets are in the pretraining.

    Args:
        config: the weights.
        student: [B, N, D].
        teacher: [B, N, D].
        tubelets: t, of the clips.

    Returns:
        The loss, float32 [], and the errors that it is made of, means over all tubelets alike.
    """

    def by_tubelet(x: Array) -> Array:
        return rearrange(x, "b (t s) d -> t b s d", t=tubelets)

    total, parts = jnp.zeros((), jnp.float32), {}
    pooled = pool(student, tubelets), pool(teacher, tubelets)
    for name, weight, pair in (
        ("token", config.token, (student, teacher)),
        ("pooled", config.pooled, pooled),
    ):
        l1, distance = jax.vmap(feature_regression)(*map(by_tubelet, pair))  # [t]
        errors = l1 + config.cosine * distance
        if config.weighting == "relative":
            errors = jnp.log(errors + _TINY)
        total += weight * jnp.mean(errors)
        parts |= {f"{name}_l1": jnp.mean(l1), f"{name}_cosine": 1 - jnp.mean(distance)}
    return total, parts


def pool(tokens: Array, tubelets: int) -> Array:
    """The mean token of each tubelet: [B, N, D] to float32 [B, t, D]."""
    batch, _, width = tokens.shape
    return jnp.mean(tokens.astype(jnp.float32).reshape(batch, tubelets, -1, width), axis=2)


def fidelity(student: Array, teacher: Array, tubelets: int) -> dict[str, Array]:
    """How near a student is to its teacher.

    Args:
        student: [B, N, D].
        teacher: [B, N, D].
        tubelets: t, of the clips.

    Returns:
        "token_cosine" and "pooled_cosine", float32 [B]: the mean cosine of the tokens of each clip,
        and of the mean tokens of its tubelets, after a LayerNorm without parameters.
    """
    pooled = pool(student, tubelets), pool(teacher, tubelets)
    return {"token_cosine": _cosine(student, teacher), "pooled_cosine": _cosine(*pooled)}


def _cosine(x: Array, y: Array) -> Array:
    x, y = normalize(x, NORM_EPS), normalize(y, NORM_EPS)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / lengths, axis=1)
