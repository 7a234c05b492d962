"""The machine's own rate of matrix products, to compare training with."""

import statistics
import time

import jax
import jax.numpy as jnp

from jvjepa.typing import Array, DType

_REPEATS = 3


def matmul_rate(dtype: DType) -> float:
    """Measures how fast one device multiplies two large square matrices; takes about a second.

    Args:
        dtype: of the matrices.

    Returns:
        Floating-point operations per second; a multiplication and its addition are two.
    """
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    jax.block_until_ready(_multiply(x, x))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(_multiply(x, x))
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


@jax.jit
def _multiply(x: Array, y: Array) -> Array:
    return x @ y
