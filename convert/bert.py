"""Hugging Face's BERT sentence encoders: names of the tensors, `config.json`, and how they pool.

Reference: `modeling_bert.py` and `configuration_bert.py` of transformers 5.23, and the modules
`Transformer` and `Pooling` of sentence-transformers, whose files stand beside the checkpoint's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvjepa.convert.source import CONFIG_FILE, StoredTensor, read_json, read_object
from jvjepa.convert.tables import COPY, Entry, Row, dense, norm, shape_entries
from jvjepa.errors import CheckpointError, ConfigError
from jvjepa.text_config import Pooling, TextConfig
from jvjepa.text_weights import text_shapes
from jvjepa.tokenizer import FILES as TOKENIZER_FILES

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
_PROMPTS_FILE = "config_sentence_transformers.json"
FILES = (CONFIG_FILE, MODULES_FILE, POOLING_FILE, _PROMPTS_FILE, *TOKENIZER_FILES)

# --- Tensors ------------------------------------------------------------------------------------

_LAYER = "encoder.layer.{i}"

TABLE: tuple[Row, ...] = (
    Row("embeddings.word_embeddings.weight", "text/word_embed", COPY),
    Row("embeddings.position_embeddings.weight", "text/position_embed", COPY),
    Row("embeddings.token_type_embeddings.weight", "text/segment_embed", COPY),
    *norm("embeddings.LayerNorm", "text/embed_norm"),
    *dense(f"{_LAYER}.attention.self.query", "text/blocks/attention/query"),
    *dense(f"{_LAYER}.attention.self.key", "text/blocks/attention/key"),
    *dense(f"{_LAYER}.attention.self.value", "text/blocks/attention/value"),
    *dense(f"{_LAYER}.attention.output.dense", "text/blocks/attention/proj"),
    *norm(f"{_LAYER}.attention.output.LayerNorm", "text/blocks/norm1"),
    *dense(f"{_LAYER}.intermediate.dense", "text/blocks/mlp/fc1"),
    *dense(f"{_LAYER}.output.dense", "text/blocks/mlp/fc2"),
    *norm(f"{_LAYER}.output.LayerNorm", "text/blocks/norm2"),
)

_POOLER = "BERT's pooler, of its pretraining; a sentence is embedded by its tokens themselves"
DROPPED: dict[str, str] = {
    "embeddings.position_ids": "the numbers 0, 1, 2, .. of the positions; no weights",
    "pooler.dense.weight": _POOLER,
    "pooler.dense.bias": _POOLER,
}


def bert_entries(config: TextConfig) -> list[Entry]:
    """Lists every tensor of a checkpoint; see `jvjepa.convert.tables.entries`."""
    return shape_entries(text_shapes(config), TABLE)


def split(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Parts the tensors of a checkpoint in those that are used and, with the reason, the others."""
    dropped = {name: DROPPED[name] for name in tensors if name in DROPPED}
    return {name: x for name, x in tensors.items() if name not in dropped}, dropped


# --- config.json and its neighbours -------------------------------------------------------------

# What transformers' BertConfig assumes for keys that are not there.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}

# Keys that change the forward pass, with the one value that we can run; absent is right too.
_ONLY: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


def is_bert(folder: Path) -> bool:
    """Whether a folder's `config.json` is of a BERT."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_object(path).get("model_type") == "bert"


def read_text_config(folder: Path) -> tuple[dict[str, Any], TextConfig]:
    """Reads what a folder says of a sentence encoder.

    Args:
        folder: a Hugging Face checkpoint with the files of sentence-transformers.

    Returns:
        The object in its `config.json`, word for word, and the architecture.

    Raises:
        CheckpointError: a file is missing or not JSON.
        ConfigError: it describes another model, or one that does what we do not.
    """
    path = folder / CONFIG_FILE
    values = read_object(path)
    pooling, width = _read_pooling(folder)
    try:
        config = from_hf_config(values, pooling)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if width != config.hidden_size:
        raise ConfigError(
            f"{folder / POOLING_FILE}: word_embedding_dimension = {width!r}; the encoder's width "
            f"is {config.hidden_size}"
        )
    return values, config


def from_hf_config(values: Mapping[str, Any], pooling: Pooling) -> TextConfig:
    """Reads the configuration of a Hugging Face BERT.

    Args:
        values: the object in its `config.json`.
        pooling: how one vector is made of its tokens.

    Returns:
        The architecture.

    Raises:
        ConfigError: it is another model's, has an impossible value, or asks for something that
            changes the forward pass and that this library does not do.
    """
    model_type = values.get("model_type")
    if model_type != "bert":
        raise ConfigError(f"model_type = {model_type!r}; it must be 'bert'")
    for key, right in _ONLY.items():
        if values.get(key, right) != right:
            raise ConfigError(f"{key} = {values[key]!r} is not supported; only {right!r} is")
    hf = {**_DEFAULTS, **values}
    return TextConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        type_vocab_size=hf["type_vocab_size"],
        layer_norm_eps=hf["layer_norm_eps"],
        pooling=pooling,
    )


def _read_pooling(folder: Path) -> tuple[Pooling, object]:
    """How the tokens are pooled, and the width that is said there."""
    _check_modules(folder)
    path = folder / POOLING_FILE
    values = read_object(path)
    modes = {key: on for key, on in values.items() if key.startswith("pooling_mode_") and on}
    known: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
    }
    if len(modes) != 1 or not modes.keys() <= known.keys():
        found = ", ".join(modes) or "none"
        raise ConfigError(f"{path}: the pooling is {found}; one of {', '.join(known)} is supported")
    return known[next(iter(modes))], values.get("word_embedding_dimension")


def _check_modules(folder: Path) -> None:
    """Raises ConfigError where sentence-transformers would do more than encode and pool."""
    path = folder / MODULES_FILE
    if not path.exists():
        right = "a sentence encoder, such as BAAI/bge-large-en-v1.5, has it"
        raise CheckpointError(f"{path} does not exist; {right}")
    modules = read_json(path)
    right = ["Transformer", "Pooling", "Normalize"]  # the last is optional: we always normalise
    listed = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules] if listed else []
    if kinds not in (right, right[:2]) or modules[1].get("path") != Path(POOLING_FILE).parent.name:
        raise ConfigError(f"{path} lists the modules {kinds}; {right} are supported")
    prompts = folder / _PROMPTS_FILE
    if prompts.exists() and read_object(prompts).get("default_prompt_name") is not None:
        raise ConfigError(f"{prompts}: default_prompt_name, a text before each, is not supported")
