"""Names for shapes and types that the whole library uses.

Dimension letters, in docstrings and trailing comments:

    B batch · T frames · H, W pixels · C = 3 channels
    t, h, w token grid (tubelets, rows, columns) · N = t·h·w tokens · S = h·w tokens of one tubelet
    D width · L layers · H heads (in attention shapes) · K head width · M keys
    W window in tubelets (in cache shapes)

Video is channels-last `[B, T, H, W, 3]`, float, ImageNet-normalised; tokens run over t, then rows,
then columns.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.typing

Array = jax.Array
DType = jax.typing.DTypeLike
Params = Mapping[str, Any]  # nested dictionaries with arrays as leaves
