"""A student that learns the features of a teacher: the loss, and how near it is."""

import dataclasses

import jax.numpy as jnp

from jvjepa.errors import ConfigError
from jvjepa.layers import normalize
from jvjepa.train.losses import NORM_EPS, feature_regression
from jvjepa.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """What counts, and how much.

    Args:
        token: weight of the loss of single tokens.
        pooled: weight of the loss of the mean token of each tubelet, which is what a stream gives.
        cosine: weight of the cosine distance in both, beside the smooth L1.

    Raises:
        ConfigError: a weight is negative, or there is no loss.
    """

    token: float = 1.0
    pooled: float = 1.0
    cosine: float = 1.0

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{field.name} = {value!r}; it must be a weight, 0 or more")
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
        The loss, float32 [], and what it is made of.
    """
    token_l1, token_distance = feature_regression(student, teacher)
    pooled = pool(student, tubelets), pool(teacher, tubelets)
    pooled_l1, pooled_distance = feature_regression(*pooled)
    token = token_l1 + config.cosine * token_distance
    loss = config.token * token + config.pooled * (pooled_l1 + config.cosine * pooled_distance)
    return loss, {
        "token_l1": token_l1,
        "token_cosine": 1 - token_distance,
        "pooled_l1": pooled_l1,
        "pooled_cosine": 1 - pooled_distance,
    }


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
