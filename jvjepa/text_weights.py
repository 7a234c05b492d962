"""Converted text encoders: folders with `config.json`, `model.safetensors`, and a tokenizer."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jvjepa.attention import Backend, check_backend
from jvjepa.records import TEXT_FORMAT, Source, read_architecture
from jvjepa.storage import new_folder
from jvjepa.text import TextEncoder
from jvjepa.text_config import TextConfig
from jvjepa.tokenizer import Tokenizer
from jvjepa.typing import Params
from jvjepa.weights import (
    WEIGHTS_FILE,
    check_dtype,
    read_params,
    stored_tensors,
    write_folder,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel:
    """A loaded text encoder.

    Args:
        config: the architecture.
        encoder: the module to apply to `params`.
        params: nested dictionaries of arrays.
        tokenizer: from prompts to token ids.
        source: where the weights came from, or None.
    """

    config: TextConfig
    encoder: TextEncoder
    params: Params
    tokenizer: Tokenizer
    source: Source | None


@functools.cache
def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Lists every parameter of a text encoder.

    Args:
        config: the architecture.

    Returns:
        Shape by flat name ("text/blocks/mlp/fc1/kernel"), in the order in which they are stored.
        The parameters of blocks are stacked, [L, ...].
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(TextEncoder(config).init, jax.random.key(0))
    tree = jax.eval_shape(init, ids, ids == 0)["params"]
    return {name: tuple(leaf.shape) for name, leaf in flatten_dict({"text": tree}, sep="/").items()}


def read_tokenizer(folder: str | Path, config: TextConfig) -> Tokenizer:
    """Reads the tokenizer of a text encoder, see `Tokenizer.read`."""
    sizes = {"max_positions": config.max_positions, "vocab_size": config.vocab_size}
    return Tokenizer.read(folder, **sizes)


def load_text(
    folder: str | Path,
    *,
    dtype: str | None = None,
    attention: Backend = "auto",
    scan: bool = True,
) -> TextModel:
    """Loads a converted text encoder; needs neither torch nor a network.

    Args:
        folder: what `jvjepa convert` made of a BERT sentence encoder.
        dtype: of the computation, "float32" or "bfloat16"; None takes that of the stored weights.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: whether the blocks are stacked, see `TextEncoder`.

    Returns:
        The text encoder, its parameters on JAX's default device.

    Raises:
        CheckpointError: the folder is not whole.
        ConfigError: `dtype` or `attention` is unknown.
        InputError: the library tokenizers is not installed.
    """
    check_dtype(dtype)
    check_backend(attention)
    folder = Path(folder)
    config, source = read_text_record(folder)
    tokenizer = read_tokenizer(folder, config)
    path = folder / WEIGHTS_FILE
    params, dtypes = read_params(path, text_shapes(config), scan=scan, dtype=dtype)
    return TextModel(
        config=config,
        encoder=TextEncoder(config, *dtypes, attention, scan),
        params=params["text"],
        tokenizer=tokenizer,
        source=source,
    )


def read_text_record(folder: str | Path) -> tuple[TextConfig, Source | None]:
    """Reads the `config.json` of a converted text encoder.

    Args:
        folder: where it is.

    Returns:
        The architecture, and where the weights came from.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    return read_architecture(
        folder, TEXT_FORMAT, "converted text encoder", "text", TextConfig.from_json
    )


def save_text(folder: str | Path, model: TextModel, *, force: bool = False) -> None:
    """Saves a text encoder as a folder that `load_text` reads; it appears whole or not at all.

    Args:
        folder: where; it must not exist unless `force`.
        model: its `params` must be those that its `config` asks for, all of one dtype.
        force: replace the folder.

    Raises:
        InputError: the folder exists, or the parameters do not fit.
    """
    shapes = text_shapes(model.config)
    dtype, tensors = stored_tensors({"text": model.params}, shapes)
    config = {"text": model.config.to_json()}
    with new_folder(Path(folder), WEIGHTS_FILE, force=force) as work:
        write_folder(work, TEXT_FORMAT, config, model.source, dtype, shapes, tensors)
        model.tokenizer.save(work)
