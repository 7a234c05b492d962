"""Pretraining: V-JEPA 2, and V-JEPA 2.1 with its dense predictive loss.

The student encodes what a mask leaves of a clip, and the predictor guesses what the teacher, which
sees all of it, makes of the rest. The teacher is an average of the students so far.

- V-JEPA 2: encoder without levels. The target is the teacher's last layer.
- V-JEPA 2.1: encoder with levels, which are the target together, and a predictor that also guesses
  the visible tokens. Images may be mixed with the clips.

Reference: `app/vjepa/train.py` and `app/vjepa_2_1/train.py` of Meta's V-JEPA 2; arXiv:2506.09985.
There some devices train on images and others on clips, and gradients are averaged; here both are in
one program, whose loss is the average.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from jvjepa.adapters import weights_sha256
from jvjepa.attention import Backend
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.encoder import Encoder, check_video
from jvjepa.errors import ConfigError
from jvjepa.fields import check, check_bools, check_choices, check_kinds, is_number, is_whole
from jvjepa.layers import Remat
from jvjepa.masks import IMAGE_MASKS, VIDEO_MASKS, Grid, MaskConfig
from jvjepa.parameters import parameter_shapes
from jvjepa.predictor import Modality, Predictor
from jvjepa.train.data import ClipConfig
from jvjepa.train.feeding import DataConfig, options
from jvjepa.train.initialisation import init_params
from jvjepa.train.manifest import Manifest
from jvjepa.train.optimizer import OptimizerConfig, make_optimizer
from jvjepa.train.predictive import PredictiveLoss, maskings
from jvjepa.train.task import Feed, Follow, Loss, State, Task
from jvjepa.typing import Array, Params
from jvjepa.weights import DTYPES, Model, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a model is pretrained. The defaults are those of V-JEPA 2.1's first phase.

    Args:
        optimizer: how encoder and predictor change.
        data: clips of each batch.
        images: single frames of each batch, `ClipConfig.num_frames` is 1; None for none. A frame
            of a video is an image too.
        image_share: weight r of the images' loss, the clips' has 1 - r; above 0, below 1.
        video_masks: how clips are masked; each mask is a pass of encoder and predictor.
        image_masks: how images are masked.
        mask_quantile: the share of masks that are not cut, see `jvjepa.masks.lengths`.
        mask_index: which of the predictor's mask tokens is trained. Meta's training takes that of
            the clips' length, 0 where all are of one; a `Predictor` is used with 1 by default.
        context_weight: of the loss on the visible tokens of clips. A predictor without
            `context_projection` has no such loss.
        image_context_weight: of that of images.
        context_ramp: steps between which these weights rise from 0; None has them from the start.
        distance_weighting: visible tokens count less the farther they are from what is hidden.
        momentum: of the teacher, the share that it keeps at each step, 0 to 1.
        final_momentum: at the end of the schedule, which is as long as the optimizer's; None keeps
            it as it is.
        dtype: of the computation; parameters are float32.
        remat: what encoder and predictor compute anew for the gradient, see `jvjepa.Encoder`.

    Raises:
        ConfigError: a value is impossible.
    """

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=6e-4,
            start_learning_rate=1e-4,
            final_learning_rate=6e-4,
            warmup_steps=12_000,
            stretch=1.25,
        )
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    images: DataConfig | None = None
    image_share: float = 0.5
    video_masks: tuple[MaskConfig, ...] = VIDEO_MASKS
    image_masks: tuple[MaskConfig, ...] = IMAGE_MASKS
    mask_quantile: float = 0.95
    mask_index: int = 0
    context_weight: float = 0.5
    image_context_weight: float = 0.5
    context_ramp: tuple[int, int] | None = (15_000, 30_000)
    distance_weighting: bool = True
    momentum: float = 0.99925
    final_momentum: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Checks every field of its own."""
        check_kinds(self, optimizer=OptimizerConfig, data=DataConfig)
        fits = self.images is None or isinstance(self.images, DataConfig)
        check(fits, self, "images", "None or of the class DataConfig")
        fits = is_number(self.image_share) and 0 < self.image_share < 1
        check(fits, self, "image_share", "a number above 0 and below 1")
        for name in ("video_masks", "image_masks"):
            masks = getattr(self, name)
            fits = isinstance(masks, tuple) and all(isinstance(mask, MaskConfig) for mask in masks)
            check(fits and len(masks) > 0, self, name, "a tuple of one or more MaskConfig")
        check(is_whole(self.mask_index), self, "mask_index", "a whole number, 0 or more")
        for name in ("context_weight", "image_context_weight"):
            check(is_number(getattr(self, name), 0), self, name, "a number, 0 or more")
        ramp = self.context_ramp
        if ramp is not None:
            fits = isinstance(ramp, tuple) and [is_whole(step) for step in ramp] == [True, True]
            fits = fits and ramp[0] < ramp[1]
            check(fits, self, "context_ramp", "None or two steps (start, end), start below end")
        check_bools(self, "distance_weighting")
        for name in ("mask_quantile", "momentum"):
            check(is_number(getattr(self, name), 0, 1), self, name, "a share, 0 to 1")
        fits = self.final_momentum is None or is_number(self.final_momentum, self.momentum, 1)
        check(fits, self, "final_momentum", f"None, or {self.momentum} to 1")
        check_choices(self, dtype=tuple(DTYPES), remat=get_args(Remat))


class Clips(NamedTuple):
    """A batch.

    Args:
        video: uint8 [B, T, H, W, 3].
        image: uint8 [B', 1, H', W', 3]; None where there are no images.
    """

    video: Array | NDArray[np.uint8]
    image: Array | NDArray[np.uint8] | None = None


def pretrain_task(
    model: ModelConfig,
    config: PretrainConfig,
    manifest: Manifest,
    images: Manifest | None = None,
    *,
    steps: int,
    seed: int = 0,
    params: Params | None = None,
    teacher: Params | None = None,
    attention: Backend = "auto",
) -> Task:
    """Sets up the training.

    What is trained is {"encoder", "predictor"}; what is carried is {"encoder"}, the teacher, whose
    weights are those to use. A cooldown begins with both of a checkpoint; Adam's averages begin
    anew.

    Args:
        model: the architecture; only encoder and predictor are trained.
        config: how.
        manifest: clips to learn from; labels do not matter.
        images: pictures to learn from, or videos to take single frames of; with `config.images`.
        steps: updates of the run, for the schedules.
        seed: of the initial parameters.
        params: {"encoder", "predictor"} to begin with, blocks stacked; None draws them.
        teacher: parameters of an encoder to begin with; None takes the student's.
        attention: the attention backend, see `jvjepa.attention.resolve`.

    Returns:
        The task.

    Raises:
        ConfigError: the parts do not fit together, masks do not fit the clips, or schedules do not
            fit the steps.
        InputError: clips cannot be cut into patches.
        CheckpointError: parameters do not fit the model.
    """
    _check_parts(model, config, images)
    _check_ramp(model, config, steps)
    draw, key = functools.partial(init_params, model), jax.random.key(seed)
    # What may raise comes first: the parameters of a large model take minutes.
    shapes = jax.eval_shape(draw, key)
    shapes = {part: shapes[part] for part in ("encoder", "predictor")}
    optimizer = make_optimizer(config.optimizer, shapes, steps=steps)
    video, image = make_branches(model, config, attention)
    given = {"params": params, "teacher": teacher}
    params = draw(key) if params is None else params
    trained = {part: params.get(part, {}) for part in ("encoder", "predictor")}
    carried = {"encoder": trained["encoder"] if teacher is None else teacher}
    trained, carried = _checked("params", trained, model), _checked("teacher", carried, model)
    flops = video.flops
    if image is not None:
        flops += image.flops * config.images.batch_size / config.data.batch_size
    return Task(
        name="pretrain",
        record=_record(model, config, manifest, images, given),
        trained=trained,
        carried=carried,
        frozen={},
        loss=make_loss(video, image, config.image_share),
        follow=make_follow(config, steps),
        optimizer=optimizer,
        feed=_feed(config, manifest, images),
        flops=flops,
        dtype=DTYPES[config.dtype],
    )


def _check_parts(model: ModelConfig, config: PretrainConfig, images: Manifest | None) -> None:
    encoder, predictor = model.encoder, model.predictor
    if predictor is None:
        raise ConfigError("ModelConfig.predictor = None; pretraining needs one")
    outputs = encoder.num_levels * encoder.hidden_size
    if predictor.num_levels != encoder.num_levels:
        raise ConfigError(
            f"PredictorConfig.num_levels = {predictor.num_levels}; it must be the encoder's, "
            f"{encoder.num_levels}"
        )
    if predictor.output_dim not in (None, outputs):
        raise ConfigError(
            f"PredictorConfig.output_dim = {predictor.output_dim}; the targets have {outputs} "
            "channels"
        )
    right = f"below the predictor's number of mask tokens, {predictor.num_mask_tokens}"
    check(config.mask_index < predictor.num_mask_tokens, config, "mask_index", right)
    if (config.images is None) != (images is None):
        missing = "images" if images is None else "PretrainConfig.images"
        raise ConfigError(f"{missing} = None; pictures need both a manifest and a configuration")
    if config.images is not None and config.images.clip.num_frames != 1:
        frames = config.images.clip.num_frames
        raise ConfigError(f"ClipConfig.num_frames = {frames} of images; it must be 1")
    if config.data.clip.num_frames == 1:
        raise ConfigError("ClipConfig.num_frames = 1 of clips; it must be a multiple of a tubelet")


def _check_ramp(model: ModelConfig, config: PretrainConfig, steps: int) -> None:
    """Raises where there is a loss on visible tokens that would never count."""
    weights = [config.context_weight]
    if config.images is not None:
        weights.append(config.image_context_weight)
    ramp = config.context_ramp
    if ramp is not None and any(weights) and model.predictor.context_projection:
        right = f"None, or begin before the last of steps = {steps}"
        why = "else the loss on visible tokens never counts"
        check(ramp[0] < steps - 1, config, "context_ramp", f"{right}; {why}")


def _checked(where: str, parts: Params, model: ModelConfig) -> Params:
    """The parameters as float32; raises unless they are those of the model."""
    flat = flatten_dict(parts, sep="/")
    shapes = parameter_shapes(model)
    expected = {name: shapes[name] for name in shapes if name.partition("/")[0] in parts}
    check_names(where, {name: tuple(leaf.shape) for name, leaf in flat.items()}, expected)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), parts)


def clip_grid(encoder: EncoderConfig, clip: ClipConfig) -> Grid:
    """The (tubelets, rows, columns) of a clip's tokens.

    Args:
        encoder: gives the sizes of patch and tubelet.
        clip: gives those of the clip.

    Raises:
        InputError: the clip cannot be cut into patches.
    """
    shape = (1, clip.num_frames, clip.crop_size, clip.crop_size, 3)
    check_video(jax.ShapeDtypeStruct(shape, jnp.float32), encoder)
    return clip.grid(encoder)


def make_branches(
    model: ModelConfig, config: PretrainConfig, attention: Backend = "auto"
) -> tuple[PredictiveLoss, PredictiveLoss | None]:
    """Makes the losses of clips and of images; None where there are no images."""
    run = {"dtype": DTYPES[config.dtype], "attention": attention, "remat": config.remat}
    encoder = Encoder(model.encoder, **run)
    predictor = Predictor(model.predictor, model.encoder, **run)

    def branch(
        modality: Modality, clip: ClipConfig, masks: Sequence[MaskConfig], weight: float
    ) -> PredictiveLoss:
        grid = clip_grid(model.encoder, clip)
        return PredictiveLoss(
            encoder=encoder,
            predictor=predictor,
            modality=modality,
            grid=grid,
            masks=maskings(masks, grid, config.mask_quantile),
            mask_index=config.mask_index,
            context_weight=weight,
            context_ramp=config.context_ramp,
            distance_weighting=config.distance_weighting,
        )

    video = branch("video", config.data.clip, config.video_masks, config.context_weight)
    if config.images is None:
        return video, None
    how = (config.images.clip, config.image_masks, config.image_context_weight)
    return video, branch("image", *how)


def make_loss(video: PredictiveLoss, image: PredictiveLoss | None, image_share: float) -> Loss:
    """Builds `Task.loss` of batches that are `Clips`: r · images + (1 - r) · clips.

    Args:
        video: of the clips.
        image: of the images; None for none.
        image_share: r.

    Returns:
        The loss. Its metrics are those of the clips, and behind "image/" those of the images.
    """

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Clips, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        teacher, keys = carried["encoder"], jax.random.split(key)
        value, metrics = video(trained, teacher, batch.video, step, keys[0])
        if image is None:
            return value, metrics
        of_images, others = image(trained, teacher, batch.image, step, keys[1])
        value = image_share * of_images + (1 - image_share) * value
        return value, metrics | {f"image/{name}": other for name, other in others.items()}

    return loss


def make_follow(config: PretrainConfig, steps: int) -> Follow:
    """Builds `Task.follow`: the teacher goes a small part of the way to the student.

    Args:
        config: gives the momentum.
        steps: updates of the run.

    Returns:
        A function of the teacher, {"encoder"}, and the student to the new teacher; all parameters
        take part.
    """
    last = config.momentum if config.final_momentum is None else config.final_momentum
    # 1 - momentum is small: taken in float32 it would have four digits.
    first_rate, last_rate = np.float32(1 - config.momentum), np.float32(1 - last)
    length = int(config.optimizer.stretch * steps)

    def follow(carried: Params, trained: Params, step: Array) -> Params:
        progress = jnp.clip(step.astype(jnp.float32) / length, 0, 1)
        rate = first_rate + progress * (last_rate - first_rate)

        def go(teacher: Array, student: Array) -> Array:
            return teacher + rate * (student - teacher)

        return {"encoder": jax.tree.map(go, carried["encoder"], trained["encoder"])}

    return follow


def _feed(config: PretrainConfig, manifest: Manifest, images: Manifest | None) -> Feed:
    feeds = [config.data.feed(manifest)]
    if config.images is not None:
        feeds.append(config.images.feed(images))

    @contextlib.contextmanager
    def start(step: int, process_index: int, process_count: int) -> Iterator[Iterator[Clips]]:
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(feed(step, process_index, process_count)) for feed in feeds
            ]
            yield (Clips(*(batch.video for batch in group)) for group in zip(*readers, strict=True))

    return start


def _record(
    model: ModelConfig,
    config: PretrainConfig,
    manifest: Manifest,
    images: Manifest | None,
    given: Mapping[str, Params | None],
) -> dict[str, object]:
    """What tells a run from others; `remat` changes nothing but time."""
    return {
        "model": {name: model.to_json()[name] for name in ("encoder", "predictor")},
        **options(config, "data", "images", "remat"),
        **config.data.record(manifest),
        "images": None if config.images is None else config.images.record(images),
        **{k: None if parts is None else weights_sha256(parts) for k, parts in given.items()},
    }


def pretrained(model: ModelConfig, state: State) -> Model:
    """Makes a model of what was trained, to be saved with `jvjepa.weights.save`.

    Args:
        model: the architecture.
        state: the result of the run.

    Returns:
        The teacher, whose weights are those to use, and the predictor; float32.
    """
    plain = ModelConfig(encoder=model.encoder, predictor=model.predictor)
    params = {"encoder": state.carried["encoder"], "predictor": state.trained["predictor"]}
    return Model(
        config=plain,
        encoder=Encoder(plain.encoder),
        predictor=Predictor(plain.predictor, plain.encoder),
        params=params,
        source=None,
    )
