"""Taking tokens out of a clip by their ids, checked, as JAX's indexing is not."""

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.errors import InputError
from jvjepa.typing import Array


def check_ids(
    name: str, ids: Array, batch: int, num_tokens: int, valid: Array | None = None
) -> None:
    """Raises InputError unless `ids` name tokens of a clip, each at most once.

    JAX clamps or fills out-of-range indices without a word, so values are checked here wherever
    they are known, that is outside of jit.

    Args:
        name: what the ids are called, for the message.
        ids: should be int [batch, M] within [0, num_tokens), no id twice in a row.
        batch: B.
        num_tokens: N of the clip.
        valid: bool [batch, M], False where an id is only padding and may be there twice; None means
            that all are valid.

    Raises:
        InputError: they are not.
    """
    if not hasattr(ids, "ndim"):
        raise InputError(f"{name} is a {type(ids).__name__}; it must be an array, int [{batch}, M]")
    if ids.ndim != 2 or ids.shape[0] != batch or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(
            f"{name} is {ids.dtype} {list(ids.shape)}; it must be int [{batch}, M], M ids for each "
            "clip of the batch"
        )
    if ids.shape[1] == 0:
        raise InputError(f"{name} is {list(ids.shape)}; a clip must have one id or more")
    if valid is not None and (valid.shape != ids.shape or valid.dtype != jnp.bool_):
        right = f"bool {list(ids.shape)}, as {name}"
        raise InputError(f"valid is {valid.dtype} {list(valid.shape)}; it must be {right}")
    if isinstance(ids, jax.core.Tracer) or isinstance(valid, jax.core.Tracer):
        return
    values = np.asarray(ids)
    if values.size and (values.min() < 0 or values.max() >= num_tokens):
        raise InputError(
            f"{name} holds ids from {values.min()} to {values.max()}; "
            f"this clip has tokens 0 to {num_tokens - 1}"
        )
    kept = values.astype(np.int64) if valid is None else np.where(valid, values, -1)
    ordered = np.sort(kept, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    for row, column in np.argwhere(twice)[:1]:
        raise InputError(
            f"{name} of clip {row} holds id {ordered[row, column]} twice; each may be there once"
        )


def gather(tokens: Array, ids: Array, valid: Array | None = None, *, name: str = "ids") -> Array:
    """Takes some tokens of every clip; after an encoder this is masking behind its blocks.

    Args:
        tokens: float [B, N, D].
        ids: int [B, M] within [0, N), none twice in a clip. Bad ids raise; where `ids` are traced,
            those outside give NaN.
        valid: bool [B, M], False where an id is only padding; None means that all are valid.
        name: what the ids are called in an error.

    Returns:
        [B, M, D].

    Raises:
        InputError: ids cannot be right.
    """
    if tokens.ndim != 3 or not jnp.issubdtype(tokens.dtype, jnp.floating):
        found = f"{tokens.dtype} {list(tokens.shape)}"
        raise InputError(f"tokens are {found}; they must be float [B, N, D]")
    batch, num_tokens, _ = tokens.shape
    check_ids(name, ids, batch, num_tokens, valid)
    ids = jnp.asarray(ids, jnp.int32)
    ids = jnp.where(ids < 0, num_tokens, ids)  # negative ones would count from the end
    return jnp.take_along_axis(tokens, ids[..., None], axis=1, mode="fill", fill_value=jnp.nan)
