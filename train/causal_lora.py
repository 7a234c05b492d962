"""Causal LoRA: adapters that repair the encoder for streaming.

The released encoders were trained to see a whole clip. Run causally, as `jvjepa.streaming` does,
their tokens are others than those that the clip would have given, and the deeper the layer the
more. The student is the causal encoder with adapters, the teacher the same frozen encoder over the
whole clip; the student learns to give, from what was before, the features that the teacher gives
knowing what comes. What was before may begin before the teacher's clip, as it does in a stream.
"""

import dataclasses
from typing import Literal, get_args

import jax

from jvjepa.adapters import Adapters, base_sha256
from jvjepa.encoder import Encoder, forward_flops
from jvjepa.errors import ConfigError, TrainingError
from jvjepa.fields import check, check_choices, check_kinds, is_whole
from jvjepa.layers import Remat
from jvjepa.lora import LoraConfig, init_lora, join, split, variables
from jvjepa.quantization import Scheme, quantize
from jvjepa.train.data import Batch, normalise
from jvjepa.train.evaluation import Metrics, mean_over
from jvjepa.train.feeding import DataConfig, check_clip, options
from jvjepa.train.manifest import Manifest
from jvjepa.train.optimizer import OptimizerConfig, make_optimizer
from jvjepa.train.regression import RegressionConfig, fidelity, regression_loss
from jvjepa.train.task import Best, Loss, State, Task
from jvjepa.typing import Array, Params
from jvjepa.weights import DTYPES, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLoraConfig:
    """What is trained, and for which streams.

    Args:
        lora: which layers get adapters, and of what kind.
        optimizer: how they change; group patterns see "encoder/blocks_0/attention/query/a".
        data: what they learn from; a clip is encoded whole by the teacher, but for its past.
        window: tubelets that a token of the student sees, as in the stream that it is for.
        past: tubelets at the beginning of each clip that the student alone sees, and that are not
            compared: it has run for a while then, as a stream has.
        loss: what counts, and how much.
        quantize: hold the frozen weights in few bits (QLoRA): a scheme of
            `jvjepa.quantization.quantize` that needs no ranges, or None.
        dtype: of the computation.
        remat: what is computed anew for the gradient, see `jvjepa.Encoder`.

    Raises:
        ConfigError: a value is impossible.
    """

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-4, warmup_steps=100, weight_decay=0.0, max_norm=1.0
        )
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    window: int = 8
    past: int = 0
    loss: RegressionConfig = dataclasses.field(default_factory=RegressionConfig)
    quantize: Scheme | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Checks every field of its own."""
        check(is_whole(self.window, 1), self, "window", "1 tubelet or more")
        check(is_whole(self.past), self, "past", "0 tubelets or more")
        check_choices(
            self,
            quantize=(None, *get_args(Scheme)),
            dtype=tuple(DTYPES),
            remat=get_args(Remat),
        )
        check_kinds(self, lora=LoraConfig, optimizer=OptimizerConfig)
        check_kinds(self, data=DataConfig, loss=RegressionConfig)


def causal_lora_task(
    model: Model,
    config: CausalLoraConfig,
    manifest: Manifest,
    validation: Manifest | None = None,
    *,
    steps: int,
    seed: int = 0,
) -> Task:
    """Sets up the training.

    Args:
        model: a loaded checkpoint; its weights are read and never changed.
        config: what to train.
        manifest: clips to learn from; labels do not matter.
        validation: clips to measure on, at every checkpoint, and to choose the best one by.
        steps: updates of the run, for the schedules.
        seed: of the adapters' initial values.

    Returns:
        The task; `trained_adapters` makes of its result what can be saved.

    Raises:
        ConfigError: the adapters or the clips do not fit the model.
    """
    encoder = dataclasses.replace(model.encoder, dtype=DTYPES[config.dtype], remat=config.remat)
    _check(config, model)
    params = {"encoder": model.params["encoder"]}
    trained, constants = split(init_lora(params, config.lora, jax.random.key(seed)))
    base = base_sha256(params, trained)
    if config.quantize is not None:
        params = quantize(params, config.quantize)
    tubelets, rows, columns = config.data.clip.grid(encoder.config)
    of_student, of_teacher = (n * rows * columns for n in (tubelets, tubelets - config.past))
    evaluate, best = None, None
    if validation is not None:
        evaluate = mean_over(_nearness(encoder, config), config.data, validation)
        best = Best("validation/pooled_cosine", "max")
    return Task(
        name="causal-lora",
        record={
            "base": base,
            "encoder": dataclasses.asdict(encoder.config),
            **options(config, "data", "remat"),
            **config.data.record(manifest, validation),
        },
        trained=trained,
        carried={},
        frozen={"base": params, "constants": constants},
        loss=make_loss(encoder, config),
        optimizer=make_optimizer(config.optimizer, trained, steps=steps),
        feed=config.data.feed(manifest),
        evaluate=evaluate,
        best=best,
        flops=forward_flops(encoder.config, of_teacher, of_teacher)
        + 2 * forward_flops(encoder.config, of_student, of_student),  # and of its gradient
        dtype=encoder.dtype,
    )


def _check(config: CausalLoraConfig, model: Model) -> None:
    why = f", with past = {config.past}" if config.past else ""
    check_clip(config.data.clip, model.config.encoder, config.past + 2, why)
    if model.encoder.config.has_areas and model.encoder.config.area_temporal_splits > 1:
        raise ConfigError("the encoder has areas over time, with which it cannot stream")


def make_loss(encoder: Encoder, config: CausalLoraConfig) -> Loss:
    """Builds `Task.loss`: how far the causal student is from the teacher that sees the clip."""
    dropout = config.lora.dropout > 0

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        rngs = {"dropout": key} if dropout else None
        student, teacher, tubelets = _features(encoder, config, trained, frozen, batch, rngs)
        return regression_loss(config.loss, student, teacher, tubelets)

    return loss


def _features(
    encoder: Encoder,
    config: CausalLoraConfig,
    trained: Params,
    frozen: Params,
    batch: Batch,
    rngs: dict[str, Array] | None = None,
) -> tuple[Array, Array, int]:
    """Tokens [B, n, D] of the student and of the teacher, and of how many tubelets they are."""
    video = normalise(batch.video, encoder.dtype)
    base, lora = frozen["base"]["encoder"], join(trained, frozen["constants"])["encoder"]
    student = encoder.apply(variables(base, lora), video, window=config.window, rngs=rngs)
    tubelets = video.shape[1] // encoder.config.tubelet_size
    student = student[:, config.past * (student.shape[1] // tubelets) :]
    teacher = encoder.apply({"params": base}, video[:, config.past * encoder.config.tubelet_size :])
    return student, jax.lax.stop_gradient(teacher), tubelets - config.past


def _nearness(encoder: Encoder, config: CausalLoraConfig) -> Metrics:
    """Builds the metrics of a validation: how near the student is to the teacher."""

    def near(trained: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        values = fidelity(*_features(encoder, config, trained, frozen, batch))
        return {f"validation/{name}": value for name, value in values.items()}

    return near


def trained_adapters(model: Model, config: CausalLoraConfig, task: Task, state: State) -> Adapters:
    """Makes adapters of what was trained, to be saved with `jvjepa.adapters.save_adapters`.

    Args:
        model: that the task was made of.
        config: that it was made with.
        task: what was trained.
        state: its result.

    Returns:
        The adapters, tied to the model's weights.

    Raises:
        TrainingError: the model's weights are no longer those that the task was made with.
    """
    lora = join(jax.device_get(state.trained), jax.device_get(task.frozen["constants"]))
    base = base_sha256(model.params, lora)
    if base != task.record["base"]:
        raise TrainingError(f"the weights have changed: {base}, and were {task.record['base']}")
    return Adapters(config=config.lora, base=base, lora=lora)
