import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative_error

from jvjepa.attention import attention, resolve
from jvjepa.encoder import banded_causal_mask
from jvjepa.errors import ConfigError, InputError

BACKENDS = ["xla", "chunked"]  # cudnn needs a GPU


def _inputs(queries: int, keys: int, width: int = 24, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, n, 3, width) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if mask is not None:
        weights = weights * mask
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhk->bnhk", weights / np.where(total == 0, 1, total), v)


def _masks(queries: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    dense = rng.random((2, 3, queries, keys)) < 0.5
    dense[0, 1, 2] = False  # a query that sees nothing
    per_key = rng.random((2, 1, 1, keys)) < 0.5
    nothing = per_key.copy()
    nothing[1] = False
    return {"dense": dense, "shared": dense[:1, :1], "keys": per_key, "nothing": nothing}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(5, 5), (256, 300), (300, 7), (513, 513)])
def test_every_length(backend: str, sizes: tuple[int, int]) -> None:
    q, k, v = _inputs(*sizes)
    out = attention(q, k, v, backend=backend)
    assert relative_error(out, _reference(q, k, v, None)) <= 1e-6 * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "shared", "keys", "nothing"])
@pytest.mark.parametrize("sizes", [(6, 9), (300, 40)])
def test_every_mask(backend: str, name: str, sizes: tuple[int, int]) -> None:
    q, k, v = _inputs(*sizes)
    mask = _masks(*sizes)[name]
    out = attention(q, k, v, mask=jnp.asarray(mask), backend=backend)
    assert relative_error(out, _reference(q, k, v, mask)) <= 1e-6 * 2
    if name == "dense":
        assert (out[0, 2, 1] == 0).all()
    if name == "nothing":
        assert (out[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_do_not_touch_the_result(backend: str) -> None:
    q, k, v = _inputs(6, 9)
    mask = jnp.arange(9).reshape(1, 1, 1, 9) < 5
    out = attention(q, k, v, mask=mask, backend=backend)
    other = attention(q, k.at[:, 5:].set(50.0), v.at[:, 5:].set(-3.0), mask=mask, backend=backend)
    assert np.array_equal(out, other)


@pytest.mark.parametrize("name", [None, "dense", "keys", "nothing"])
def test_gradients_agree(name: str | None) -> None:
    q, k, v = _inputs(300, 40)
    mask = None if name is None else jnp.asarray(_masks(300, 40)[name])
    weight = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, backend: str) -> jax.Array:
        return jnp.sum(attention(q, k, v, mask=mask, backend=backend) * weight)

    chunked, xla = (
        jax.grad(loss, argnums=(0, 1, 2))(q, k, v, backend) for backend in ("chunked", "xla")
    )
    for a, b in zip(chunked, xla, strict=True):
        assert np.isfinite(a).all()
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_bfloat16(backend: str) -> None:
    q, k, v = _inputs(30, 40, dtype="bfloat16")
    out = attention(q, k, v, mask=jnp.asarray(_masks(30, 40)["keys"]), backend=backend)
    assert out.dtype == jnp.bfloat16
    # 8 bits of mantissa: half a unit in the last place is 2e-3
    assert relative_error(out, _reference(q, k, v, _masks(30, 40)["keys"])) <= 1e-2


def test_chunked_never_makes_the_whole_score_matrix() -> None:
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 32), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attention(q, k, v, backend="chunked"))
    memory = compiled.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4 / 2  # half of one head's scores


def test_the_pick_is_written_down() -> None:
    small = (1, 16, 256, 256)
    assert resolve("auto", small) == "chunked"  # these tests run on a CPU
    assert resolve("xla", small) == "xla"
    with pytest.raises(ConfigError, match="attention = 'flash'"):
        resolve("flash", small)


def test_banded_causal_mask() -> None:
    tubelets = jnp.asarray([[0, 0, 1, 2, 2]])
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]
    assert np.array_equal(banded_causal_mask(tubelets, 2)[0, 0], np.asarray(expected, bool))
    with pytest.raises(InputError, match="window = 0"):
        banded_causal_mask(tubelets, 0)
