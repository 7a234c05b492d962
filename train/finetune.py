"""Fine-tuning: the encoder and a classifier on labelled clips, whole or in part.

What stands still is said by groups of the optimizer (`jvjepa.train.optimizer`): by a pattern, or
the first blocks by `freeze_first`. Arrays that are frozen as a whole have neither gradients nor a
place in the checkpoints; with `load(scan=False)`, where every block has arrays of its own, nothing
below the lowest trained block costs a backward pass.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa.adapters import weights_sha256
from jvjepa.config import ClassifierConfig
from jvjepa.encoder import forward_flops
from jvjepa.errors import ConfigError
from jvjepa.heads import Classifier
from jvjepa.layers import Remat
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import is_quantized
from jvjepa.train.data import Batch, normalise
from jvjepa.train.evaluation import mean_over
from jvjepa.train.feeding import DataConfig, options
from jvjepa.train.initialisation import init_params
from jvjepa.train.manifest import DataError, Manifest
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
        num_layers: self-attention blocks of the classifier's pooler.
        num_heads: attention heads of the pooler.
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
        """Checks the fields that nothing else does."""
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing = {self.smoothing!r}; it must be 0 to below 1")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype = {self.dtype!r}; it must be one of {list(DTYPES)}")


def with_classifier(model: Model, config: FinetuneConfig, manifest: Manifest, seed: int) -> Model:
    """Gives a model a new classifier of the manifest's classes, in place of what it has.

    Args:
        model: a loaded checkpoint.
        config: the classifier's depth and heads.
        manifest: with labels.
        seed: of the initial weights.

    Returns:
        The encoder and the classifier.

    Raises:
        DataError: the manifest has no labels.
        ConfigError: the classifier does not fit the encoder.
    """
    if not manifest.labelled:
        raise DataError(f"{manifest.source}: has no labels, and a classifier needs them")
    count = int(manifest.labels.max()) + 1
    head = ClassifierConfig(
        labels=manifest.classes or tuple(str(i) for i in range(count)),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        layer_norm_eps=1e-5,
        frames_per_clip=config.data.clip.num_frames,
    )
    plain = dataclasses.replace(
        model.config, classifier=head, predictor=None, anticipator=None, action_predictor=None
    )
    params = init_params(plain, jax.random.key(seed))["classifier"]
    if not model.encoder.scan:
        params = unstack_layers(params)
    how = (model.encoder.dtype, model.encoder.param_dtype)
    return Model(
        config=plain,
        encoder=model.encoder,
        classifier=Classifier(
            head, plain.encoder, *how, model.encoder.attention, model.encoder.scan
        ),
        params={"encoder": model.params["encoder"], "classifier": params},
        source=model.source,
    )


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
        model: with a classifier of the manifest's classes, see `with_classifier`; float32.
        config: what is trained.
        manifest: clips to learn from, with labels.
        validation: clips to measure on, at every checkpoint, and to choose the best one by.
        steps: updates of the run, for the schedules.

    Returns:
        The task; `finetuned` makes a model of its result.

    Raises:
        ConfigError: the groups do not fit the parameters, or these are quantized.
        DataError: a manifest has no labels, or such as the classifier does not have.
    """
    if any(is_quantized(leaf) for leaf in flatten_dict(model.params).values()):
        raise ConfigError(
            "the model's weights are quantized, which cannot be trained; take the floating-point "
            "ones, or train adapters: jvjepa train causal-lora"
        )
    for labelled in (manifest, *([] if validation is None else [validation])):
        _check_labels(labelled, model)
    dtype = DTYPES[config.dtype]
    encoder = dataclasses.replace(model.encoder, dtype=dtype, remat=config.remat)
    classifier = dataclasses.replace(model.classifier, dtype=dtype)
    trained, frozen, optimizer = divide(config.optimizer, model.params)
    if not trained:
        raise ConfigError("OptimizerConfig.groups: all parameters are frozen")

    def logits(trained: Params, frozen: Params, batch: Batch) -> Array:
        params = _merge(trained, frozen)
        tokens = encoder.apply({"params": params["encoder"]}, normalise(batch.video, dtype))
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
            "frozen": weights_sha256(frozen) if frozen else "",
            **options(config, "data", "remat", "num_layers", "num_heads"),  # these are in model
            **config.data.record(manifest),
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
        The model, with trained weights.
    """
    params = _merge(jax.device_get(state.trained), task.frozen)
    return dataclasses.replace(model, params=params)


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
