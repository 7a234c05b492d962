"""Distillation: a small encoder that learns the features of a large one.

The student's tokens go through a linear projection to the teacher's width, and learn the teacher's
tokens at the same places. With a window the student is causal from the beginning, so that it
streams as it was trained. The students are V-JEPA 2 encoders with rotary positions, of any size.
"""

import dataclasses
from typing import Literal, get_args

import jax

from jvjepa.adapters import weights_sha256
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.dense import Dense
from jvjepa.encoder import Encoder, forward_flops
from jvjepa.fields import check, check_choices, check_kinds, is_whole
from jvjepa.layers import Remat
from jvjepa.train.data import Batch, normalise
from jvjepa.train.evaluation import mean_over
from jvjepa.train.feeding import DataConfig, check_clip, options
from jvjepa.train.initialisation import init_params
from jvjepa.train.manifest import Manifest
from jvjepa.train.optimizer import OptimizerConfig, make_optimizer
from jvjepa.train.regression import RegressionConfig, fidelity, regression_loss
from jvjepa.train.task import Best, State, Task
from jvjepa.typing import Array, Params
from jvjepa.version import __version__
from jvjepa.weights import DTYPES, Model, Source

SIZES = {
    "vit-tiny": {"hidden_size": 192, "num_layers": 12, "num_heads": 3, "mlp_dim": 768},
    "vit-small": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "mlp_dim": 1536},
    "vit-base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What learns, and how.

    Args:
        size: of the student, a name of `SIZES`; patches, tubelets, positions are the teacher's.
        window: tubelets that a token of the student sees; None means the whole clip.
        optimizer: patterns of its groups see "encoder/.." and "projection/..".
        data: what it learns from.
        loss: what counts, and how much.
        dtype: of the computation.
        remat: what is computed anew for the gradient, see `jvjepa.Encoder`.

    Raises:
        ConfigError: a value is impossible.
    """

    size: Literal["vit-tiny", "vit-small", "vit-base"] = "vit-small"
    window: int | None = None
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=5e-4, warmup_steps=1000, weight_decay=0.04, max_norm=1.0
        )
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: RegressionConfig = dataclasses.field(default_factory=RegressionConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Checks every field of its own."""
        check_choices(self, size=tuple(SIZES), dtype=tuple(DTYPES), remat=get_args(Remat))
        fits = self.window is None or is_whole(self.window, 1)
        check(fits, self, "window", "None, or 1 tubelet or more")
        check_kinds(self, optimizer=OptimizerConfig, data=DataConfig, loss=RegressionConfig)


def student_config(teacher: EncoderConfig, config: DistillConfig) -> EncoderConfig:
    """The student's architecture: of its own size, with patches and positions of the teacher.

    It has one tokenizer, one final norm, and no areas.
    """
    plain = {"image_tokenizer": False, "levels": (), "area_layers": (0, 0)}
    frames = {"frames_per_clip": config.data.clip.num_frames}
    crop = {"crop_size": config.data.clip.crop_size}
    return dataclasses.replace(teacher, **SIZES[config.size], **plain, **frames, **crop)


def distill_task(
    teacher: Model,
    config: DistillConfig,
    manifest: Manifest,
    validation: Manifest | None = None,
    *,
    steps: int,
    seed: int = 0,
) -> Task:
    """Sets up the distillation.

    Args:
        teacher: a loaded checkpoint; its encoder is read and never changed.
        config: what learns.
        manifest: clips to learn from; labels do not matter.
        validation: clips to measure on, at every checkpoint, and to choose the best one by.
        steps: updates of the run, for the schedules.
        seed: of the student's initial weights.

    Returns:
        The task; `student` makes a model of its result.

    Raises:
        ConfigError: the clips do not fit the teacher.
    """
    check_clip(config.data.clip, teacher.config.encoder)
    config_s = student_config(teacher.config.encoder, config)
    dtype = DTYPES[config.dtype]
    large = dataclasses.replace(teacher.encoder, dtype=dtype)
    small = Encoder(config_s, dtype, remat=config.remat, attention=teacher.encoder.attention)
    keys = jax.random.split(jax.random.key(seed))
    params = init_params(ModelConfig(encoder=config_s), keys[0])
    projection = Dense(teacher.config.encoder.hidden_size, dtype)
    given = jax.ShapeDtypeStruct((1, 1, config_s.hidden_size), dtype)
    params["projection"] = projection.lazy_init(keys[1], given)["params"]

    def features(trained: Params, frozen: Params, batch: Batch) -> tuple[Array, Array, int]:
        video = normalise(batch.video, dtype)
        target = jax.lax.stop_gradient(large.apply({"params": frozen["encoder"]}, video))
        tokens = small.apply({"params": trained["encoder"]}, video, window=config.window)
        tokens = projection.apply({"params": trained["projection"]}, tokens)
        return tokens, target, video.shape[1] // config_s.tubelet_size

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        return regression_loss(config.loss, *features(trained, frozen, batch))

    def near(trained: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        values = fidelity(*features(trained, frozen, batch))
        return {f"validation/{name}": value for name, value in values.items()}

    tokens = config.data.clip.num_tokens(config_s)
    flops = 3 * forward_flops(config_s, tokens, tokens)
    digest = weights_sha256(teacher.params["encoder"])
    return Task(
        name="distill",
        record={
            "teacher": digest,
            "encoder": dataclasses.asdict(large.config),
            **options(config, "data", "remat"),
            **config.data.record(manifest, validation),
        },
        trained=params,
        carried={},
        frozen={"encoder": teacher.params["encoder"]},
        loss=loss,
        optimizer=make_optimizer(config.optimizer, params, steps=steps),
        feed=config.data.feed(manifest),
        evaluate=None if validation is None else mean_over(near, config.data, validation),
        best=None if validation is None else Best("validation/pooled_cosine", "max"),
        flops=flops + forward_flops(teacher.config.encoder, tokens, tokens),
        dtype=dtype,
    )


def student(teacher: Model, config: DistillConfig, state: State) -> Model:
    """Makes a model of what was trained, to be saved with `jvjepa.weights.save`.

    Args:
        teacher: that it learned from.
        config: that it was trained with.
        state: the result of the run.

    Returns:
        The student, float32, without the projection.
    """
    small = ModelConfig(encoder=student_config(teacher.config.encoder, config))
    return Model(
        config=small,
        encoder=Encoder(small.encoder),
        params={"encoder": jax.device_get(state.trained["encoder"])},
        source=Source(
            name=f"distilled from {'?' if teacher.source is None else teacher.source.name}",
            revision="",
            sha256=weights_sha256(teacher.params["encoder"]),
            converter=__version__,
        ),
    )
