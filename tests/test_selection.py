from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compiled, random_video, relative_error, tiny_model

from jvjepa.errors import InputError
from jvjepa.masks import VIDEO_MASKS, sample
from jvjepa.selection import check_ids, gather


def test_gather_picks_and_its_gradient_scatters() -> None:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(3, 11, 4)), jnp.float32)
    ids = np.stack([rng.permutation(11)[:5] for _ in range(3)])
    expected = np.stack([np.asarray(row)[i] for row, i in zip(tokens, ids, strict=True)])
    for dtype in (np.int32, np.int64, np.uint8):
        np.testing.assert_array_equal(gather(tokens, ids.astype(dtype)), expected)
        np.testing.assert_array_equal(jax.jit(gather)(tokens, ids.astype(dtype)), expected)
    gradient = jax.grad(lambda x: jnp.sum(gather(x, jnp.asarray(ids))))(tokens)
    picked = np.zeros((3, 11, 4))
    np.put_along_axis(picked, ids[..., None], 1.0, axis=1)
    np.testing.assert_array_equal(gradient, picked)


def test_gather_takes_what_sampled_masks_hold() -> None:
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(3, 105, 2)), jnp.float32)
    drawn = sample(
        jax.random.key(0), VIDEO_MASKS[0], (3, 5, 7), 3, num_context=105, num_targets=105
    )
    for ids, valid in (drawn[:2], drawn[2:]):
        picked = gather(tokens, ids, valid)
        np.testing.assert_array_equal(picked, np.asarray(tokens)[np.arange(3)[:, None], ids])
        with pytest.raises(InputError, match=r"ids of clip 0 holds id \d+ twice"):
            gather(tokens, ids)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 2, 2)])
def test_gather_refuses_tokens_of_another_rank(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"tokens are float32 .*; they must be float \[B, N, D\]"):
        gather(jnp.zeros(shape), jnp.zeros((3, 1), jnp.int32))
    with pytest.raises(InputError, match="tokens are int32"):
        gather(jnp.zeros((3, 8, 2), jnp.int32), jnp.zeros((3, 1), jnp.int32))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0, 1]), r"keep is int64 \[2\]; it must be int \[2, M\]"),
        (np.array([[0, 1]]), r"int64 \[1, 2\]; it must be int \[2, M\]"),
        (np.array([[0.0], [1.0]]), "keep is float64"),
        (np.array([[0, 5], [1, 2]]), "ids from 0 to 5; this clip has tokens 0 to 4"),
        (np.array([[0, 1], [-1, 2]]), "ids from -1 to 2"),
        (np.array([[0, 1], [3, 3]]), "keep of clip 1 holds id 3 twice"),
        (np.array([[4, 3, 4], [0, 1, 2]]), "keep of clip 0 holds id 4 twice"),
        (np.array([[False], [True]]), "keep is bool"),
        (np.zeros((2, 0), np.int32), r"keep is \[2, 0\]; a clip must have one id or more"),
        ([[0, 1], [1, 2]], r"keep is a list; it must be an array, int \[2, M\]"),
    ],
)
def test_ids_that_cannot_be_right(ids: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gather(jnp.zeros((2, 5, 3)), ids, name="keep")


def test_padding_may_repeat_an_id() -> None:
    ids = np.array([[0, 1, 1], [3, 2, 3]])
    valid = np.array([[True, True, False], [True, True, False]])
    check_ids("keep", ids, 2, 5, valid)
    with pytest.raises(InputError, match="keep of clip 1 holds id 3 twice"):
        check_ids("keep", ids, 2, 5, np.array([[True, True, False], [True, True, True]]))
    for wrong in (valid[:, :2], valid.astype(np.int32)):
        with pytest.raises(InputError, match=r"valid is .*; it must be bool \[2, 3\], as keep"):
            check_ids("keep", ids, 2, 5, wrong)


@pytest.mark.parametrize("bad", [-1, -5, 5, 900])
def test_traced_ids_outside_give_nan_and_are_not_clamped(bad: int) -> None:
    ids = jnp.array([[0, bad]])
    found = jax.jit(gather)(jnp.ones((1, 5, 3)), ids)
    assert np.isfinite(found[0, 0]).all()
    assert np.isnan(found[0, 1]).all()


def test_padding_changes_no_token_of_the_encoder(compilations: Callable[[], int]) -> None:
    encoder, params = tiny_model()
    video = random_video(2, 4, 48, 32)
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(12, dtype=np.int32), (2, 1)), axis=1)[:, :8]
    apply = jax.jit(lambda ids, valid: encoder.apply({"params": params}, video, ids, valid))
    for counts in ((5, 8), (3, 1)):
        valid = np.arange(8) < np.array(counts)[:, None]
        padded = apply(ids, valid)
        for b, count in enumerate(counts):
            alone = compiled(encoder, params, video[b : b + 1], ids[b : b + 1, :count])
            assert relative_error(padded[b : b + 1, :count], alone) <= 1e-5
    before = compilations()
    apply(ids[:, ::-1].copy(), valid)
    assert compilations() == before


def test_valid_needs_keep() -> None:
    encoder, params = tiny_model()
    with pytest.raises(InputError, match="valid is given without keep"):
        encoder.apply(
            {"params": params}, random_video(1, 2, 32, 32), None, np.ones((1, 4), np.bool_)
        )


def test_padding_and_a_window_together() -> None:
    encoder, params = tiny_model()
    video = random_video(1, 6, 32, 32)
    ids = np.arange(12, dtype=np.int32)[None]
    valid = ids < 9
    padded = compiled(encoder, params, video, ids, valid, window=2)
    alone = compiled(encoder, params, video, ids[:, :9], window=2)
    assert relative_error(padded[:, :9], alone) <= 1e-5
