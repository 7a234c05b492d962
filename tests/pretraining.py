"""Small models to pretrain, and options for them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jvjepa.area import AreaOptions
from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.masks import MaskConfig
from jvjepa.parameters import parameter_shapes
from jvjepa.train.data import ClipConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.manifest import Manifest
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.predictive import Masking, PredictiveLoss
from jvjepa.train.pretrain import PretrainConfig, make_branches, pretrain_task
from jvjepa.train.task import Task
from jvjepa.typing import Array, Params

TOLERANCE = 1e-5
SIZES = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 40, "patch_size": 8}
SMALL = {"hidden_size": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
V2 = ModelConfig(encoder=EncoderConfig(**SIZES, crop_size=48), predictor=PredictorConfig(**SMALL))
V2_1 = ModelConfig(
    encoder=EncoderConfig(
        **SIZES, crop_size=48, rope="interleaved", image_tokenizer=True, levels=(0, 1)
    ),
    predictor=PredictorConfig(
        **SMALL,
        num_mask_tokens=3,
        rope="interleaved",
        num_levels=2,
        context_projection=True,
        modality_embeddings=True,
    ),
)
AREAS = ModelConfig(
    encoder=AreaOptions(layers=(0, 1), temporal_splits=1).of(V2.encoder), predictor=V2.predictor
)
BLOCKS = MaskConfig(num_blocks=2, spatial_scale=(0.15, 0.3))
BLOCK = MaskConfig(num_blocks=1, spatial_scale=(0.4, 0.6))
CLIP = ClipConfig(num_frames=4, fps=8, crop_size=48)
CONFIG = PretrainConfig(
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
    data=DataConfig(clip=CLIP, batch_size=2),
    video_masks=(BLOCKS,),
    image_masks=(BLOCKS,),
    context_ramp=(10, 20),
    momentum=0.9,
)
WITH_IMAGES = dataclasses.replace(
    CONFIG,
    images=DataConfig(clip=dataclasses.replace(CLIP, num_frames=1), batch_size=3),
    image_share=0.3,
    image_context_weight=0.2,
)
NOWHERE = Manifest(
    source="nowhere",
    paths=("a.mp4",) * 8,
    starts=np.zeros(8),
    ends=np.full(8, np.inf),
    labels=np.full(8, -1, np.int32),
)
STEP = jnp.asarray(16, jnp.int32)  # the ramp is at 0.6
# Compiling takes nearly all of the time here, and half of that optimises machine code.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config: ModelConfig, seed: int) -> Params:
    """Of the size that trained ones have, none of them zero."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        scale = shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        value = scale * rng.normal(size=shape) + name.endswith("scale")
        return jnp.asarray(value, jnp.float32)

    shapes = parameter_shapes(config)
    return unflatten_dict({name: draw(name, shapes[name]) for name in shapes}, sep="/")


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def branch_of(model: ModelConfig, grid: tuple[int, int, int], **options: Any) -> PredictiveLoss:
    """Of clips on a grid that need not be square, with masks of which none is cut."""
    branch, _ = make_branches(model, CONFIG)
    size = int(np.prod(grid))
    masks = tuple(Masking(mask, size - 1, size - 2) for mask in (BLOCKS, BLOCK))
    return dataclasses.replace(branch, **{"grid": grid, "masks": masks, **options})


def task_of(model: ModelConfig = V2_1, config: PretrainConfig = CONFIG, **options: Any) -> Task:
    images = None if config.images is None else NOWHERE
    return pretrain_task(model, config, NOWHERE, images, steps=100, **options)
