"""Training probes on frozen features: a grid of heads at once, of which the best counts.

    training, validation = open_features("features/train"), open_features("features/val")
    config = ProbeConfig()
    task = probe_task(config, training, validation)
    state = train(task, LoopConfig(steps=probe_steps(config, training)), "runs/probe")
    result = probe_result(config, training, task, state.trained)
    weights.save("models/probed", attach_probe(model, result, labels))

A head that no classifier can be, as a linear one, is saved by `jvjepa.train.probe_files`.

All heads see the same batches. The loss is the sum of theirs, so that the gradient of each is its
own, and nothing mixes them; a head that diverges stands still and does not stop the others.

Reference: `evals/video_classification_frozen/eval.py` of Meta's V-JEPA 2.
"""

import dataclasses
import functools
import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jvjepa.adapters import weights_sha256
from jvjepa.errors import InputError
from jvjepa.heads import Classifier
from jvjepa.parameters import unstack_layers
from jvjepa.train.distributed import whole
from jvjepa.train.feature_cache import Features, check_classes, check_kind, count_classes
from jvjepa.train.feeding import reading
from jvjepa.train.loop import LoopConfig
from jvjepa.train.manifest import check_same_classes
from jvjepa.train.mesh import MeshConfig
from jvjepa.train.probe_heads import Accuracy, Heads, ProbeConfig, sample_tokens
from jvjepa.train.task import Best, Feed, Loss, Optimizer, Task
from jvjepa.typing import Array, Params
from jvjepa.version import __version__
from jvjepa.weights import Model, Source


class Samples(NamedTuple):
    """What a step is trained on.

    Args:
        tokens: [B, n, D], in the dtype of the cache.
        labels: int32 [B].
    """

    tokens: NDArray[Any]
    labels: NDArray[np.int32]


class ProbeResult(NamedTuple):
    """The best head.

    Args:
        heads: what its parameters are for.
        labels: names of the classes; where nobody knows them, their numbers.
        head: its place in `ProbeConfig.grid`.
        learning_rate: that it was trained with.
        weight_decay: the same.
        accuracy: on the validation set, the best of all heads: on that set it flatters.
        params: its own, float32.
        statistics: from `Heads.statistics`.
        encoder: `weights_sha256` of the encoder whose features it was trained on.
    """

    heads: Heads
    labels: tuple[str, ...]
    head: int
    learning_rate: float
    weight_decay: float
    accuracy: float
    params: Params
    statistics: Params
    encoder: str

    def logits(self, tokens: Array) -> Array:
        """Runs it.

        Args:
            tokens: float [B, n, D] of that encoder, after its final norm: all that the head sees
                together, as `ProbeConfig.sees` and `FeatureConfig` say. Of several layers those of
                one come after those of the other; of a pooled probe they are means.

        Returns:
            float32 [B, labels].
        """
        return self.heads.logits(self.params, self.statistics, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeLoop:
    """How a probe is run: what `LoopConfig` has and `ProbeConfig` leaves open.

    Args:
        accumulate: parts that a batch is divided into, one after the other on each device.
        keep: the newest checkpoints that stay, 1 or more; the best one stays beside them.
        log_every: updates from one row of metrics to the next.
        mesh: how many devices are used for what.

    Raises:
        ConfigError: a value is impossible.
    """

    accumulate: int = 1
    keep: int = 3
    log_every: int = 10
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        """Checks every field."""
        LoopConfig(steps=1, **vars(self))

    def of(self, config: ProbeConfig, training: Features) -> LoopConfig:
        """The loop of a probe: its epochs and its seed, and a checkpoint after every epoch."""
        steps = probe_steps(config, training)
        epoch = steps // config.epochs
        return LoopConfig(steps=steps, seed=config.seed, save_every=epoch, **vars(self))


def probe_steps(config: ProbeConfig, training: Features) -> int:
    """How many updates `config.epochs` are; at the end of an epoch what fills no batch is left out.

    Raises:
        InputError: there are fewer videos than a batch takes.
    """
    return config.epochs * _steps_per_epoch(config, training)


def probe_task(config: ProbeConfig, training: Features, validation: Features) -> Task:
    """Describes the training of a probe, for `jvjepa.train.loop.train`.

    Args:
        config: the probe.
        training: features to train on; those of several views are its random augmentation.
        validation: to compare the heads on. Features of the same encoder and of the same kind; how
            many views and clips there are may differ.

    Returns:
        The task. It reports "best_loss" and "mean_loss" of the heads and how many of them,
        "finite_heads", have one; and of an evaluation the best "accuracy" and each head's,
        "accuracy/head_03".

    Raises:
        DataError: labels are missing, or leave some out.
        InputError: the two sets do not fit together, or a batch is larger than the training set.
        ConfigError: the heads do not fit the features.
    """
    classes = count_classes(training)
    check_classes(validation, classes)
    names = (training.source, training.classes, validation.source, validation.classes)
    check_same_classes(*names)
    check_kind(validation, training.config, training.made_of["encoder"])
    heads = _heads(config, training, classes)
    accuracy = Accuracy(heads)

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        found = accuracy(trained["heads"], frozen, validation)
        each = {f"accuracy/head_{i:02d}": float(share) for i, share in enumerate(found)}
        return {"accuracy": float(found.max()), **each}

    return Task(
        name="probe",
        record={
            "probe": dataclasses.asdict(config),
            "classes": classes,
            "training": training.made_of,
            "validation": validation.made_of,
        },
        trained={"heads": heads.init()},
        carried={},
        frozen=heads.statistics(training),
        loss=_loss(heads),
        optimizer=_optimizer(config, probe_steps(config, training)),
        feed=_feed(config, training),
        evaluate=evaluate,
        best=Best("accuracy", "max"),
        dtype=jnp.dtype(config.dtype),
    )


def probe_result(
    config: ProbeConfig, training: Features, task: Task, trained: Params
) -> ProbeResult:
    """Picks the head that is best on the validation set; of equal ones the first.

    Of several processes all have to call it.

    Args:
        config: the probe.
        training: what it was trained on.
        task: from `probe_task` of the two.
        trained: the parameters after training.

    Returns:
        The head.
    """
    trained = whole(trained)
    values = task.evaluate(trained, task.carried, task.frozen)
    shares = [values[f"accuracy/head_{i:02d}"] for i in range(len(config.grid))]
    best = int(np.argmax(shares))
    learning_rate, weight_decay = config.grid[best]
    classes = count_classes(training)
    return ProbeResult(
        heads=_heads(config, training, classes),
        labels=training.classes or tuple(map(str, range(classes))),
        head=best,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        accuracy=shares[best],
        params=jax.tree.map(lambda leaf: jnp.asarray(leaf[best]), trained["heads"]),
        statistics=task.frozen,
        encoder=training.made_of["encoder"],
    )


def with_crop_size(model: Model, size: int) -> Model:
    """Makes a model one for clips of another size, to which `jvjepa classify` will cut its videos.

    The encoder gives the same features as before, unless its config says `rope_grid = "config"`:
    then positions are counted on the grid of that size.

    Args:
        model: the model.
        size: pixels of a side of the clips.

    Returns:
        The model; its `source` has lost the preprocessor, which says another size.

    Raises:
        ConfigError: the size is no multiple of the patch's.
        InputError: a predictor counts positions on the grid of the old size.
    """
    config, source = model.config, model.source
    if config.crop_size == size:
        return model
    predictor, by_action = config.predictor, config.action_predictor is not None
    if by_action or (predictor is not None and predictor.rope_grid == "config"):
        raise InputError(
            f"clips of {size} pixels: the model's {'action_' if by_action else ''}predictor counts "
            f"positions on the grid of {config.crop_size} pixels; take clips of that size"
        )
    encoder = dataclasses.replace(config.encoder, crop_size=size)
    parts = {name: getattr(model, name) for name in ("predictor", "classifier", "anticipator")}
    return dataclasses.replace(
        model,
        config=dataclasses.replace(config, encoder=encoder),
        encoder=dataclasses.replace(model.encoder, config=encoder),
        source=source and dataclasses.replace(source, preprocessor=None),
        **{
            name: part and dataclasses.replace(part, encoder=encoder)
            for name, part in parts.items()
        },
    )


def attach_probe(model: Model, result: ProbeResult, labels: tuple[str, ...]) -> Model:
    """Makes an attentive probe the classifier of a model, which can be saved and classifies then.

    Args:
        model: with the encoder that the probe was trained on; a classifier it has is replaced.
        result: the probe.
        labels: names of the classes.

    Returns:
        The model, for clips of the size that the probe was trained on, see `with_crop_size`; the
        classifier's parameters have the dtype of the encoder's.

    Raises:
        InputError: the probe is for other weights, or no head for the tokens of clips; or the model
            cannot be for clips of that size.
    """
    heads, features = result.heads, result.heads.features
    for name, found, right in (
        ("kind", heads.config.kind, ("attentive",)),
        ("sees", heads.config.sees, ("view", "clip")),
        ("pool", features.pool, ("none",)),
        ("stream", features.stream, (None,)),
        ("number of classes", heads.classes, (len(labels),)),
        ("encoder", result.encoder, (weights_sha256(model.params["encoder"]),)),
    ):
        if found not in right:
            needed = " or ".join(map(str, right))
            raise InputError(
                f"the probe's {name} is {found}; the model's classifier needs {needed}"
            )
    size, counted = features.clip.crop_size, heads.encoder
    if counted.rope_grid == "config" and counted.crop_size != size:
        raise InputError(
            f"the probe's features are of clips of {size} pixels, and of an encoder with "
            f"rope_grid = 'config' and crop_size = {counted.crop_size}, not {size}; make them with "
            f"with_crop_size(model, {size})"
        )
    model = with_crop_size(model, size)
    config = heads.classifier(labels)
    encoder = model.encoder
    params = jax.tree.map(lambda leaf: leaf.astype(encoder.param_dtype), result.params)
    params = params if encoder.scan else unstack_layers(params)
    named = {"revision": "", "converter": __version__}
    probe = Source(name="jvjepa.train.probe", sha256=weights_sha256(params), **named)
    source = model.source or Source(name="an encoder made here", sha256=result.encoder, **named)
    dtypes = (encoder.dtype, encoder.param_dtype)
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, classifier=config),
        classifier=Classifier(config, encoder.config, *dtypes, encoder.attention, encoder.scan),
        params={**model.params, "classifier": params},
        source=dataclasses.replace(source, probe=probe),
        quantization=model.quantization and model.quantization.without("classifier"),
    )


def fold_linear(result: ProbeResult) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Makes of a linear probe a plain linear map of mean tokens, as a stream's embedding is one.

    Args:
        result: the probe.

    Returns:
        kernel float32 [D, labels] and bias float32 [labels]: logits are mean @ kernel + bias.

    Raises:
        InputError: the probe is not linear.
    """
    if result.heads.config.kind != "linear":
        raise InputError(f"the probe's kind is {result.heads.config.kind}; it must be linear")
    mean, std = (np.asarray(result.statistics[name], np.float64) for name in ("mean", "std"))
    kernel = np.asarray(result.params["kernel"], np.float64) / std[:, None]
    bias = np.asarray(result.params["bias"], np.float64) - mean @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)


def accuracy_over_time(result: ProbeResult, features: Features) -> NDArray[np.float64]:
    """Measures how soon a probe is right.

    Args:
        result: the probe.
        features: of labelled videos, by tubelets: not pooled over clips; best of a stream, where a
            tubelet knows nothing of later ones.

    Returns:
        float64 [t], the share of the videos that it is right about at each tubelet. A head that
        sees tubelets looks at that one alone, another one at it and all before.

    Raises:
        InputError: the features are of another kind or encoder than those that it was trained on.
        DataError: labels are missing, or the probe does not know them.
    """
    heads = result.heads
    check_classes(features, heads.classes)
    check_kind(features, heads.features, result.encoder)
    if features.config.pool == "clip":
        raise InputError(
            f'{features.source}: its features have pool = "clip"; over time they need "tubelet" or '
            '"none"'
        )
    accuracy = Accuracy(heads)
    params = jax.tree.map(lambda leaf: leaf[None], result.params)
    alone = heads.config.sees == "tubelet"
    times = [slice(i if alone else 0, i + 1) for i in range(features.values.shape[3])]
    return np.array([accuracy(params, result.statistics, features, at)[0] for at in times])


# Parts of the task


def _heads(config: ProbeConfig, training: Features, classes: int) -> Heads:
    return Heads(config=config, encoder=training.encoder, features=training.config, classes=classes)


def _loss(heads: Heads) -> Loss:
    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Samples, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        def of(head: Params) -> Array:
            logits = heads.logits(_isolated(head), frozen, batch.tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

        losses = jax.vmap(of)(trained["heads"])
        finite = jnp.isfinite(losses)
        count = jnp.sum(finite, dtype=jnp.float32)
        total = jnp.sum(jnp.where(finite, losses, 0.0))
        return jnp.where(count > 0, total, jnp.nan), {
            "best_loss": jnp.min(jnp.where(finite, losses, jnp.inf)),
            "mean_loss": total / count,
            "finite_heads": count,
        }

    return loss


@jax.custom_vjp
def _isolated(head: Params) -> Params:
    """The same; but a gradient that is not finite is zero, so that it stops no other head."""
    return head


def _isolated_forward(head: Params) -> tuple[Params, None]:
    return head, None


def _isolated_backward(_: None, gradient: Params) -> tuple[Params]:
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]
    whole = functools.reduce(jnp.logical_and, finite)
    return (jax.tree.map(lambda leaf: jnp.where(whole, leaf, 0.0), gradient),)


_isolated.defvjp(_isolated_forward, _isolated_backward)


def _optimizer(config: ProbeConfig, steps: int) -> Optimizer:
    """AdamW with a learning rate and a weight decay for each head.

    As in Meta's code, update n, counted from 1, has the learning rate at n of the half cosine.
    """
    rates, decays = (np.array(column, np.float32) for column in zip(*config.grid, strict=True))
    adam = optax.scale_by_adam()

    def share(step: Array) -> Array:
        progress = jnp.minimum((jnp.asarray(step).astype(jnp.float32) + 1) / steps, 1)
        return 0.5 * (1 + jnp.cos(np.float32(math.pi) * progress))

    def update(
        gradients: Params, state: optax.ScaleByAdamState, params: Params | None = None
    ) -> tuple[Params, optax.ScaleByAdamState]:
        now = share(state.count)  # updates that were made
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            directions, state = adam.update(gradients, state)

        def change(direction: Array, param: Array) -> Array:
            shape = (-1,) + (1,) * (param.ndim - 1)
            rate, decay = rates.reshape(shape), decays.reshape(shape)
            return -(now * rate) * (direction + decay * param)

        return jax.tree.map(change, directions, params), state

    transform = optax.GradientTransformation(adam.init, update)
    return Optimizer(transform, {"learning_rate": lambda step: share(step) * rates.max()})


def _steps_per_epoch(config: ProbeConfig, training: Features) -> int:
    if config.batch_size > len(training):
        raise InputError(
            f"ProbeConfig.batch_size = {config.batch_size}; {training.source} has features of "
            f"{len(training)} videos, take no more"
        )
    return len(training) // config.batch_size


def _feed(config: ProbeConfig, training: Features) -> Feed:
    epoch = _steps_per_epoch(config, training) * config.batch_size  # videos

    def sample(position: int, row: int) -> Samples:
        tokens = sample_tokens(training.values[row : row + 1], config.sees)[0]
        which = np.random.default_rng((config.seed, position // epoch, row)).integers(len(tokens))
        return Samples(np.array(tokens[which]), training.labels[row])

    def stack(samples: list[Samples]) -> Samples:
        tokens, labels = zip(*samples, strict=True)
        return Samples(np.stack(tokens), np.array(labels, np.int32))

    def feed(
        step: int, process_index: int, process_count: int
    ) -> AbstractContextManager[grain.DatasetIterator[Samples]]:
        if config.batch_size % process_count:
            raise InputError(
                f"ProbeConfig.batch_size = {config.batch_size}; it must be a multiple of the "
                f"{process_count} processes"
            )
        rows = grain.MapDataset.source(range(len(training))).shuffle(seed=config.seed)
        share = rows[:epoch].repeat(None).map_with_index(sample)[process_index::process_count]
        batches = share.batch(config.batch_size // process_count, batch_fn=stack)[step:]
        return reading(batches)

    return feed
