"""Probes of frozen features: many heads on the same tokens, one for each choice of an optimizer.

Reference: `evals/video_classification_frozen` of Meta's V-JEPA 2 (arXiv:2506.09985).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from jvjepa.config import ClassifierConfig, EncoderConfig, ModelConfig
from jvjepa.errors import ConfigError
from jvjepa.heads import Classifier
from jvjepa.parameters import parameter_shapes
from jvjepa.train.feature_cache import Features
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.mesh import MeshConfig, make_mesh, put, put_batch, replicated
from jvjepa.typing import Array, Params

Kind = Literal["attentive", "linear"]
Sees = Literal["view", "clip", "tubelet"]
Computed = Literal["float32", "bfloat16"]

_ROWS = 64  # videos that are looked at together for statistics
_DEVIATION = 0.02  # of the initial kernels
_CONSTANT = 1e-6  # a channel whose deviation is below this share of the features' size is rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is trained on frozen features. The defaults are those of Meta's probes.

    Args:
        kind: "attentive" is `jvjepa.heads.Classifier`; "linear" takes the mean of all tokens,
            standardised with the mean and deviation that each channel has over the training set.
        num_layers: self-attention blocks of an attentive head, before its cross-attention block.
        num_heads: attention heads of an attentive head; a divisor of the encoder's width.
        layer_norm_eps: epsilon of its LayerNorms.
        learning_rates: at the beginning; each goes to 0 as a half cosine.
        weight_decays: one head is trained for each pair of a learning rate and a weight decay,
            which acts on all parameters and stays as it is.
        epochs: how often training sees each video.
        batch_size: videos of a step, over all processes.
        sees: the tokens that a head sees together: those of all clips of a "view", of a "clip", or
            of a "tubelet". Of several there are, training draws one of each video and epoch, and
            evaluation averages the probabilities.
        dtype: of the computation of an attentive head, "float32" or "bfloat16"; parameters are
            float32.
        seed: of the heads' initial weights and of the order of videos, 0 to 2^32 - 1.

    Raises:
        ConfigError: a value is impossible.
    """

    kind: Kind = "attentive"
    num_layers: int = 3
    num_heads: int = 16
    layer_norm_eps: float = 1e-5
    learning_rates: tuple[float, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    weight_decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    epochs: int = 20
    batch_size: int = 128
    sees: Sees = "view"
    dtype: Computed = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, kind in (("kind", Kind), ("sees", Sees), ("dtype", Computed)):
            choices = get_args(kind)
            self._check(getattr(self, name) in choices, name, f"one of {choices}")
        for name in ("num_layers", "num_heads", "epochs", "batch_size"):
            value = getattr(self, name)
            self._check(type(value) is int and value > 0, name, "a whole number above 0")
        fits = _is_number(self.layer_norm_eps) and self.layer_norm_eps > 0
        self._check(fits, "layer_norm_eps", "a number above 0")
        for name, least in (("learning_rates", math.ulp(0.0)), ("weight_decays", 0.0)):
            values = getattr(self, name)
            fits = isinstance(values, tuple) and len(set(values)) == len(values) > 0
            fits = fits and all(_is_number(value) and value >= least for value in values)
            right = f"a tuple of one or more different numbers, {'above 0' if least else '0 up'}"
            self._check(fits, name, right)
        fits = type(self.seed) is int and 0 <= self.seed < 2**32
        self._check(fits, "seed", "0 to 2^32 - 1")

    def _check(self, ok: bool, field: str, right: str) -> None:
        if not ok:
            raise ConfigError(f"ProbeConfig.{field} = {getattr(self, field)!r}; it must be {right}")

    @property
    def grid(self) -> tuple[tuple[float, float], ...]:
        """(learning rate, weight decay) of each head, G of them."""
        return tuple(itertools.product(self.learning_rates, self.weight_decays))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The functions of a probe's heads; their parameters are stacked, [G, ...].

    An attentive head's are those of `Classifier`; a linear one's are kernel [D, labels] and bias.

    Args:
        config: the probe.
        encoder: whose features they are for.
        features: which of its features.
        classes: how many there are to tell apart.

    Raises:
        ConfigError: the heads do not fit the encoder.
    """

    config: ProbeConfig
    encoder: EncoderConfig
    features: FeatureConfig
    classes: int

    def __post_init__(self) -> None:
        """Checks that the two fit."""
        width, count = self.encoder.hidden_size, self.config.num_heads
        if self.config.kind == "attentive" and width % count:
            right = f"a divisor of the encoder's width {width}"
            raise ConfigError(f"ProbeConfig.num_heads = {count}; it must be {right}")

    def classifier(self, labels: tuple[str, ...] | None = None) -> ClassifierConfig:
        """The configuration of an attentive head; `labels` names the classes."""
        return ClassifierConfig(
            labels=tuple(map(str, range(self.classes))) if labels is None else labels,
            num_layers=self.config.num_layers,
            num_heads=self.config.num_heads,
            layer_norm_eps=self.config.layer_norm_eps,
            layers=self.features.layers,
            frames_per_clip=self.features.clip.num_frames,
        )

    @property
    def _module(self) -> Classifier:
        return Classifier(self.classifier(), self.encoder, jnp.dtype(self.config.dtype))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of one head, by its flat name."""
        return {name.removeprefix(self._prefix): x for name, x in self._model_shapes.items()}

    @property
    def _prefix(self) -> str:
        """What the names of a head's parameters begin with in a model."""
        return "classifier/" if self.config.kind == "attentive" else "classifier/linear/"

    @property
    def _model_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `shapes`, by the names that they have in a model."""
        classifier = self.classifier()
        if self.config.kind == "linear":  # of the rest there is nothing
            classifier = dataclasses.replace(classifier, num_layers=1, num_heads=1)
        shapes = parameter_shapes(ModelConfig(encoder=self.encoder, classifier=classifier))
        return {name: x for name, x in shapes.items() if name.startswith(self._prefix)}

    def init(self) -> Params:
        """Draws the weights of every head, as Meta's code does.

        Kernels and query tokens are normal with deviation 0.02. Kernels whose output is added to
        the tokens are then divided by sqrt(2 n) in the n-th block, from 1, and the one of the
        cross-attention's MLP as that of the last block. The linear layer is uniform, as PyTorch's.

        Returns:
            Float32, [G, ...]; the first heads are the same whatever others there are.
        """
        shapes = self._model_shapes
        seeds = [(self.config.seed, head) for head in range(len(self.config.grid))]
        generators = [np.random.default_rng(seed) for seed in seeds]
        stacked = {
            name.removeprefix(self._prefix): jnp.asarray(
                np.stack([_draw(name, shapes, generator) for generator in generators])
            )
            for name in shapes
        }
        return unflatten_dict(stacked, sep="/")

    def statistics(self, training: Features) -> Params:
        """What the heads need to know of the training set, beside what they learn.

        Args:
            training: the features.

        Returns:
            Of linear heads "mean" and "std", float32 [D], of the mean tokens that heads see; a
            channel that does not vary has a deviation of 1. Of attentive heads {}.
        """
        if self.config.kind == "attentive":
            return {}
        count, total, squares = 0, 0.0, 0.0
        centre: NDArray[np.float64] | None = None
        for begin in range(0, len(training), _ROWS):
            values = training.values[begin : begin + _ROWS]
            tokens = sample_tokens(values, self.config.sees).astype(np.float32)
            means = tokens.mean(axis=2, dtype=np.float64).reshape(-1, tokens.shape[-1])
            centre = means.mean(axis=0) if centre is None else centre  # squares lose no digits
            count += len(means)
            total = total + (means - centre).sum(axis=0)
            squares = squares + ((means - centre) ** 2).sum(axis=0)
        offset = total / count
        mean, variance = centre + offset, np.maximum(squares / count - offset**2, 0)
        size = np.mean(variance + mean**2)
        std = np.where(variance > _CONSTANT**2 * size, np.sqrt(variance), 1)
        return {"mean": jnp.asarray(mean, jnp.float32), "std": jnp.asarray(std, jnp.float32)}

    def logits(self, head: Params, statistics: Params, tokens: Array) -> Array:
        """Runs one head.

        Args:
            head: its parameters, without the axis G.
            statistics: from `statistics`.
            tokens: [B, n, D], of any dtype of a cache.

        Returns:
            float32 [B, labels].
        """
        tokens = tokens.astype(jnp.float32)
        if self.config.kind == "attentive":
            return self._module.apply({"params": head}, tokens).astype(jnp.float32)
        x = jnp.mean(tokens, axis=1)
        x = (x - statistics["mean"][None]) / statistics["std"][None]
        return jnp.matmul(x, head["kernel"]) + head["bias"][None]


def _draw(
    name: str, shapes: Mapping[str, tuple[int, ...]], generator: np.random.Generator
) -> NDArray[np.float32]:
    """An array of one head; see `Heads.init`."""
    shape, (part, _, kind) = shapes[name], name.rpartition("/")
    if part == "classifier/linear":
        reach = np.float32(1 / math.sqrt(shapes["classifier/linear/kernel"][0]))
        return reach * (2 * generator.random(shape, np.float32) - 1)
    if kind in ("bias", "scale"):
        return np.full(shape, kind == "scale", np.float32)
    drawn = np.float32(_DEVIATION) * generator.standard_normal(shape, np.float32)
    last = shapes["classifier/pooler/blocks/mlp/fc2/kernel"][0]
    if part.endswith(("blocks/attention/proj", "blocks/mlp/fc2")):
        return drawn / np.sqrt(2 * np.arange(1, last + 1, dtype=np.float32)).reshape(-1, 1, 1)
    if part.endswith("cross_attention/mlp/fc2"):
        return drawn / np.float32(math.sqrt(2 * last))
    return drawn


def sample_tokens(values: NDArray[Any], sees: Sees) -> NDArray[Any]:
    """Divides the features of videos into what a head sees together.

    Args:
        values: [rows, views, clips, t, n, D].
        sees: as in `ProbeConfig`.

    Returns:
        [rows, samples, tokens, D], without a copy where there is none needed.
    """
    patterns = {
        "view": "r v c t n d -> r v (c t n) d",
        "clip": "r v c t n d -> r (v c) (t n) d",
        "tubelet": "r v c t n d -> r (v c t) n d",
    }
    return rearrange(values, patterns[sees])


@functools.partial(jax.jit, static_argnums=0)
def probabilities(heads: Heads, params: Params, statistics: Params, tokens: Array) -> Array:
    """Classifies videos with every head.

    Args:
        heads: the heads.
        params: theirs, [G, ...].
        statistics: from `Heads.statistics`.
        tokens: [rows, samples, n, D], from `sample_tokens`.

    Returns:
        float32 [G, rows, labels], means over what a head does not see together, as in
        `jvjepa.classification`.
    """
    rows, samples = tokens.shape[:2]
    together = tokens.reshape(rows * samples, *tokens.shape[2:])

    def answer(head: Params) -> Array:
        found = jax.nn.softmax(heads.logits(head, statistics, together))
        return found.reshape(rows, samples, -1).mean(axis=1)

    return jax.vmap(answer)(params)


class Videos(NamedTuple):
    """Features of some videos.

    Args:
        tokens: [B, samples, n, D], in the dtype of the cache.
        labels: int32 [B].
        ids: int32 [B], their rows in the cache; -1 where a video only fills up the batch.
    """

    tokens: NDArray[Any]
    labels: NDArray[np.int32]
    ids: NDArray[np.int32]


class Accuracy:
    """Measures the accuracy of every head; compiled once for all calls.

    Args:
        heads: the heads.
    """

    def __init__(self, heads: Heads) -> None:
        """Compiles nothing yet."""
        self._heads, self._count = heads, jax.jit(self._correct)

    def __call__(
        self, params: Params, statistics: Params, features: Features, times: slice = slice(None)
    ) -> NDArray[np.float64]:
        """Classifies all videos of a cache.

        Args:
            params: of the heads, [G, ...]; on a mesh as training has them, or whole on the host of
                every process, as `statistics` then.
            statistics: from `Heads.statistics`.
            features: of the videos, with labels.
            times: the tubelets that are looked at.

        Returns:
            float64 [G], shares of the videos that are right; a head whose probabilities are not
            finite is right about none.
        """
        sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
        else:
            mesh = make_mesh(MeshConfig())
            everywhere = jax.tree.map(lambda _: replicated(mesh), (params, statistics))
            params, statistics = put((params, statistics), everywhere)
        right = np.zeros(len(self._heads.config.grid))
        for videos in self._videos(features, times):
            right += jax.device_get(self._count(params, statistics, put_batch(videos, mesh)))
        return right / len(features)

    def _correct(self, params: Params, statistics: Params, videos: Videos) -> Array:
        """How many of the videos each head is right about, int32 [G]."""
        found = probabilities(self._heads, params, statistics, videos.tokens)
        right = jnp.argmax(found, axis=-1) == videos.labels[None]
        right = right & jnp.isfinite(found).all(axis=-1)  # of NaN the first would be the largest
        return jnp.sum(right & (videos.ids >= 0)[None], axis=-1, dtype=jnp.int32)

    def _videos(self, features: Features, times: slice) -> Iterator[Videos]:
        """This process's share, in batches of one shape that all its devices can share."""
        sees, devices = self._heads.config.sees, jax.local_device_count()
        samples = sample_tokens(features.values[:1, :, :, times], sees).shape[1]
        count = max(1, self._heads.config.batch_size // samples // jax.process_count())
        count = math.ceil(min(count, len(features)) / devices) * devices
        for begin in range(0, len(features), count * jax.process_count()):
            ids = begin + jax.process_index() + jax.process_count() * np.arange(count)
            places = np.minimum(ids, len(features) - 1)
            tokens = sample_tokens(features.values[places][:, :, :, times], sees)
            ids = np.where(ids == places, ids, -1).astype(np.int32)
            yield Videos(tokens, features.labels[places], ids)
