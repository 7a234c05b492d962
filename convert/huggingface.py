"""Hugging Face's V-JEPA 2, both ways: names and layouts of the tensors, and `config.json`.

Reference: `modeling_vjepa2.py` and `configuration_vjepa2.py` of transformers 5.23.
"""

import math
from collections.abc import Mapping
from typing import Any

from jvjepa.config import ClassifierConfig, EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.convert.tables import (
    CONV3D,
    MASK_TOKENS,
    QUERY_TOKENS,
    Entry,
    Row,
    dense,
    entries,
    norm,
)
from jvjepa.errors import ConfigError

# --- Tensors ------------------------------------------------------------------------------------


def _block(hf: str, ours: str) -> tuple[Row, ...]:
    """A block of the encoder or the predictor."""
    return (
        *norm(f"{hf}.norm1", f"{ours}/norm1"),
        *dense(f"{hf}.attention.query", f"{ours}/attention/query"),
        *dense(f"{hf}.attention.key", f"{ours}/attention/key"),
        *dense(f"{hf}.attention.value", f"{ours}/attention/value"),
        *dense(f"{hf}.attention.proj", f"{ours}/attention/proj"),
        *norm(f"{hf}.norm2", f"{ours}/norm2"),
        *dense(f"{hf}.mlp.fc1", f"{ours}/mlp/fc1"),
        *dense(f"{hf}.mlp.fc2", f"{ours}/mlp/fc2"),
    )


def _pooler_block(hf: str, attention: str, ours: str) -> tuple[Row, ...]:
    """A block of the pooler without the output projection, which only its self-attention has."""
    return (
        *norm(f"{hf}.layer_norm1", f"{ours}/norm1"),
        *dense(f"{hf}.{attention}.q_proj", f"{ours}/attention/query"),
        *dense(f"{hf}.{attention}.k_proj", f"{ours}/attention/key"),
        *dense(f"{hf}.{attention}.v_proj", f"{ours}/attention/value"),
        *norm(f"{hf}.layer_norm2", f"{ours}/norm2"),
        *dense(f"{hf}.mlp.fc1", f"{ours}/mlp/fc1"),
        *dense(f"{hf}.mlp.fc2", f"{ours}/mlp/fc2"),
    )


_SELF = "pooler.self_attention_layers.{i}"
_CROSS = "pooler.cross_attention_layer"

TABLE: tuple[Row, ...] = (
    *dense("encoder.embeddings.patch_embeddings.proj", "encoder/patch_embed", CONV3D),
    *_block("encoder.layer.{i}", "encoder/blocks"),
    *norm("encoder.layernorm", "encoder/norm"),
    *dense("predictor.embeddings.predictor_embeddings", "predictor/embed"),
    Row("predictor.embeddings.mask_tokens", "predictor/mask_tokens", MASK_TOKENS),
    *_block("predictor.layer.{i}", "predictor/blocks"),
    *norm("predictor.layernorm", "predictor/norm"),
    *dense("predictor.proj", "predictor/proj"),
    Row("pooler.query_tokens", "classifier/pooler/query_tokens", QUERY_TOKENS),
    *_pooler_block(_SELF, "self_attn", "classifier/pooler/blocks"),
    *dense(f"{_SELF}.self_attn.out_proj", "classifier/pooler/blocks/attention/proj"),
    *_pooler_block(_CROSS, "cross_attn", "classifier/pooler/cross_attention"),
    *dense("classifier", "classifier/linear"),
)


def hf_entries(config: ModelConfig) -> list[Entry]:
    """Lists every tensor of a Hugging Face checkpoint; see `jvjepa.convert.tables.entries`."""

    def rename(name: str) -> str:
        inner = config.classifier is not None and name.startswith(("encoder.", "predictor."))
        return f"vjepa2.{name}" if inner else name

    return entries(config, TABLE, rename)


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
        layer_norm_eps=hf["layer_norm_eps"],
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
        raise ConfigError(
            f"rope = {encoder.rope!r}: this is V-JEPA 2.1, and transformers only has V-JEPA 2"
        )
    if encoder.has_areas:
        raise ConfigError(
            f"area_layers = {encoder.area_layers}: transformers has full attention alone; convert "
            "without --area"
        )
    if config.action_predictor is not None:
        raise ConfigError("this is V-JEPA 2-AC, which transformers does not have")
    if config.anticipator is not None:
        raise ConfigError("there is an anticipator of actions, which transformers does not have")
    if predictor is None:
        raise ConfigError("there is no predictor; Hugging Face's V-JEPA 2 cannot be without one")
    _check_same(predictor, encoder, "layer_norm_eps")
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
        _check_same(classifier, encoder, "num_heads", "layer_norm_eps")
        if classifier.layers:
            raise ConfigError(
                f"ClassifierConfig.layers = {classifier.layers}: Hugging Face's V-JEPA 2 feeds its "
                "pooler the last layer alone"
            )
        if classifier.frames_per_clip is not None:
            _check_same(classifier, encoder, "frames_per_clip")
        new["num_pooler_layers"] = classifier.num_layers
        names = {str(i): name for i, name in enumerate(classifier.labels)}
        if dict(meant.get("id2label") or {}) != names:
            new["id2label"] = names
            new["label2id"] = {name: i for i, name in enumerate(classifier.labels)}
    return {**old, **{key: value for key, value in new.items() if meant.get(key) != value}}


def _check_same(
    part: PredictorConfig | ClassifierConfig, encoder: EncoderConfig, *fields: str
) -> None:
    for field in fields:
        value, right = getattr(part, field), getattr(encoder, field)
        if value != right:
            raise ConfigError(
                f"{type(part).__name__}.{field} = {value!r}: in Hugging Face's V-JEPA 2 it is "
                f"always the encoder's, {right!r}"
            )


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
