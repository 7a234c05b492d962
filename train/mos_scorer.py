"""From what is kept of videos and prompts to their scores: the part of a model that still runs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from jvjepa.layers import Remat
from jvjepa.quality import QualityModel
from jvjepa.train.distributed import whole
from jvjepa.train.mesh import MeshConfig, make_mesh, put_batch, replicated
from jvjepa.train.mos_features import Examples, Kept
from jvjepa.train.mos_layers import cut, join, upper_tokens
from jvjepa.typing import Array, Params


class Batch(NamedTuple):
    """Rated videos of a step.

    Args:
        video: [B, D], what the head sees of them, or [B, N, D], what the upper blocks take.
        text: (float32 [B, Dt],), the embeddings of the prompts; or (ids int32 [B, M], mask bool
            [B, M]), their tokens.
        scores: float32 [B, 5].
    """

    video: NDArray[Any]
    text: tuple[NDArray[Any], ...]
    scores: NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """The head, and what runs before it.

    Args:
        model: gives the modules; blocks stacked.
        kept: what of a video is kept.
        reads: whether the text encoder runs, and not only the embeddings of prompts are kept.
        remat: what is computed anew for the gradient of the upper blocks.
    """

    model: QualityModel
    kept: Kept
    reads: bool = False
    remat: Remat = "none"

    def __call__(self, params: Params, batch: Batch, key: Array | None = None) -> Array:
        """Scores a batch.

        Args:
            params: from `divide`, both parts together.
            batch: the videos.
            key: of the dropout; None drops nothing.

        Returns:
            float32 [B, 5].
        """
        text = batch.text[0]
        if self.reads:
            text = self.model.text.apply({"params": params["text"]}, *batch.text, method="embed")
        head = dataclasses.replace(self.model.head, dtype=jnp.float32)
        dropout = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        return head.apply(
            {"params": params["head"]}, self._watch(params, batch.video), text, **dropout
        )

    def _watch(self, params: Params, video: Array) -> Array:
        """[B, D], what the head sees of the videos."""
        if self.kept.depth is None:
            return video.astype(jnp.float32)
        model, how = self.model, {"dtype": self.kept.dtype}
        encoder = dataclasses.replace(model.encoder, **how, remat=self.remat)
        rows = encoder.config.crop_size // encoder.config.patch_size
        tokens = upper_tokens(encoder, params["encoder"], video, (rows, rows), self.kept.depth)
        pooler = model.pooler and dataclasses.replace(model.pooler, **how)
        module = dataclasses.replace(model.module, encoder=encoder, pooler=pooler)
        frozen = {name: params[name] for name in ("pooler",) if name in params}
        return module.apply({"params": frozen}, tokens, method="pool")

    def divide(self) -> tuple[Params, Params]:
        """Takes what runs out of the model's parameters: what may be trained, and what never is."""
        params = self.model.params
        trained = {"head": params["head"]}
        if self.reads:
            trained["text"] = params["text"]
        if self.kept.depth is None:
            return trained, {}
        config, depth = self.model.config.encoder, self.kept.depth
        trained["encoder"] = cut(params["encoder"], config, depth)[1]
        return trained, {name: params[name] for name in ("pooler",) if name in params}

    def put_back(self, trained: Params) -> Params:
        """The model's parameters with what was trained; the way back from `divide`."""
        params = self.model.params
        if "encoder" in trained:
            lower, _ = cut(params["encoder"], self.model.config.encoder, self.kept.depth)
            trained = {**trained, "encoder": join(lower, trained["encoder"])}
        return {**params, **trained}

    def text(self, examples: Examples) -> tuple[NDArray[Any], ...]:
        """`Batch.text` of all examples."""
        if not self.reads:
            return (examples.texts,)
        ids, mask, _ = self.model.tokenizer(examples.ratings.prompts)
        return ids, mask

    def predict(self, params: Params, examples: Examples, batch_size: int) -> NDArray[np.float32]:
        """Scores all examples, on all devices.

        Args:
            params: from `divide`, both parts together; if they lie on no mesh, on all devices.
            examples: the videos.
            batch_size: videos at a time, over all processes; rounded up so that devices share it.

        Returns:
            float32 [n, 5].
        """
        if not isinstance(getattr(jax.tree.leaves(params)[0], "sharding", None), NamedSharding):
            params = jax.device_put(params, replicated(make_mesh(MeshConfig())))
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        size = -(-batch_size // jax.device_count()) * jax.device_count()
        text, share, found = self.text(examples), size // jax.process_count(), []
        for begin in range(0, len(examples), size):
            first = begin + jax.process_index() * share
            rows = np.minimum(np.arange(first, first + share), len(examples) - 1)
            found.append(self._compiled(params, put_batch(gather(examples, text, rows), mesh)))
        return np.concatenate(whole(found))[: len(examples)]

    @functools.cached_property
    def _compiled(self) -> Callable[[Params, Batch], Array]:
        return jax.jit(self)


def gather(examples: Examples, text: Sequence[NDArray[Any]], rows: Sequence[int]) -> Batch:
    """Reads a batch.

    Args:
        examples: the videos.
        text: from `Scorer.text`.
        rows: which of them.
    """
    rows = np.asarray(rows)
    video = np.stack([examples.load(row) for row in rows])
    return Batch(video, tuple(part[rows] for part in text), examples.ratings.scores[rows])
