"""What all competitors of a row of the table do. Standard library only: every worker imports it."""

import dataclasses
import math
import random
from typing import Literal

Kind = Literal["clip", "train", "step", "skip", "predictor", "classifier"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of work; the sizes are those of ViT-L unless a row says otherwise.

    Args:
        kind: "clip" encodes clips; "train" is a step of training the encoder on clips; "step"
            takes one tubelet into a stream with a full window; "skip" does so behind a gate that
            finds nothing new; "predictor" and "classifier" take the encoder's tokens of clips.
        layers: transformer layers of the encoder, of the predictor, or of the pooler.
        frames: frames of a clip.
        resolution: height and width of a frame in pixels.
        batch: clips or streams.
        window: tubelets that a stream remembers.
        visible: share of a clip's tokens that the encoder or the predictor sees.
        unrolled: layers of their own instead of one loop over all.
        dtype: of the computation, float32 or bfloat16.
        platform: where to run, "cpu" or "gpu".
        hidden: width of the encoder.
        heads: attention heads of the encoder.
    """

    kind: Kind
    layers: int
    frames: int = 16
    resolution: int = 256
    batch: int = 1
    window: int = 8
    visible: float = 1.0
    unrolled: bool = False
    dtype: str = "float32"
    platform: str = "cpu"
    hidden: int = 1024
    heads: int = 16

    patch = 16  # pixels of a side
    tubelet = 2  # frames
    labels = 174  # classes, those of Something-Something v2
    matmul_repeats = 4  # of the two products of `matmul_shapes`, one after the other

    @property
    def mlp(self) -> int:
        """Width of the MLPs of the encoder."""
        return 4 * self.hidden

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of a clip's tokens."""
        side = self.resolution // self.patch
        return self.frames // self.tubelet, side, side

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        return math.prod(self.grid)

    @property
    def tubelet_tokens(self) -> int:
        """Tokens of a tubelet."""
        return self.grid[1] * self.grid[2]

    @property
    def seen(self) -> int:
        """Tokens of a clip that are visible."""
        return round(self.tokens * self.visible)

    @property
    def area_layers(self) -> int:
        """How many layers have areas, in a variant with areas: the first three of four."""
        return max(1, self.layers * 3 // 4)

    @property
    def predictor_width(self) -> int:
        """Width of the predictor."""
        return self.hidden * 3 // 8

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor."""
        return max(1, self.predictor_width // 32)

    @property
    def predicted(self) -> int:
        """Tokens of a clip that the predictor predicts: the hidden ones, or all."""
        return self.tokens - self.seen or self.tokens

    @property
    def score_bytes(self) -> int:
        """Bytes of the attention scores of a layer, where they are all there at once."""
        return self.batch * self.heads * self.tokens**2 * (4 if self.dtype == "float32" else 2)

    @property
    def matmul_shapes(self) -> list[tuple[int, int]]:
        """Tokens and the two matrices of an MLP: what shows how fast the machine multiplies."""
        tokens = 2048 if self.platform == "cpu" else 16384
        return [(tokens, self.hidden), (self.hidden, self.mlp), (self.mlp, self.hidden)]

    @property
    def matmul_flops(self) -> int:
        """Operations of all those products."""
        (tokens, _), (width, wide), _ = self.matmul_shapes
        return self.matmul_repeats * 2 * 2 * tokens * width * wide

    def flops(self, areas: int = 1) -> int | None:
        """Counts the floating-point operations of the matrix products.

        Args:
            areas: into how many a clip is cut, in those layers that have areas.

        Returns:
            Operations; a multiplication and its addition are two. A training step counts three
            forward passes, whatever is computed anew. None for "skip", which is no such work.
        """
        if self.kind == "skip":
            return None
        return (
            self.batch
            * {
                "clip": lambda: self._clip(areas),
                "train": lambda: 3 * self._clip(areas),
                "step": self._step,
                "predictor": self._predictor,
                "classifier": self._classifier,
            }[self.kind]()
        )

    def _clip(self, areas: int) -> int:
        keys = [self.seen // areas] * self.area_layers
        keys += [self.seen] * (self.layers - self.area_layers)
        return self._patches(self.tokens) + sum(self._layer(self.seen, n) for n in keys)

    def _step(self) -> int:
        tokens = self.tubelet_tokens
        return self._patches(tokens) + self.layers * self._layer(tokens, tokens * self.window)

    def _predictor(self) -> int:
        width, tokens = self.predictor_width, self.seen + self.predicted
        ends = 2 * tokens * width * self.hidden  # into its width and out of it
        return ends + self.layers * _layer_flops(width, 4 * width, tokens, tokens)

    def _classifier(self) -> int:
        keys_and_values = 2 * self.tokens * 2 * self.hidden**2  # of the one query that pools
        return self.layers * self._layer(self.tokens, self.tokens) + keys_and_values

    def _patches(self, tokens: int) -> int:
        return 2 * tokens * self.tubelet * self.patch**2 * 3 * self.hidden

    def _layer(self, queries: int, keys: int) -> int:
        return _layer_flops(self.hidden, self.mlp, queries, keys)


def split_tokens(work: Work) -> tuple[list[int], list[int]]:
    """Draws the ids that the predictor sees and those that it predicts; the same everywhere."""
    ids = list(range(work.tokens))
    if work.seen == work.tokens:
        return ids, ids
    seen = set(random.Random(0).sample(ids, work.seen))
    return sorted(seen), [i for i in ids if i not in seen]


def _layer_flops(width: int, mlp: int, queries: int, keys: int) -> int:
    return 2 * queries * (4 * width**2 + 2 * width * mlp + 2 * keys * width)
