"""Steps of token reduction, and attention to what they leave, against NumPy, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reductions
from models import relative_error

from jvjepa import reduced, rope
from jvjepa.attention import attention
from jvjepa.errors import InputError
from jvjepa.reduced import Reduced, pool, proportional_attention, static_scores, unmerge, whole
from jvjepa.typing import Array

# As programs, which compile faster than their operations one by one.
merge = jax.jit(reduced.merge, static_argnums=2)
merge_static = jax.jit(reduced.merge_static, static_argnums=(1, 2, 3))
novelty = jax.jit(reduced.novelty, static_argnums=1, static_argnames="causal")
drop_predictable = jax.jit(
    reduced.drop_predictable, static_argnums=(1, 2), static_argnames="causal"
)

MODULE = 1e-5
GRID = (4, 3, 5)
LAYOUT = rope.Layout(3, 5, 7.5, 3.75)


def random_tokens(seed: int = 0, *, batch: int = 3, grid: tuple[int, int, int] = GRID) -> Reduced:
    """Tokens that repeat over time, more or less."""
    rng = np.random.default_rng(seed)
    tubelets, patches = grid[0], grid[1] * grid[2]
    still = rng.normal(size=(batch, 1, patches, 24))
    noise = rng.normal(size=(batch, tubelets, patches, 24)) * rng.uniform(0.1, 2, (1, patches, 1))
    tokens = jnp.asarray((still + noise).reshape(batch, -1, 24), jnp.float32)
    layout = rope.Layout(*grid[1:], 7.5, 3.75)
    return whole(tokens, rope.positions(jnp.arange(tokens.shape[1])[None], layout))


def as_tokens(state: Reduced, clip: int) -> list[reductions.Token]:
    return reductions.tokens_of(state.tokens[clip], state.positions[clip])


# --- Steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [(30,), (17, 21, 11, 5)])
def test_merging_again_and_again_equals_numpy(removed: tuple[int, ...]) -> None:
    state = random_tokens()
    expected = [as_tokens(state, clip) for clip in range(3)]
    rng = np.random.default_rng(1)
    for remove in removed:
        metric = rng.normal(size=(3, state.tokens.shape[1], 10)).astype(np.float32)
        state = merge(state, metric, remove)
        expected = [reductions.merge(x, metric[i], remove) for i, x in enumerate(expected)]
    assert state.tokens.shape[1] == 60 - sum(removed)
    reductions.check_equal(state, expected)


@pytest.mark.parametrize(("columns", "segment"), [(1, 2), (30, 2), (11, 4), (15, 4)])
def test_merging_static_patches_equals_numpy(columns: int, segment: int) -> None:
    state = random_tokens()
    expected = [
        reductions.merge_static(as_tokens(state, clip), GRID, columns, segment) for clip in range(3)
    ]
    found = merge_static(state, GRID, columns, segment)
    assert found.tokens.shape[1] == 60 - columns * (segment - 1)
    reductions.check_equal(found, expected)


@pytest.mark.parametrize(("removed", "neighbours"), [((20, 25), 3), ((58,), 59)])
@pytest.mark.parametrize("causal", [True, False])
def test_dropping_equals_numpy(removed: tuple[int, ...], neighbours: int, causal: bool) -> None:
    state = random_tokens()
    expected = [as_tokens(state, clip) for clip in range(3)]
    scores = novelty(state.tokens, neighbours, causal=causal)
    for clip in range(3):
        values = np.stack([token.value for token in expected[clip]])
        correct = reductions.novelty(values, neighbours, causal)
        assert correct[0] == scores[clip, 0] or not causal
        assert relative_error(scores[clip, 1:], correct[1:]) <= MODULE
    for remove in removed:
        state = drop_predictable(state, remove, neighbours, causal=causal)
        expected = [reductions.drop_predictable(x, remove, neighbours, causal) for x in expected]
    reductions.check_equal(state, expected)


def test_more_tokens_than_are_compared_at_a_time() -> None:
    grid = (2, 13, 12)
    state = random_tokens(batch=1, grid=grid)
    merged = merge(state, state.tokens, 130)
    reductions.check_equal(merged, [reductions.merge(as_tokens(state, 0), state.tokens[0], 130)])
    dropped = drop_predictable(state, 270)
    reductions.check_equal(
        dropped, [reductions.drop_predictable(as_tokens(state, 0), 270, 1, True)]
    )


def test_what_is_not_merged_is_untouched_whatever_its_size() -> None:
    state = random_tokens()
    for seed in range(4):
        metric = np.random.default_rng(seed).normal(size=(*state.tokens.shape[:2], 6))
        before, state = state, merge(state, jnp.asarray(metric, jnp.float32), 10)
        # a token of which nothing came or went is there bit by bit
        for clip in range(3):
            kept = [
                m
                for m in range(before.tokens.shape[1])
                if before.sizes[clip, m]
                == state.sizes[clip, state.source[clip, before.source[clip].tolist().index(m)]]
            ]
            assert any(before.sizes[clip, m] > 1 for m in kept) or seed == 0
            rows = {row.tobytes() for row in np.asarray(state.tokens[clip])}
            assert all(np.asarray(before.tokens[clip, m]).tobytes() in rows for m in kept)


@pytest.mark.parametrize("seed", range(2))
def test_any_series_of_steps_keeps_the_books(seed: int) -> None:
    state = start = random_tokens(seed)
    rng = np.random.default_rng(seed)
    merged_only = True
    state = merge_static(state, GRID, int(rng.integers(1, 15)), 2)
    for _ in range(3):
        remove = int(rng.integers(1, 8))
        if rng.random() < 0.5:
            state = merge(state, state.tokens, remove)
        else:
            state, merged_only = drop_predictable(state, remove), False
        for clip in range(3):
            source = np.asarray(state.source[clip])
            counts = np.bincount(source, minlength=state.tokens.shape[1])
            assert state.sizes[clip].tolist() == counts.tolist()
            assert counts.min() >= 1
        mean = jnp.mean(unmerge(state.tokens, state.source), axis=1)
        assert relative_error(pool(state.tokens, state.sizes), mean) <= MODULE
        if merged_only:  # then nothing of the clip is lost, and neither is where it was
            mean = jnp.mean(start.tokens, axis=1)
            assert relative_error(pool(state.tokens, state.sizes), mean) <= MODULE
            for m in range(state.tokens.shape[1]):
                members = np.asarray(start.positions[0])[np.asarray(state.source[0]) == m]
                np.testing.assert_allclose(state.positions[0, m], members.mean(0), rtol=1e-5)


def still_tokens() -> Reduced:
    still = np.random.default_rng(0).normal(size=(1, 15, 8)).astype(np.float32)
    places = rope.positions(jnp.arange(60)[None], rope.Layout(3, 5))
    return whole(np.tile(still, (1, 4, 1)), places)


def test_what_stays_the_same_is_merged_without_loss() -> None:
    state = still_tokens()
    assert np.allclose(static_scores(state.tokens, GRID, 4), 1.0)
    found = merge_static(state, GRID, 7, 4)
    assert sorted(found.sizes[0].tolist()) == [1] * 32 + [4] * 7
    assert relative_error(unmerge(found.tokens, found.source), state.tokens) <= 1e-6
    assert (found.positions[0, :, 0][found.sizes[0] == 4] == 1.5).all()


def test_of_copies_the_first_stays_unless_they_predict_each_other() -> None:
    state = still_tokens()
    found = drop_predictable(state, 45)
    assert np.array_equal(found.tokens, state.tokens[:, :15])
    assert np.array_equal(found.sizes, np.full((1, 15), 4))
    assert np.array_equal(unmerge(found.tokens, found.source), state.tokens)
    # saccadic's way loses patches
    found = drop_predictable(state, 45, 1, causal=False)
    assert len(np.unique(found.tokens[0], axis=0)) < 15


def test_zeros_are_similar_to_nothing_and_do_no_harm() -> None:
    state = random_tokens(batch=1)
    state = state._replace(tokens=state.tokens.at[:, :9].set(0.0))
    for found in (
        merge(state, state.tokens, 9),
        merge_static(state, GRID, 5, 2),
        drop_predictable(state, 9),
    ):
        assert all(np.isfinite(leaf).all() for leaf in found)
        assert found.sizes.sum() == 60


def test_the_gradient_of_a_merge_spreads_over_what_was_merged() -> None:
    state = random_tokens()
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 40, 24)), jnp.float32)

    def loss(tokens: Array) -> tuple[Array, Reduced]:
        found = merge(state._replace(tokens=tokens), tokens, 20)
        return jnp.sum(found.tokens * weights), found

    gradient, found = jax.grad(loss, has_aux=True)(state.tokens)
    expected = unmerge(weights / found.sizes[..., None], found.source)
    assert relative_error(gradient, expected) <= MODULE


def test_bfloat16_tokens_stay_bfloat16_and_are_averaged_in_float32() -> None:
    state = random_tokens()
    half = state._replace(tokens=state.tokens.astype(jnp.bfloat16))
    wide = half._replace(tokens=half.tokens.astype(jnp.float32))
    for step in (
        lambda x: merge(x, state.tokens, 25),
        lambda x: merge_static(x, GRID, 9, 4),
        lambda x: drop_predictable(x, 25),
    ):
        found, expected = step(half), step(wide)
        assert found.tokens.dtype == jnp.bfloat16
        # Rounded once: half of bfloat16's last place, and what float32 may differ by beside a tie.
        once = 2.0**-8 * (1 + 1e-3)
        wanted = np.asarray(expected.tokens)
        np.testing.assert_allclose(np.asarray(found.tokens, np.float32), wanted, rtol=once, atol=0)
        assert np.array_equal(found.source, expected.source)


# --- Attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["xla", "chunked"])
@pytest.mark.parametrize("width", [6, 24, 64, 80])
def test_attention_counts_a_key_as_often_as_it_stands_for(backend: str, width: int) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 7, 3, width)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 9, 3, width)).astype(np.float32)
    sizes = rng.integers(1, 500, size=(2, 9))
    out = proportional_attention(
        *map(jnp.asarray, (q, k, v)), jnp.asarray(sizes, jnp.float32), backend
    )
    for clip in range(2):
        copies = np.repeat(np.arange(9), sizes[clip])
        keys, values = (x[clip].astype(np.float64)[copies] for x in (k, v))
        scores = np.einsum("nhk,mhk->hnm", q[clip].astype(np.float64), keys) / np.sqrt(width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("hnm,mhk->nhk", weights, values)
        assert relative_error(out[clip], expected) <= 2e-6


def test_attention_with_sizes_is_as_good_in_bfloat16_as_without() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 64, 2, 64)).astype(jnp.bfloat16) for _ in range(3))
    sizes = rng.integers(1, 40, size=64)
    exact = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    as_float32 = jnp.asarray(sizes[None], jnp.float32)
    found = proportional_attention(*map(jnp.asarray, (q, k, v)), as_float32)
    assert found.dtype == jnp.bfloat16
    error = relative_error(found, proportional_attention(*exact, as_float32))
    copies = np.repeat(np.arange(64), sizes)
    plain = attention(*(jnp.asarray(x) for x in (q, k[:, copies], v[:, copies])))
    expected = attention(exact[0], exact[1][:, copies], exact[2][:, copies])
    assert error <= 2 * relative_error(plain, expected)


def test_sizes_of_one_change_nothing() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 20, 2, 24)), jnp.float32) for _ in range(3))
    found = proportional_attention(q, k, v, jnp.ones((2, 20)))
    assert relative_error(found, attention(q, k, v)) <= 1e-6
    with pytest.raises(InputError, match=r"sizes \[2, 19\]; they must be \[B, M, H, K\]"):
        proportional_attention(q, k, v, jnp.ones((2, 19)))


def test_wrong_arguments_of_steps_are_refused() -> None:
    state = random_tokens()
    cases = [
        (
            lambda: whole(state.tokens[0], state.positions),
            r"float32 \[60, 24\]; they must be float",
        ),
        (
            lambda: whole(state.tokens, state.positions[:2]),
            r"\[2, 60, 3\]; they must be \[3 or 1, 60",
        ),
        (lambda: merge(state, state.tokens[:, 1:], 3), r"metric has shape \[3, 59, 24\]"),
        (lambda: merge(state, state.tokens, 31), "remove = 31; it must be a whole number, 1 to 30"),
        (lambda: merge_static(state, (4, 3, 4), 1, 2), r"grid = \(4, 3, 4\) does not have"),
        (lambda: merge_static(state, GRID, 31, 2), "columns = 31; .* 1 to 30"),
        (lambda: merge_static(state, GRID, 1, 3), "segment = 3"),
        (
            lambda: merge_static(merge(state, state.tokens, 1), GRID, 1, 2),
            "59 of 60 tokens are left",
        ),
        (lambda: drop_predictable(state, 0), "remove = 0"),
        (lambda: novelty(state.tokens, 60), "neighbours = 60; .* 1 to 59"),
        (lambda: unmerge(state.tokens, state.source[:2]), r"int32 \[2, 60\]; they must be"),
        (
            lambda: unmerge(state.tokens[:, :9], state.source),
            "source holds 0 to 59; there are tokens",
        ),
    ]
    for case, message in cases:
        with pytest.raises(InputError, match=message):
            case()
    bad = jax.jit(unmerge)(state.tokens, state.source.at[0, 0].set(-1).at[1, 1].set(60))
    assert np.isnan(bad).all(-1).sum(1).tolist() == [1, 1, 0]
