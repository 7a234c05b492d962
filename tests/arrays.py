"""Random arrays of every dtype that a checkpoint takes."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES = "bool int8 uint8 int16 uint16 float16 bfloat16 int32 uint32 float32".split()


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.generic]:
    """Any bits at all: numbers, infinities and NaNs."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    draw = np.random.default_rng(seed)
    if kind == np.bool_:
        return draw.integers(0, 2, shape).astype(np.bool_)
    count = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(draw.bytes(count), kind).reshape(shape).copy()
