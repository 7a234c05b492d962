"""What attention is tested with: inputs, masks of every form, and a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np

MASKS = ["none", "banded", "areas", "padding", "heads", "blind"]
BATCH, HEADS = 2, 3


def inputs(queries: int, keys: int, width: int = 24, dtype: str = "float32") -> list[jax.Array]:
    """q, k and v, [B, N or M, H, K]."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS, width) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def mask_of(name: str, queries: int, keys: int) -> np.ndarray | None:
    """Bool [B or 1, 1 or H, 1 or N, M] of every form that the models use."""
    rng = np.random.default_rng(1)
    row, column = np.arange(queries)[:, None], np.arange(keys)[None]
    match name:
        case "none":
            return None
        case "banded":  # tubelets of 4 tokens see themselves and two before
            behind = row // 4 - column // 4
            return ((behind >= 0) & (behind < 3) | (column == 0))[None, None]
        case "areas":
            return (row * 5 // queries == column * 5 // keys)[None, None]
        case "padding":
            return (column < np.asarray([[keys], [max(1, keys // 3)]])).reshape(BATCH, 1, 1, keys)
        case "heads":
            return (rng.random((1, HEADS, queries, keys)) < 0.5) | (column == 0)
        case "blind":  # some queries of some heads, and one whole head, see nothing
            mask = rng.random((BATCH, HEADS, queries, keys)) < 0.5
            mask[0, 1, queries // 2] = False
            mask[1, 2] = False
            return mask
    raise AssertionError(name)


def _weights(q: np.ndarray, k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    scores = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if mask is not None:
        weights = weights * mask
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None) -> np.ndarray:
    """Attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    return np.einsum("bhnm,bmhk->bnhk", _weights(q, k, mask), v)


def reference_gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its gradients with respect to q, k and v, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    weights = _weights(q, k, mask)
    upstream = np.einsum("bnhk,bmhk->bhnm", g, v)
    scores = weights * (upstream - (upstream * weights).sum(-1, keepdims=True))
    scores /= np.sqrt(q.shape[-1])
    return (
        np.einsum("bhnm,bmhk->bnhk", scores, k),
        np.einsum("bhnm,bnhk->bmhk", scores, q),
        np.einsum("bhnm,bnhk->bmhk", weights, g),
    )
