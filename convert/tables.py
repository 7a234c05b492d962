"""One engine for all families of checkpoints: a table of names and layouts becomes a list of work.

A family is a table of `Row`; `entries` makes of it and of a configuration the list of every tensor
that a checkpoint of that architecture holds, and of its place in ours.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.parameters import parameter_shapes


class Transform(NamedTuple):
    """How one tensor (of one layer) is rearranged; no value changes.

    Args:
        to_ours: from their layout to ours.
        to_theirs: the way back; the configuration gives the sizes that ours has merged.
    """

    to_ours: Callable[[NDArray[Any]], NDArray[Any]]
    to_theirs: Callable[[NDArray[Any], EncoderConfig | None], NDArray[Any]]


class Row(NamedTuple):
    """One line of a table.

    Args:
        theirs: the name in their checkpoint; `{i}` stands for the layer.
        ours: our flat name, of the whole stack where `theirs` has `{i}`.
        transform: how one layer's tensor is rearranged.
        share: (which, of how many): their tensor holds several of ours one after the other along
            its first axis, as fused projections do; (0, 1) is all of it.
    """

    theirs: str
    ours: str
    transform: Transform
    share: tuple[int, int] = (0, 1)


def _conv3d(is_image: bool) -> Transform:  # [D, 3, t, p, p] <-> [t·p·p·3, D]
    def to_theirs(x: NDArray[Any], config: EncoderConfig) -> NDArray[Any]:
        frames, side = (1 if is_image else config.tubelet_size), config.patch_size
        return x.reshape(frames, side, side, 3, -1).transpose(4, 3, 0, 1, 2)

    return Transform(lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]), to_theirs)


COPY = Transform(lambda x: x, lambda x, config: x)
LINEAR = Transform(lambda x: x.T, lambda x, config: x.T)  # [out, in] <-> [in, out]
CONV3D, IMAGE_CONV3D = _conv3d(is_image=False), _conv3d(is_image=True)
VECTOR = Transform(lambda x: x[0, 0], lambda x, config: x[None, None])  # [1, 1, D] <-> [D]
MASK_TOKENS = Transform(lambda x: x[:, 0, 0], lambda x, config: x[:, None, None])
QUERY_TOKENS = Transform(lambda x: x[0], lambda x, config: x[None])


def dense(
    theirs: str, ours: str, kernel: Transform = LINEAR, share: tuple[int, int] = (0, 1)
) -> tuple[Row, ...]:
    """The rows of a linear layer, or of a convolution whose stride is its kernel."""
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", kernel, share),
        Row(f"{theirs}.bias", f"{ours}/bias", COPY, share),
    )


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """The rows of a LayerNorm."""
    return (
        Row(f"{theirs}.weight", f"{ours}/scale", COPY),
        Row(f"{theirs}.bias", f"{ours}/bias", COPY),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One of our tensors (of one layer) and its place in theirs.

    Args:
        theirs: their tensor's name.
        their_shape: its shape.
        ours: our flat name.
        layer: its row in our stack; None where ours is not stacked.
        transform: how it is rearranged.
        share: which part of their tensor it is, as in `Row`.
    """

    theirs: str
    their_shape: tuple[int, ...]
    ours: str
    layer: int | None
    transform: Transform
    share: tuple[int, int]

    @property
    def part(self) -> str:
        """Which part it belongs to: encoder, predictor, classifier, .."""
        return self.ours.split("/")[0]

    def take(self, theirs: NDArray[Any]) -> NDArray[Any]:
        """Returns ours, in our layout, out of their tensor."""
        which, count = self.share
        rows = theirs.shape[0] // count
        return self.transform.to_ours(theirs[which * rows : (which + 1) * rows])


def entries(
    config: ModelConfig, table: Sequence[Row], rename: Callable[[str], str] = str
) -> list[Entry]:
    """Lists every tensor of a checkpoint.

    Args:
        config: the architecture.
        table: its family's.
        rename: from the table's names to those of this checkpoint.

    Returns:
        One entry for each tensor of ours, in the order of `parameter_shapes`, layers ascending.
    """
    return shape_entries(parameter_shapes(config), table, config.encoder, rename)


def shape_entries(
    shapes: Mapping[str, tuple[int, ...]],
    table: Sequence[Row],
    config: EncoderConfig | None = None,
    rename: Callable[[str], str] = str,
) -> list[Entry]:
    """As `entries`, for parameters of these names and shapes.

    Args:
        shapes: of our tensors by flat name.
        table: has a row for each of them.
        config: gives the sizes of patches; None where there are none.
        rename: as in `entries`.

    Returns:
        One entry for each tensor of ours, in the order of `shapes`, layers ascending.
    """
    by_ours = {row.ours: row for row in table}
    found = []
    for ours, shape in shapes.items():
        row = by_ours[ours]
        stacked = "{i}" in row.theirs
        piece = np.broadcast_to(np.float32(0), shape[1:] if stacked else shape)  # takes no memory
        rows, *rest = row.transform.to_theirs(piece, config).shape
        for layer in range(shape[0]) if stacked else (None,):
            found.append(
                Entry(
                    theirs=rename(row.theirs.replace("{i}", str(layer))),
                    their_shape=(rows * row.share[1], *rest),
                    ours=ours,
                    layer=layer,
                    transform=row.transform,
                    share=row.share,
                )
            )
    return found


def expected_shapes(wanted: Sequence[Entry]) -> Mapping[str, tuple[int, ...]]:
    """Shape by name of every tensor of theirs that the entries take from."""
    return {entry.theirs: entry.their_shape for entry in wanted}
