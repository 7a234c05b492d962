"""Fine-tuning: the encoder and a classifier on labelled clips, whole or in part.

What stands still is said by groups of the optimizer (`jvjepa.train.optimizer`): by a pattern, or
the first blocks by `freeze_first`. Arrays that are frozen as a whole have neither gradients nor a
place in the checkpoints; with `load(scan=False)`, where every block has arrays of its own, nothing
below the lowest trained block costs a backward pass.

Whatever dtype a model is stored in, it is trained and saved in float32: the changes of a step are
smaller than what bfloat16 can tell apart. What is saved says the size of the clips that it was
trained on.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa.adapters import weights_sha256
from jvjepa.config import ClassifierConfig, ModelConfig
from jvjepa.encoder import forward_flops
from jvjepa.errors import ConfigError
from jvjepa.fields import check, check_choices, check_kinds, check_positive_ints, is_number
from jvjepa.heads import Classifier
from jvjepa.layers import Remat
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import is_quantized
from jvjepa.train.data import Batch, normalise
from jvjepa.train.evaluation import mean_over
from jvjepa.train.feeding import DataConfig, options
from jvjepa.train.initialisation import init_params
from jvjepa.train.manifest import (
    DataError,
    Manifest,
    check_same_classes,
    count_labels,
    few,
)
from jvjepa.train.optimizer import OptimizerConfig, divide, make_optimizer
from jvjepa.train.task import Best, State, Task
from jvjepa.typing import Array, Params
from jvjepa.weights import DTYPES, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is trained, and how.

    Args:
        optimizer: groups with a learning rate of 0 are frozen; patterns see "encoder/blocks_0/.."
            and "classifier/..".
        data: what it learns from; a mirrored clip has the label of the clip.
        num_layers: self-attention blocks of a new classifier's pooler.
        num_heads: attention heads of that pooler.
        smoothing: share of the target that all classes have alike, 0 to below 1.
        dtype: of the computation.
        remat: what is computed anew for the gradient, see `jvjepa.Encoder`.

    Raises:
        ConfigError: a value is impossible.
    """

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-4, warmup_steps=100, weight_decay=0.05, max_norm=1.0
        )
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    num_layers: int = 3
    num_heads: int = 16
    smoothing: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Checks every field of its own."""
        check_kinds(self, optimizer=OptimizerConfig, data=DataConfig)
        check_positive_ints(self, "num_layers", "num_heads")
        fits = is_number(self.smoothing, 0) and self.smoothing < 1
        check(fits, self, "smoothing", "0 to below 1")
        check_choices(self, dtype=tuple(DTYPES), remat=get_args(Remat))


def misfit(model: Model, manifest: Manifest) -> str | None:
    """Says why the classifier of a model cannot learn a manifest's labels.

    Labels without names are taken for those of the classifier if it has as many classes; nothing
    tells whether they mean the same.

    Args:
        model: with a classifier or without.
        manifest: with labels.

    Returns:
        The reason, or None where the classifier can be trained on.
    """
    if model.config.classifier is None:
        return "the model has no classifier"
    own, classes = model.config.classifier.labels, manifest.classes
    highest = int(manifest.labels.max())
    if classes and classes != own:
        theirs, its = (f"{len(names)} classes ({few(names)})" for names in (classes, own))
        return f"{manifest.source} has {theirs}, the model's classifier {its}"
    if highest >= len(own):
        return f"{manifest.source} has label {highest}, the model's classifier {len(own)} classes"
    return None


def with_classifier(model: Model, config: FinetuneConfig, manifest: Manifest, seed: int) -> Model:
    """Gives a model a new classifier of the manifest's classes, in place of what it has.

    Args:
        model: a loaded checkpoint.
        config: the classifier's depth and heads.
        manifest: with labels; without names of the classes every label from 0 on must be there.
        seed: of the initial weights.

    Returns:
        The encoder and the classifier, float32, for clips of the configuration's size.

    Raises:
        DataError: the manifest has no labels, or leaves some out.
        ConfigError: the classifier or the clips do not fit the encoder, or the model is quantized.
    """
    if not manifest.labelled:
        raise DataError(f"{manifest.source}: has no labels, and a classifier needs them")
    labels = manifest.classes
    if not labels:
        count = count_labels(manifest.source, manifest.labels, np.arange(len(manifest)))
        labels = tuple(map(str, range(count)))
    head = ClassifierConfig(
        labels=labels,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        layer_norm_eps=1e-5,
    )
    plain = ModelConfig(encoder=model.config.encoder, classifier=head)
    params = init_params(plain, jax.random.key(seed))["classifier"]
    if not model.encoder.scan:
        params = unstack_layers(params)
    params = {"encoder": model.params["encoder"], "classifier": params}
    return _trainable(dataclasses.replace(model, config=plain, params=params), config)


def finetune_task(
    model: Model,
    config: FinetuneConfig,
    manifest: Manifest,
    validation: Manifest | None = None,
    *,
    steps: int,
) -> Task:
    """Sets up the training.

    Args:
        model: with a classifier of the manifest's classes, see `misfit` and `with_classifier`;
            its other parts are left out.
        config: what is trained.
        manifest: clips to learn from, with labels.
        validation: clips to measure on, at every checkpoint, and to choose the best one by.
        steps: updates of the run, for the schedules.

    Returns:
        The task; `finetuned` makes a model of its result.

    Raises:
        ConfigError: the groups do not fit the parameters, the clips do not fit the encoder, or the
            weights are quantized.
        DataError: a manifest has no labels, or such as the classifier does not have.
    """
    model = _trainable(model, config)
    for labelled in (manifest, *([] if validation is None else [validation])):
        _check_labels(labelled, model)
    if validation is not None:
        names = (manifest.source, manifest.classes, validation.source, validation.classes)
        check_same_classes(*names)
    dtype = DTYPES[config.dtype]
    encoder = dataclasses.replace(model.encoder, dtype=dtype, remat=config.remat)
    classifier = dataclasses.replace(model.classifier, dtype=dtype)
    trained, frozen, optimizer = divide(config.optimizer, model.params)
    if not trained:
        raise ConfigError("OptimizerConfig.groups: all parameters are frozen")

    layers = model.config.classifier.layers

    def logits(trained: Params, frozen: Params, batch: Batch) -> Array:
        params = _merge(trained, frozen)
        given = {"params": params["encoder"]}, normalise(batch.video, dtype)
        if layers:  # as `jvjepa classify` gives them
            tokens = encoder.apply(*given, method="levels", layers=layers)
            tokens = rearrange(tokens, "l b t d -> b (l t) d")
        else:
            tokens = encoder.apply(*given)
        scores = classifier.apply({"params": params["classifier"]}, tokens)
        return scores.astype(jnp.float32)

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        scores = logits(trained, frozen, batch)
        target = jax.nn.one_hot(batch.labels, scores.shape[-1], dtype=jnp.float32)
        target = optax.smooth_labels(target, config.smoothing)
        hits = (jnp.argmax(scores, axis=-1) == batch.labels).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy(scores, target)), {"accuracy": jnp.mean(hits)}

    def accuracy(trained: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        right = jnp.argmax(logits(trained, frozen, batch), axis=-1) == batch.labels
        return {"validation/accuracy": right.astype(jnp.float32)}

    tokens = config.data.clip.num_tokens(encoder.config)
    return Task(
        name="finetune",
        record={
            "model": model.config.to_json(),
            "weights": weights_sha256(model.params),
            **options(config, "data", "remat", "num_layers", "num_heads"),  # these are in model
            **config.data.record(manifest, validation),
        },
        trained=trained,
        carried={},
        frozen=frozen,
        loss=loss,
        optimizer=make_optimizer(optimizer, trained, steps=steps),
        feed=config.data.feed(manifest),
        evaluate=None if validation is None else mean_over(accuracy, config.data, validation),
        best=None if validation is None else Best("validation/accuracy", "max"),
        flops=3 * forward_flops(encoder.config, tokens, tokens),
        dtype=dtype,
    )


def finetuned(model: Model, task: Task, state: State) -> Model:
    """Makes a model of what was trained, to be saved with `jvjepa.weights.save`.

    Args:
        model: that the task was made of.
        task: what was trained.
        state: its result.

    Returns:
        Its encoder and its classifier as they were trained: float32, with the size of the clips.
    """
    config = ModelConfig.from_json(task.record["model"])
    return _built(model, config, _merge(jax.device_get(state.trained), task.frozen))


def _trainable(model: Model, config: FinetuneConfig) -> Model:
    """The encoder and the classifier of a model, if it has one, as they are trained and saved.

    The size of the clips is set before the training and not when it is saved: with
    `rope_grid = "config"` the places of the tokens follow from it.
    """
    if any(is_quantized(leaf) for leaf in flatten_dict(model.params).values()):
        raise ConfigError(
            "the model's weights are quantized, which cannot be trained; take the floating-point "
            "ones, or train adapters: jvjepa train causal-lora"
        )
    clip, head = config.data.clip, model.config.classifier
    frames = {"frames_per_clip": clip.num_frames}
    sized = ModelConfig(
        encoder=dataclasses.replace(model.config.encoder, crop_size=clip.crop_size, **frames),
        classifier=None if head is None else dataclasses.replace(head, **frames),
    )
    parts = ("encoder",) if head is None else ("encoder", "classifier")
    params = {part: model.params[part] for part in parts}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return _built(model, sized, params)


def _built(model: Model, config: ModelConfig, params: Params) -> Model:
    """A model of this configuration and of float32 parameters, which runs as the given one."""
    how = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    encoder = dataclasses.replace(model.encoder, config=config.encoder, **how)
    alike = {"attention": encoder.attention, "scan": encoder.scan, **how}
    head = config.classifier
    return Model(
        config=config,
        encoder=encoder,
        classifier=None if head is None else Classifier(head, config.encoder, **alike),
        params=params,
        source=model.source,
    )


def _merge(trained: Params, frozen: Params) -> Params:
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def _check_labels(manifest: Manifest, model: Model) -> None:
    if model.classifier is None:
        raise ConfigError("the model has no classifier; give it one with with_classifier")
    if not manifest.labelled:
        raise DataError(f"{manifest.source}: has no labels, and a classifier needs them")
    count, highest = len(model.config.classifier.labels), int(manifest.labels.max())
    if highest >= count:
        raise DataError(
            f"{manifest.source}: has label {highest}; the classifier has {count} classes"
        )
