"""Hugging Face's V-JEPA 2, both ways: names and layouts of the tensors, and `config.json`.

Reference: `modeling_vjepa2.py` and `configuration_vjepa2.py` of transformers 5.23.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.config import ClassifierConfig, EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.errors import ConfigError
from jvjepa.weights import parameter_shapes

# --- Tensors ------------------------------------------------------------------------------------


class Transform(NamedTuple):
    """How one tensor (of one layer) is rearranged; no value changes.

    Args:
        to_ours: from Hugging Face's layout to ours.
        to_hf: the way back; the configuration gives the sizes that ours has merged.
    """

    to_ours: Callable[[NDArray[Any]], NDArray[Any]]
    to_hf: Callable[[NDArray[Any], EncoderConfig], NDArray[Any]]


class Row(NamedTuple):
    """One line of the table.

    Args:
        hf: the name in an encoder's checkpoint; `{i}` stands for the layer.
        ours: our flat name, of the whole stack where `hf` has `{i}`.
        transform: how one layer's tensor is rearranged.
    """

    hf: str
    ours: str
    transform: Transform


COPY = Transform(lambda x: x, lambda x, config: x)
LINEAR = Transform(lambda x: x.T, lambda x, config: x.T)  # [out, in] <-> [in, out]
CONV3D = Transform(  # [D, 3, t, p, p] <-> [t·p·p·3, D]
    lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
    lambda x, config: x.reshape(
        config.tubelet_size, config.patch_size, config.patch_size, 3, -1
    ).transpose(4, 3, 0, 1, 2),
)
MASK_TOKENS = Transform(lambda x: x[:, 0, 0], lambda x, config: x[:, None, None])
QUERY_TOKENS = Transform(lambda x: x[0], lambda x, config: x[None])


def _layer(hf: str, ours: str, kernel: Transform = LINEAR) -> tuple[Row, ...]:
    return (
        Row(f"{hf}.weight", f"{ours}/kernel", kernel),
        Row(f"{hf}.bias", f"{ours}/bias", COPY),
    )


def _norm(hf: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{hf}.weight", f"{ours}/scale", COPY),
        Row(f"{hf}.bias", f"{ours}/bias", COPY),
    )


def _block(hf: str, ours: str) -> tuple[Row, ...]:
    """A block of the encoder or the predictor."""
    return (
        *_norm(f"{hf}.norm1", f"{ours}/norm1"),
        *_layer(f"{hf}.attention.query", f"{ours}/attention/query"),
        *_layer(f"{hf}.attention.key", f"{ours}/attention/key"),
        *_layer(f"{hf}.attention.value", f"{ours}/attention/value"),
        *_layer(f"{hf}.attention.proj", f"{ours}/attention/proj"),
        *_norm(f"{hf}.norm2", f"{ours}/norm2"),
        *_layer(f"{hf}.mlp.fc1", f"{ours}/mlp/fc1"),
        *_layer(f"{hf}.mlp.fc2", f"{ours}/mlp/fc2"),
    )


def _pooler_block(hf: str, attention: str, ours: str) -> tuple[Row, ...]:
    """A block of the pooler without the output projection, which only its self-attention has."""
    return (
        *_norm(f"{hf}.layer_norm1", f"{ours}/norm1"),
        *_layer(f"{hf}.{attention}.q_proj", f"{ours}/attention/query"),
        *_layer(f"{hf}.{attention}.k_proj", f"{ours}/attention/key"),
        *_layer(f"{hf}.{attention}.v_proj", f"{ours}/attention/value"),
        *_norm(f"{hf}.layer_norm2", f"{ours}/norm2"),
        *_layer(f"{hf}.mlp.fc1", f"{ours}/mlp/fc1"),
        *_layer(f"{hf}.mlp.fc2", f"{ours}/mlp/fc2"),
    )


_SELF = "pooler.self_attention_layers.{i}"
_CROSS = "pooler.cross_attention_layer"

TABLE: tuple[Row, ...] = (
    *_layer("encoder.embeddings.patch_embeddings.proj", "encoder/patch_embed", CONV3D),
    *_block("encoder.layer.{i}", "encoder/blocks"),
    *_norm("encoder.layernorm", "encoder/norm"),
    *_layer("predictor.embeddings.predictor_embeddings", "predictor/embed"),
    Row("predictor.embeddings.mask_tokens", "predictor/mask_tokens", MASK_TOKENS),
    *_block("predictor.layer.{i}", "predictor/blocks"),
    *_norm("predictor.layernorm", "predictor/norm"),
    *_layer("predictor.proj", "predictor/proj"),
    Row("pooler.query_tokens", "pooler/query_tokens", QUERY_TOKENS),
    *_pooler_block(_SELF, "self_attn", "pooler/blocks"),
    *_layer(f"{_SELF}.self_attn.out_proj", "pooler/blocks/attention/proj"),
    *_pooler_block(_CROSS, "cross_attn", "pooler/cross_attention"),
    *_layer("classifier", "classifier"),
)
_BY_OURS = {row.ours: row for row in TABLE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of Hugging Face's and its place in ours.

    Args:
        hf: its name.
        hf_shape: its shape.
        ours: our flat name.
        layer: its row in our stack; None where ours is not stacked.
        transform: how it is rearranged.
    """

    hf: str
    hf_shape: tuple[int, ...]
    ours: str
    layer: int | None
    transform: Transform

    @property
    def part(self) -> str:
        """Which part it belongs to: encoder, predictor, pooler or classifier."""
        return self.ours.split("/")[0]


def entries(config: ModelConfig) -> list[Entry]:
    """Lists every tensor of a checkpoint.

    Args:
        config: the architecture.

    Returns:
        One entry for each tensor of Hugging Face's, in the order of `parameter_shapes`, layers
        ascending.
    """
    found = []
    for ours, shape in parameter_shapes(config).items():
        row = _BY_OURS[ours]
        stacked = "{i}" in row.hf
        prefix = "vjepa2." if config.classifier and row.hf.startswith(("enc", "pred")) else ""
        piece = np.broadcast_to(np.float32(0), shape[1:] if stacked else shape)  # takes no memory
        hf_shape = row.transform.to_hf(piece, config.encoder).shape
        for layer in range(shape[0]) if stacked else (None,):
            name = prefix + row.hf.replace("{i}", str(layer))
            found.append(
                Entry(hf=name, hf_shape=hf_shape, ours=ours, layer=layer, transform=row.transform)
            )
    return found


# --- config.json --------------------------------------------------------------------------------

_ENCODER_ONLY = "VJEPA2Model"
_CLASSIFIER = "VJEPA2ForVideoClassification"

# What transformers' VJEPA2Config assumes for keys that are not there.
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "crop_size": 256,
    "frames_per_clip": 64,
    "tubelet_size": 2,
    "hidden_size": 1024,
    "in_chans": 3,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "num_pooler_layers": 3,
    "pred_hidden_size": 384,
    "pred_num_attention_heads": 12,
    "pred_num_hidden_layers": 12,
    "pred_num_mask_tokens": 10,
    "pred_mlp_ratio": 4.0,
}

# Keys that change the forward pass, with the one value that we can run. Those that transformers'
# defaults do not have are of V-JEPA 2.1 and of other forms of the model; absent is right too.
_ONLY: dict[str, Any] = {
    "in_chans": 3,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_SiLU": False,
    "use_rope_interleave": False,
    "interpolate_rope": False,
    "use_modality_embeddings": False,
    "use_image_patch_embedder": False,
    "use_context_projection": False,
    "quantization_config": None,
    "per_layer_config": None,
}


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """Reads the configuration of a Hugging Face V-JEPA 2 checkpoint.

    Args:
        values: the object in its `config.json`.

    Returns:
        The architecture; the pooler has as many heads as the encoder, as in Hugging Face's code.

    Raises:
        ConfigError: it is another model's, has an impossible value, or asks for something that
            changes the forward pass and that this library does not do.
    """
    model_type = values.get("model_type")
    if model_type != "vjepa2":
        raise ConfigError(f"model_type = {model_type!r}; it must be 'vjepa2'")
    for key, right in _ONLY.items():
        if values.get(key, right) != right:
            raise ConfigError(f"{key} = {values[key]!r} is not supported; only {right!r} is")
    hf = {**DEFAULTS, **values}
    encoder = EncoderConfig(
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_dim=_mlp_dim(hf, "hidden_size", "mlp_ratio"),
        crop_size=hf["crop_size"],
        frames_per_clip=hf["frames_per_clip"],
        patch_size=hf["patch_size"],
        tubelet_size=hf["tubelet_size"],
        layer_norm_eps=hf["layer_norm_eps"],
        rope="tiled",
    )
    predictor = PredictorConfig(
        hidden_size=hf["pred_hidden_size"],
        num_layers=hf["pred_num_hidden_layers"],
        num_heads=hf["pred_num_attention_heads"],
        mlp_dim=_mlp_dim(hf, "pred_hidden_size", "pred_mlp_ratio"),
        num_mask_tokens=hf["pred_num_mask_tokens"],
    )
    classifier = None
    if _has_classifier(hf):
        classifier = ClassifierConfig(
            labels=_labels(hf),
            num_layers=hf["num_pooler_layers"],
            num_heads=hf["num_attention_heads"],
            layer_norm_eps=hf["layer_norm_eps"],
        )
    return ModelConfig(encoder=encoder, predictor=predictor, classifier=classifier)


def to_hf_config(config: ModelConfig, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Writes a configuration as Hugging Face's; `from_hf_config` is the way back.

    `rope_grid` has no place there and is left out: Hugging Face's code always does "config".

    Args:
        config: the architecture.
        base: the `config.json` that it came from, kept word for word where it says the same; or
            None.

    Returns:
        The object for `config.json`.

    Raises:
        ConfigError: Hugging Face's code cannot run this architecture.
    """
    encoder, predictor, classifier = config.encoder, config.predictor, config.classifier
    if encoder.rope != "tiled":
        raise ConfigError(f"rope = {encoder.rope!r}: Hugging Face's V-JEPA 2 only does 'tiled'")
    if predictor is None:
        raise ConfigError("there is no predictor; Hugging Face's V-JEPA 2 cannot be without one")
    old = {"model_type": "vjepa2", **DEFAULTS} if base is None else dict(base)
    meant = {**DEFAULTS, **old}
    new: dict[str, Any] = {
        **_ratio("mlp_ratio", encoder.hidden_size, encoder.mlp_dim, meant),
        **_ratio("pred_mlp_ratio", predictor.hidden_size, predictor.mlp_dim, meant),
        "architectures": [_ENCODER_ONLY if classifier is None else _CLASSIFIER],
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "crop_size": encoder.crop_size,
        "frames_per_clip": encoder.frames_per_clip,
        "patch_size": encoder.patch_size,
        "tubelet_size": encoder.tubelet_size,
        "layer_norm_eps": encoder.layer_norm_eps,
        "pred_hidden_size": predictor.hidden_size,
        "pred_num_hidden_layers": predictor.num_layers,
        "pred_num_attention_heads": predictor.num_heads,
        "pred_num_mask_tokens": predictor.num_mask_tokens,
    }
    if classifier is not None:
        for field in ("num_heads", "layer_norm_eps"):
            value, right = getattr(classifier, field), getattr(encoder, field)
            if value != right:
                raise ConfigError(
                    f"ClassifierConfig.{field} = {value!r}: in Hugging Face's V-JEPA 2 it is "
                    f"always the encoder's, {right!r}"
                )
        new["num_pooler_layers"] = classifier.num_layers
        names = {str(i): name for i, name in enumerate(classifier.labels)}
        if dict(meant.get("id2label") or {}) != names:
            new["id2label"] = names
            new["label2id"] = {name: i for i, name in enumerate(classifier.labels)}
    return {**old, **{key: value for key, value in new.items() if meant.get(key) != value}}


def _has_classifier(hf: Mapping[str, Any]) -> bool:
    architectures = hf.get("architectures")
    if architectures not in ([_ENCODER_ONLY], [_CLASSIFIER]):
        raise ConfigError(
            f"architectures = {architectures!r}; it must be [{_ENCODER_ONLY!r}] or "
            f"[{_CLASSIFIER!r}]"
        )
    return architectures == [_CLASSIFIER]


def _mlp_dim(hf: Mapping[str, Any], width_key: str, ratio_key: str) -> int:
    width, ratio = hf[width_key], hf[ratio_key]
    for key, value, kinds in ((width_key, width, int), (ratio_key, ratio, (int, float))):
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not number or not 0 < value < 1e6:
            raise ConfigError(f"{key} = {value!r}; it must be a number above 0")
    return int(width * ratio)


def _ratio(key: str, width: int, mlp_dim: int, meant: Mapping[str, Any]) -> dict[str, float]:
    """The ratio under its key: the one that is there if it gives `mlp_dim`, else one that does."""
    if int(width * meant[key]) == mlp_dim:
        return {key: meant[key]}
    ratio = mlp_dim / width
    if int(width * ratio) < mlp_dim:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {key: ratio}


def _labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    id2label, count = hf.get("id2label"), hf.get("num_labels")
    if id2label is None:  # transformers leaves it out where it says nothing
        count = 2 if count is None else count
        if not isinstance(count, int) or not 0 < count < 1e6:
            raise ConfigError(f"num_labels = {count!r}; it must be a whole number above 0")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(id2label, dict):
        raise ConfigError(f"id2label = {id2label!r}; it must be an object of number: name")
    wanted = {str(i) for i in range(len(id2label))}
    if {str(key) for key in id2label} != wanted:
        odd = sorted({str(key) for key in id2label} - wanted)
        raise ConfigError(
            f"id2label has the keys {odd}; the {len(id2label)} keys must be 0 to "
            f"{len(id2label) - 1}"
        )
    if count is not None and count != len(id2label):
        raise ConfigError(f"num_labels = {count!r}, but id2label has {len(id2label)} names")
    by_number = {int(key): name for key, name in id2label.items()}
    return tuple(by_number[i] for i in range(len(by_number)))
