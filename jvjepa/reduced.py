"""Tokens of which each stands for several: merging them, dropping them, and attending to them.

All shapes are static: how many tokens go is a number that the caller gives, which ones is found
when the program runs. Tokens that stay keep their order. A token knows how many of the clip's
tokens it stands for, where it is, and the clip knows where each of its tokens went:

    sizes[m] = how many n have source[n] = m          whatever was merged or dropped, in any order
    positions[m] = mean of the positions of these n   where nothing but merging was done

Everything is computed in float32, and nothing depends on the order in which a device adds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.attention import Backend, attention
from jvjepa.errors import InputError
from jvjepa.typing import Array

_EPSILON = 1e-6  # added to norms and sums of weights
_ROWS = 256  # tokens at most whose similarities to all others are there at a time
_CUDNN_CHANNELS = 8  # it takes heads of a multiple of these
_EXACT = jax.lax.Precision.HIGHEST


class Reduced(NamedTuple):
    """Tokens of which each stands for several.

    Args:
        tokens: [B, M, D].
        sizes: float32 [B, M], of how many of the clip's N tokens each stands for; they add up to N.
        positions: float32 [B, M, 3] of tubelet, row, column, as `jvjepa.rope.tables` takes them.
        source: int32 [B, N], the place in `tokens` that each of the clip's tokens went to.
    """

    tokens: Array
    sizes: Array
    positions: Array
    source: Array


def whole(tokens: Array, positions: Array) -> Reduced:
    """Starts from all tokens of a clip, each of which stands for itself.

    Args:
        tokens: float [B, N, D].
        positions: float32 [B or 1, N, 3], from `jvjepa.rope.positions`.

    Returns:
        The tokens with size 1.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions, jnp.float32)
    if tokens.ndim != 3 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.floating):
        found = f"{tokens.dtype} {list(tokens.shape)}"
        raise InputError(f"tokens are {found}; they must be float [B, N, D]")
    batch, number, _ = tokens.shape
    if positions.shape not in ((1, number, 3), (batch, number, 3)):
        right = f"[{batch} or 1, {number}, 3]"
        raise InputError(f"positions have shape {list(positions.shape)}; they must be {right}")
    return Reduced(
        tokens=tokens,
        sizes=jnp.ones((batch, number), jnp.float32),
        positions=jnp.broadcast_to(positions, (batch, number, 3)),
        source=jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32)[None], (batch, number)),
    )


def merge(state: Reduced, metric: Array, remove: int) -> Reduced:
    """Merges the most similar tokens: bipartite soft matching.

    Every second token looks for its most similar one among the others, and the `remove` of them
    that found the most similar ones go into these. A merged token, and its position, is the mean of
    all that it stands for. Equally similar ones are taken in their order.

    As in ToMe (arXiv:2210.09461, and `bipartite_soft_matching` of its code) without class token,
    but that tokens stay in the order of the clip.

    Args:
        state: M tokens.
        metric: float [B, M, C]; similar is what has a large cosine here. The paper takes the keys,
            averaged over heads.
        remove: 1 to M // 2.

    Returns:
        M - remove tokens.

    Raises:
        InputError: `metric` does not fit, or `remove` is impossible.
    """
    batch, tokens, _ = state.tokens.shape
    if metric.ndim != 3 or metric.shape[:2] != (batch, tokens):
        right = f"[{batch}, {tokens}, C]"
        raise InputError(f"metric has shape {list(metric.shape)}; it must be {right}")
    _check_number("remove", remove, tokens // 2)
    unit = _unit(metric)

    def best(unit: Array) -> tuple[Array, Array]:
        """The largest cosine of each first token to a second one, and which that is."""

        def of_one(token: Array) -> tuple[Array, Array]:
            similarity = jnp.matmul(unit[1::2], token, precision=_EXACT)
            return jnp.max(similarity), jnp.argmax(similarity)

        return _by_rows(of_one, unit[::2])

    similarity, match = jax.vmap(best)(unit)  # [B, M / 2]
    chosen = jnp.argsort(-similarity, axis=1)[:, :remove]
    gone, target = 2 * chosen, 2 * _take(match, chosen) + 1  # [B, remove]

    # A product with ones and zeros is as fast as scattered additions, which no GPU does in order.
    spread = (target[:, None, :] == jnp.arange(tokens)[None, :, None]).astype(jnp.float32)
    some = [_take(x, gone) for x in (state.tokens.astype(jnp.float32), state.positions)]
    weights = _take(state.sizes, gone)[..., None]
    brought = jnp.concatenate([*(x * weights for x in some), weights], axis=-1)
    gain = jnp.matmul(spread, brought, precision=_EXACT)  # [B, M, D + 4]
    total = state.sizes[..., None] + gain[..., -1:]
    share = state.sizes[..., None] / total  # exactly 1 where nothing came

    def mean(own: Array, gain: Array) -> Array:
        return (own.astype(jnp.float32) * share + gain / total).astype(own.dtype)

    merged = state._replace(
        tokens=mean(state.tokens, gain[..., :-4]),
        positions=mean(state.positions, gain[..., -4:-1]),
    )
    return _leave_out(merged, gone, target)


def static_scores(tokens: Array, grid: tuple[int, int, int], segment: int) -> Array:
    """How much each patch of the grid stays the same over time.

    The mean cosine of all pairs of tubelets of a segment, as in PruneVid (arXiv:2412.16117,
    equation 3; there a patch is static from 0.8 on). Segments are of equal length here, and found
    by clustering frames there.

    Args:
        tokens: float [B, N, D], all of the clip.
        grid: (t, h, w).
        segment: tubelets that are compared, 2 to t, a divisor of t.

    Returns:
        float32 [B, t / segment, h·w], -1 to 1.

    Raises:
        InputError: the arguments do not fit together.
    """
    unit = _unit(_by_segments(tokens, grid, segment))
    total = jnp.sum(jnp.square(jnp.sum(unit, axis=2)), axis=-1)
    own = jnp.sum(jnp.square(unit), axis=(2, -1))
    return (total - own) / (segment * (segment - 1))


def merge_static(state: Reduced, grid: tuple[int, int, int], columns: int, segment: int) -> Reduced:
    """Merges patches over time where they stay the same: PruneVid's first step, with a budget.

    A column is a patch of the grid over the tubelets of a segment. The `columns` with the highest
    `static_scores` become one token each, their mean, in the place of the first of them; all other
    tokens stay. The paper merges those above a threshold, which is a different number in every
    clip, and then goes on to merge in space.

    Args:
        state: all tokens of a clip, from `whole`.
        grid: (t, h, w), of N tokens.
        columns: 1 to t / segment · h · w.
        segment: tubelets of a column, 2 to t, a divisor of t.

    Returns:
        N - columns · (segment - 1) tokens.

    Raises:
        InputError: tokens are missing already, or a number is impossible.
    """
    batch, tokens, _ = state.tokens.shape
    if tokens != state.source.shape[1]:
        raise InputError(
            f"{tokens} of {state.source.shape[1]} tokens are left; static patches can only be "
            "merged before anything else"
        )
    scores = static_scores(state.tokens, grid, segment)  # [B, t / segment, S]
    _check_number("columns", columns, scores[0].size)
    patches = scores.shape[2]
    column = jnp.argsort(-scores.reshape(batch, -1), axis=1)[:, :columns]
    first = column // patches * (segment * patches) + column % patches  # [B, columns]
    gone = first[:, :, None] + patches * jnp.arange(1, segment)[None, None]
    target = jnp.broadcast_to(first[:, :, None], gone.shape)
    clips = jnp.arange(batch)[:, None]

    def average(x: Array) -> Array:
        mean = jnp.mean(_by_segments(x, grid, segment).astype(jnp.float32), axis=2)
        mean = _take(mean.reshape(batch, -1, x.shape[-1]), column)
        return x.at[clips, first].set(mean.astype(x.dtype))

    merged = state._replace(tokens=average(state.tokens), positions=average(state.positions))
    return _leave_out(merged, gone.reshape(batch, -1), target.reshape(batch, -1))


def novelty(tokens: Array, neighbours: int = 1, *, causal: bool = True) -> Array:
    """How badly each token is predicted from those that are similar to it.

    The mean squared error of a token against the mean of its nearest neighbours by cosine, weighted
    with their cosines, negative ones with 0.

    Args:
        tokens: float [B, M, D].
        neighbours: 1 to M - 1.
        causal: predict a token from those before it, so that of tokens that are copies of each
            other the first one is new; nothing predicts the first of all, whose novelty is
            infinite. False predicts from all others, as the library saccadic does.

    Returns:
        float32 [B, M], 0 or more.

    Raises:
        InputError: `neighbours` is impossible.
    """
    _check_number("neighbours", neighbours, tokens.shape[1] - 1)

    def of_clip(x: Array, unit: Array) -> Array:
        places = jnp.arange(len(x))

        def of_one(i: Array) -> Array:
            others = places < i if causal else places != i
            similarity = jnp.matmul(unit, unit[i], precision=_EXACT)
            cosines, near = jax.lax.top_k(jnp.where(others, similarity, -jnp.inf), neighbours)
            weights = jnp.maximum(cosines, 0.0)
            weights = weights / (jnp.sum(weights) + _EPSILON)
            predicted = jnp.matmul(weights, x[near], precision=_EXACT)
            return jnp.mean(jnp.square(x[i] - predicted))

        errors = _by_rows(of_one, places)
        return errors.at[0].set(jnp.inf) if causal else errors

    return jax.vmap(of_clip)(tokens.astype(jnp.float32), _unit(tokens))


def drop_predictable(
    state: Reduced, remove: int, neighbours: int = 1, *, causal: bool = True
) -> Reduced:
    """Drops the tokens that the others predict best; see `novelty`.

    What stays is untouched but for its size: the most similar one that stays stands for the dropped
    one too.

    Args:
        state: M tokens.
        remove: 1 to M - 1.
        neighbours: 1 to M - 1, those that predict a token.
        causal: predict from tokens before it. False predicts from all others; of a patch that does
            not change over time all copies may go then, since each predicts the other.

    Returns:
        M - remove tokens.

    Raises:
        InputError: a number is impossible.
    """
    _check_number("remove", remove, state.tokens.shape[1] - 1)
    scores = novelty(state.tokens, neighbours, causal=causal)
    gone = jnp.argsort(scores, axis=1)[:, :remove]
    stays = jnp.ones(scores.shape, bool).at[jnp.arange(len(gone))[:, None], gone].set(False)

    def nearest(unit: Array, stays: Array, gone: Array) -> Array:
        def of_one(i: Array) -> Array:
            similarity = jnp.matmul(unit, unit[i], precision=_EXACT)
            return jnp.argmax(jnp.where(stays, similarity, -jnp.inf))

        return _by_rows(of_one, gone)

    return _leave_out(state, gone, jax.vmap(nearest)(_unit(state.tokens), stays, gone))


def unmerge(tokens: Array, source: Array) -> Array:
    """Gives every token of the clip the one that stands for it.

    Args:
        tokens: [B, M, ...], reduced tokens, or anything else that there is for each.
        source: int [B, N], where the clip's tokens went, each within [0, M). Bad ones raise; where
            they are traced, floating-point tokens become NaN there.

    Returns:
        [B, N, ...], in the order of the full grid: t, then rows, then columns.

    Raises:
        InputError: the arguments do not fit together.
    """
    tokens, source = jnp.asarray(tokens), source if hasattr(source, "dtype") else np.asarray(source)
    if (
        tokens.ndim < 2
        or source.ndim != 2
        or source.shape[0] != tokens.shape[0]
        or not jnp.issubdtype(source.dtype, jnp.integer)
    ):
        raise InputError(
            f"tokens have shape {list(tokens.shape)} and source is {source.dtype} "
            f"{list(source.shape)}; they must be [B, M, ...] and int [B, N]"
        )
    if not isinstance(source, jax.core.Tracer):
        values = np.asarray(source)
        if values.size and (values.min() < 0 or values.max() >= tokens.shape[1]):
            raise InputError(
                f"source holds {values.min()} to {values.max()}; "
                f"there are tokens 0 to {tokens.shape[1] - 1}"
            )
    source = jnp.asarray(source, jnp.int32)
    return _take(tokens, jnp.where(source < 0, tokens.shape[1], source))


def pool(tokens: Array, sizes: Array) -> Array:
    """The mean of what the tokens stand for: that of the full grid, `unmerge`d.

    Args:
        tokens: [B, M, D].
        sizes: float32 [B, M].

    Returns:
        float32 [B, D].
    """
    weights = (sizes / jnp.sum(sizes, axis=1, keepdims=True))[..., None]
    return jnp.sum(tokens.astype(jnp.float32) * weights, axis=1)


def proportional_attention(
    q: Array, k: Array, v: Array, sizes: Array, backend: Backend = "auto"
) -> Array:
    """Softmax(q kᵀ / √K + log sizes) v: a key that stands for several counts as often.

    That is attention over keys and values each of which is there `sizes` times (ToMe, arXiv:
    2210.09461, "proportional attention"). Every backend can do it as it is: the logarithms are
    channels of the keys, where the queries hold 1.

    Args:
        q: [B, N, H, K].
        k: [B, M, H, K], of the dtype of `q`.
        v: as `k`.
        sizes: float32 [B, M], above 0.
        backend: see `jvjepa.attention.resolve`.

    Returns:
        [B, N, H, K] in the dtype of `q`.

    Raises:
        InputError: shapes or dtypes that do not fit together.
        ConfigError: as `jvjepa.attention.attention`.
    """
    if k.ndim != 4 or sizes.shape != k.shape[:2]:
        raise InputError(
            f"k has shape {list(k.shape)} and sizes {list(sizes.shape)}; they must be "
            "[B, M, H, K] and [B, M]"
        )
    width = q.shape[-1]
    padded = width + 2
    if backend == "cudnn":
        padded = -(-padded // _CUDNN_CHANNELS) * _CUDNN_CHANNELS
    bias = jnp.log(sizes) * padded**0.5
    # Two channels, of which each is exact in bfloat16, and in the short products of GPUs and TPUs.
    coarse = jax.lax.reduce_precision(bias, exponent_bits=8, mantissa_bits=7)
    channels = jnp.stack([coarse, bias - coarse], axis=-1)[:, :, None]  # [B, M, 1, 2]

    def widen(x: Array, channels: Array) -> Array:
        channels = jnp.broadcast_to(channels.astype(x.dtype), (*x.shape[:-1], 2))
        rest = jnp.zeros((*x.shape[:-1], padded - width - 2), x.dtype)
        return jnp.concatenate([x, channels, rest], axis=-1)

    ones, zeros = jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2))
    scaled = (q.astype(jnp.float32) * (padded / width) ** 0.5).astype(q.dtype)
    out = attention(widen(scaled, ones), widen(k, channels), widen(v, zeros), backend=backend)
    return out[..., :width]


def _leave_out(state: Reduced, gone: Array, target: Array) -> Reduced:
    """Leaves tokens out, and books where they went.

    Args:
        state: M tokens, of which those that stay hold already what the others bring.
        gone: int [B, n], the places of those that go.
        target: int [B, n], the places of those that they go into.
    """
    batch, tokens = state.sizes.shape
    clips, left = jnp.arange(batch)[:, None], tokens - gone.shape[1]
    stays = jnp.ones((batch, tokens), bool).at[clips, gone].set(False)
    kept = jnp.sort(jnp.where(stays, jnp.arange(tokens)[None], tokens), axis=1)[:, :left]
    place = jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1
    place = place.at[clips, gone].set(_take(place, target))  # of all old ones among the new ones
    sizes = jnp.zeros((batch, left), jnp.float32).at[clips, place].add(state.sizes)  # exact
    return Reduced(
        tokens=_take(state.tokens, kept),
        sizes=sizes,
        positions=_take(state.positions, kept),
        source=_take(place, state.source),
    )


def _unit(x: Array) -> Array:
    """Float32 vectors of length 1 on the last axis; those of zeros stay zero."""
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)


def _by_segments(x: Array, grid: tuple[int, int, int], segment: int) -> Array:
    """[B, N, D] to [B, t / segment, segment, h·w, D]."""
    tubelets, rows, columns = grid
    if x.ndim != 3 or x.shape[1] != tubelets * rows * columns:
        raise InputError(f"grid = {grid} does not have the tokens of shape {list(x.shape)}")
    if not 2 <= segment <= tubelets or tubelets % segment:
        raise InputError(
            f"segment = {segment}; it must be at least 2 and divide the {tubelets} tubelets"
        )
    return x.reshape(len(x), tubelets // segment, segment, rows * columns, x.shape[-1])


def _take(x: Array, places: Array) -> Array:
    """Takes x [B, n, ...] at places [B, m]: [B, m, ...]."""
    places = places.reshape(*places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="fill")


def _by_rows(function: Callable[[Array], Array], rows: Array) -> Array:
    """Maps over the first axis, some rows at a time."""
    return jax.lax.map(function, rows, batch_size=min(_ROWS, len(rows)))


def _check_number(name: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"{name} = {value!r}; it must be a whole number, 1 to {most}")
