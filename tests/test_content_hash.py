"""The content hash of checkpoints, against one that adds up whole numbers in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import DTYPES, random_array
from numpy.typing import NDArray

from jvjepa.errors import InputError
from jvjepa.train.checkpoint import content_hash, hashes


def words(x: NDArray[np.generic]) -> list[int]:
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    return [int(word) for word in np.atleast_1d(x).reshape(-1).view(kind)]


def reference_hash(x: NDArray[np.generic]) -> str:
    """The same in whole numbers of Python, element by element."""

    def mix(n: int) -> int:
        n = ((n ^ n >> 16) * 0x85EBCA6B) % 2**32
        n = ((n ^ n >> 13) * 0xC2B2AE35) % 2**32
        return n ^ n >> 16

    sums = [0, 0]
    for index, word in zip(np.ndindex(x.shape), words(x), strict=True):
        for i, place in enumerate((0x9E3779B9, 0xC2B2AE3D)):
            for n in index:
                place = mix(place ^ n)
            sums[i] = (sums[i] + mix(word ^ place)) % 2**32
    return f"{sums[0]:08x}{sums[1]:08x}"


def hash_of(x: NDArray[np.generic]) -> str:
    return hashes({"x": jnp.asarray(x)})["x"]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_is_the_reference(dtype: str, shape: tuple[int, ...]) -> None:
    x = random_array(dtype, shape)
    assert hash_of(x) == reference_hash(x)


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "bool"])
def test_hash_tells_every_change_of_an_element(dtype: str) -> None:
    x = random_array(dtype, (4, 3), seed=1)
    unsigned = x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    bits = [1] if dtype == "bool" else [1 << n for n in range(8 * x.dtype.itemsize)]
    right = hash_of(x)
    for i in range(x.size):
        for bit in bits:
            changed = unsigned.copy()
            changed.reshape(-1)[i] ^= bit
            found = hash_of(changed.view(x.dtype))
            assert found[:8] != right[:8]
            assert found[8:] != right[8:]


def test_each_half_of_the_hash_tells_a_changed_element() -> None:
    """A bijection for each place: 2^16 values of an element give as many sums, in either half."""
    values = jnp.arange(2**16, dtype=jnp.uint16)
    both = jax.jit(jax.vmap(lambda v: content_hash(jnp.stack([jnp.uint16(7), v, jnp.uint16(9)]))))
    for half in both(values):
        assert len(np.unique(half)) == 2**16


def test_hash_tells_order_zeros_and_shapes() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    others = [x[[1, 0, 2, 3]], x[::-1], np.array([-0.0, 1, 2, 3], np.float32), x[:3]]
    others += [x.reshape(2, 2), x.reshape(4, 1), np.append(x, np.float32(0))]
    digests = [hash_of(y) for y in (x, *others)]
    assert len(set(digests)) == len(digests)
    nan = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert len({hash_of(y) for y in nan}) == 3


@pytest.mark.parametrize("seed", range(3))
def test_hash_tells_swaps_of_similar_arrays(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 4, (6, 8)).astype(np.int32)  # few values, near each other
    seen = {x.tobytes(): hash_of(x)}
    for _ in range(50):
        i, j = draw.integers(0, x.size, 2)
        x.reshape(-1)[[i, j]] = x.reshape(-1)[[j, i]]
        assert seen.setdefault(x.tobytes(), hash_of(x)) == hash_of(x)
    assert len(set(seen.values())) == len(seen)


def test_hash_of_long_arrays() -> None:
    many = jax.ShapeDtypeStruct((2**20, 2**20), jnp.uint8)  # 2^40 elements
    assert [x.shape for x in jax.eval_shape(content_hash, many)] == [(), ()]
    with pytest.raises(InputError, match="an axis must be below 2"):
        jax.eval_shape(content_hash, jax.ShapeDtypeStruct((2**32,), jnp.uint8))
