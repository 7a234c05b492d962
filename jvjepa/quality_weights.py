"""Video-quality models: put together, and kept in folders like every converted checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jvjepa.attention import Backend, check_backend
from jvjepa.config import ModelConfig, PoolerConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import InputError
from jvjepa.heads import Pooler
from jvjepa.parameters import parameter_shapes
from jvjepa.quality_config import Feature, HeadConfig, QualityConfig
from jvjepa.quality_modules import SCORES, MOSHead, VideoQuality
from jvjepa.records import QUALITY_FORMAT, Source, read_architecture
from jvjepa.storage import new_folder
from jvjepa.text import TextEncoder
from jvjepa.text_weights import TextModel, read_tokenizer, text_shapes
from jvjepa.tokenizer import Tokenizer
from jvjepa.typing import DType, Params
from jvjepa.weights import (
    WEIGHTS_FILE,
    Model,
    check_dtype,
    read_params,
    stored_tensors,
    write_folder,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityModel:
    """A loaded video-quality model.

    Args:
        config: the architecture.
        encoder: the module to apply to `params["encoder"]`.
        text: the module to apply to `params["text"]`.
        head: the module to apply to `params["head"]`.
        pooler: the module to apply to `params["pooler"]`, or None.
        params: nested dictionaries of arrays, one for each part.
        tokenizer: from prompts to token ids.
        source: where the weights came from, or None.
    """

    config: QualityConfig
    encoder: Encoder
    text: TextEncoder
    head: MOSHead
    pooler: Pooler | None = None
    params: Params
    tokenizer: Tokenizer
    source: Source | None

    @property
    def module(self) -> VideoQuality:
        """All parts as one, to apply to `params`."""
        return VideoQuality(self.encoder, self.text, self.head, self.pooler, self.config.feature)


def new_quality(
    model: Model,
    text: TextModel,
    *,
    feature: Feature = "first_token",
    head: HeadConfig | None = None,
    num_frames: int = 64,
    seed: int = 0,
) -> QualityModel:
    """Puts a model together whose head is to be trained.

    Args:
        model: gives the video encoder, and its classifier's pooler for `feature` = "attentive".
        text: the text encoder; its blocks must be stacked as the video encoder's are.
        feature: what the head sees of a video, see `QualityConfig`.
        head: the head; None takes QualiVision's.
        num_frames: frames that are taken of a video.
        seed: of the head's random parameters.

    Returns:
        The model; its head computes as the video encoder does.

    Raises:
        InputError: there is no pooler that sees the last layer alone, or blocks are stacked unlike.
        ConfigError: the parts do not fit together.
    """
    encoder = model.encoder
    if text.encoder.scan != encoder.scan:
        raise InputError("the blocks of one encoder are stacked and those of the other are not")
    params = {"encoder": model.params["encoder"], "text": text.params}
    pooler = None
    if feature == "attentive":
        classifier = model.config.classifier
        if classifier is None or classifier.layers:
            found = "none" if classifier is None else f"one that sees layers {classifier.layers}"
            raise InputError(
                f"feature = 'attentive' needs a classifier's pooler, which sees the last layer "
                f"alone; the model has {found}"
            )
        fields = ("num_layers", "num_heads", "layer_norm_eps")
        pooler = PoolerConfig(**{name: getattr(classifier, name) for name in fields})
        params["pooler"] = model.params["classifier"]["pooler"]
    config = QualityConfig(
        encoder=model.config.encoder,
        text=text.config,
        head=head or HeadConfig(),
        feature=feature,
        pooler=pooler,
        num_frames=num_frames,
    )
    dtypes = (encoder.dtype, encoder.param_dtype)
    parts = modules(config, dtypes, encoder.attention, encoder.scan)
    features = [jnp.zeros(x.shape, x.dtype) for x in _features(config)]
    params["head"] = jax.jit(parts["head"].init)(jax.random.key(seed), *features)["params"]
    parts |= {"encoder": encoder, "text": text.encoder}
    source = model.source and dataclasses.replace(model.source, text=text.source)
    return QualityModel(
        config=config, **parts, params=params, tokenizer=text.tokenizer, source=source
    )


def quality_shapes(config: QualityConfig) -> dict[str, tuple[int, ...]]:
    """Lists every parameter of a video-quality model.

    Args:
        config: the architecture.

    Returns:
        Shape by flat name ("head/fc1/kernel"), in the order in which they are stored: those of the
        video encoder, the text encoder, the head, and the pooler if there is one.
    """
    parts = modules(config)
    tokens = jax.ShapeDtypeStruct((1, 1, config.encoder.hidden_size), jnp.float32)
    inputs = {"head": _features(config), "pooler": [tokens]}
    trees = {
        name: jax.eval_shape(parts[name].init, jax.random.key(0), *inputs[name])["params"]
        for name in inputs
        if parts[name] is not None
    }
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten_dict(trees, sep="/").items()}
    return parameter_shapes(ModelConfig(encoder=config.encoder)) | text_shapes(config.text) | shapes


def load_quality(
    folder: str | Path,
    *,
    dtype: str | None = None,
    attention: Backend = "auto",
    scan: bool = True,
) -> QualityModel:
    """Loads a video-quality model; needs neither torch nor a network.

    Args:
        folder: what `jvjepa convert`, `jvjepa train mos`, or `save_quality` wrote.
        dtype: of the computation, "float32" or "bfloat16"; None takes that of the stored weights.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: whether the blocks of each part are stacked, see `jvjepa.Encoder`.

    Returns:
        The model, its parameters on JAX's default device.

    Raises:
        CheckpointError: the folder is not whole, or is none of a video-quality model.
        ConfigError: `dtype` or `attention` is unknown.
        InputError: the library tokenizers is not installed.
    """
    check_dtype(dtype)
    check_backend(attention)
    folder = Path(folder)
    config, source = read_quality_record(folder)
    tokenizer = read_tokenizer(folder, config.text)
    path = folder / WEIGHTS_FILE
    params, dtypes = read_params(path, quality_shapes(config), scan=scan, dtype=dtype)
    parts = modules(config, dtypes, attention, scan)
    return QualityModel(config=config, **parts, params=params, tokenizer=tokenizer, source=source)


def read_quality_record(folder: str | Path) -> tuple[QualityConfig, Source | None]:
    """Reads the `config.json` of a video-quality model.

    Args:
        folder: where it is.

    Returns:
        The architecture, and where the weights came from.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    return read_architecture(
        folder, QUALITY_FORMAT, "video-quality model", "quality", QualityConfig.from_json
    )


def save_quality(folder: str | Path, model: QualityModel, *, force: bool = False) -> None:
    """Saves a video-quality model as a folder, which appears whole or not at all.

    Args:
        folder: where; it must not exist unless `force`.
        model: its `params` must be those that its `config` asks for, all of one dtype.
        force: replace the folder.

    Raises:
        InputError: the folder exists, or the parameters do not fit.
    """
    shapes = quality_shapes(model.config)
    dtype, tensors = stored_tensors(model.params, shapes)
    config = {"quality": model.config.to_json()}
    with new_folder(Path(folder), WEIGHTS_FILE, force=force) as work:
        write_folder(work, QUALITY_FORMAT, config, model.source, dtype, shapes, tensors)
        model.tokenizer.save(work)


def _features(config: QualityConfig) -> list[jax.ShapeDtypeStruct]:
    """The shapes of what the head takes."""
    widths = (config.encoder.hidden_size, config.text.hidden_size)
    return [jax.ShapeDtypeStruct((1, width), jnp.float32) for width in widths]


def modules(
    config: QualityConfig,
    dtypes: tuple[DType, DType] = (jnp.float32, jnp.float32),
    attention: Backend = "auto",
    scan: bool = True,
) -> dict[str, Any]:
    """Makes the fields of `QualityModel` that are modules.

    Args:
        config: the architecture.
        dtypes: of the computation, and of the parameters.
        attention: the attention backend.
        scan: whether blocks are stacked.

    Returns:
        By name: "encoder", "text", "head", and "pooler", which may be None.
    """
    how = (*dtypes, attention, scan)
    head, pooler = config.head, None
    if config.pooler is not None:
        pooler = Pooler(config.pooler, config.encoder.hidden_size, *how)
    return {
        "encoder": Encoder(config.encoder, *how),
        "text": TextEncoder(config.text, *how),
        "head": MOSHead(head.hidden, len(SCORES), head.dropout, head.bounded, *dtypes),
        "pooler": pooler,
    }
