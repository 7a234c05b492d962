"""Tiny video-quality models and tokenizers, in memory and on disk; torch is not needed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jvjepa.config import EncoderConfig, PoolerConfig
from jvjepa.quality import QualityConfig, QualityModel, load_quality, save_quality
from jvjepa.quality_config import Feature, HeadConfig
from jvjepa.quality_weights import modules, quality_shapes
from jvjepa.text_config import Pooling, TextConfig
from jvjepa.text_weights import read_tokenizer
from jvjepa.tokenizer import Tokenizer
from jvjepa.typing import Params

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *"a the cat dog plays sleeps on piano red car drives through rain in city at night".split(),
    *"##s ##ing ##ed un ##known é e i ! , .".split(),
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
)
VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *WORDS)))
PROMPTS = ("a cat plays the piano", "The red car drives, through rain!", "unknown")
MAX_LENGTH = 12  # tokens of a prompt


def tiny_text_config(**changes: int | str) -> TextConfig:
    """Width 24, 2 layers."""
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 3,
        "mlp_dim": 40,
        "max_positions": 16,
    }
    return TextConfig(**{**sizes, **changes})


def tiny_quality_config(
    *, feature: Feature = "first_token", bounded: str | None = None, num_frames: int = 4
) -> QualityConfig:
    """A video encoder of width 48 for 32 pixels and 4 frames, 2 layers."""
    return QualityConfig(
        encoder=EncoderConfig(
            hidden_size=48,
            num_layers=2,
            num_heads=2,
            mlp_dim=64,
            crop_size=32,
            frames_per_clip=4,
        ),
        text=tiny_text_config(),
        head=HeadConfig(hidden=(16, 8), bounded=bounded),
        feature=feature,
        pooler=PoolerConfig(num_layers=1, num_heads=2) if feature == "attentive" else None,
        num_frames=num_frames,
    )


def random_quality_params(config: QualityConfig, seed: int = 0) -> Params:
    """Parameters of which none is zero or one, of the size that trained ones have."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        scale = 1.0 / np.sqrt(shape[-2]) if name.endswith("kernel") else 0.3
        value = rng.normal(size=shape) * scale + (1.0 if name.endswith("scale") else 0.0)
        return jnp.asarray(value, jnp.float32)

    shapes = quality_shapes(config)
    return unflatten_dict({tuple(n.split("/")): draw(n, shape) for n, shape in shapes.items()})


def random_features(batch: int, widths: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Of a video, far from norm 1, and of a text, of norm 1."""
    rng = np.random.default_rng(seed)
    clip, text = (rng.normal(size=(batch, width)).astype(np.float32) for width in widths)
    return [5 * clip + 1, text / np.linalg.norm(text, axis=1, keepdims=True)]


def write_tokenizer(
    folder: Path, *, lower: bool = True, max_length: int = MAX_LENGTH, as_json: bool = False
) -> Path:
    """Fills a folder with the files of a WordPiece tokenizer, as BGE has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY), "utf-8")
    config = {"do_lower_case": lower, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    special = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    sentence = {"max_seq_length": max_length, "do_lower_case": lower}
    (folder / "sentence_bert_config.json").write_text(json.dumps(sentence))
    if as_json:
        made = Tokenizer.read(folder, max_positions=512, vocab_size=len(VOCABULARY))
        (folder / "tokenizer.json").write_text(made.inner.to_str())
        (folder / "vocab.txt").unlink()
    return folder


def write_sentence_modules(folder: Path, pooling: Pooling = "cls", *, width: int = 24) -> None:
    """Adds what sentence-transformers says of a folder: its modules, and how it pools."""
    names = ("", "1_Pooling", "2_Normalize")
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"cls_token": pooling == "cls", "mean_tokens": pooling == "mean"}
    modes |= {"max_tokens": False, "mean_sqrt_len_tokens": False}
    settings = {"word_embedding_dimension": width}
    settings |= {f"pooling_mode_{mode}": on for mode, on in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def tiny_quality(
    folder: Path, *, seed: int = 0, feature: Feature = "first_token", bounded: str | None = None
) -> QualityModel:
    """A tiny model with random weights, saved in `folder` and loaded from there."""
    config = tiny_quality_config(feature=feature, bounded=bounded)
    save_quality(folder, in_memory(config, folder.parent / f"{folder.name}-tokenizer", seed))
    return load_quality(folder)


def in_memory(config: QualityConfig, tokenizer_folder: Path, seed: int = 0) -> QualityModel:
    """The model of a configuration with random weights; its tokenizer's files are made first."""
    write_tokenizer(tokenizer_folder)
    return QualityModel(
        config=config,
        **modules(config),
        params=random_quality_params(config, seed),
        tokenizer=read_tokenizer(tokenizer_folder, config.text),
        source=None,
    )
