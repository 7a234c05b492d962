"""What a folder of a text encoder or of a video-quality model holds, in words."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jvjepa.quality_modules import SCORES
from jvjepa.quality_weights import quality_shapes, read_quality_record
from jvjepa.records import QUALITY_FORMAT, TEXT_FORMAT, Source, read_format
from jvjepa.storage import open_safetensors
from jvjepa.text_config import TextConfig
from jvjepa.text_weights import read_text_record, read_tokenizer, text_shapes
from jvjepa.weights import WEIGHTS_FILE, check_header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a folder holds.

    Args:
        kind: what it is, in a few words.
        facts: more about it, by what each is about.
        shapes: of every parameter by flat name.
        source: where the weights came from, or None.
    """

    kind: str
    facts: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    source: Source | None

    def check(self, folder: Path) -> np.dtype:
        """Returns the dtype of the weights; raises CheckpointError where they do not fit."""
        with open_safetensors(folder / WEIGHTS_FILE) as file:
            return check_header(folder / WEIGHTS_FILE, file, self.shapes)


def summarise(folder: Path) -> Summary | None:
    """Describes a folder; its weights are not read.

    Args:
        folder: with a `config.json` of ours.

    Returns:
        What it holds, or None where it is neither a text encoder nor a video-quality model.

    Raises:
        CheckpointError: `config.json` or the tokenizer is damaged.
        InputError: the library tokenizers is not installed.
    """
    kind = read_format(folder)
    if kind == TEXT_FORMAT:
        text, source = read_text_record(folder)
        return Summary(
            kind="a converted text encoder",
            facts=_text_facts(folder, text),
            shapes=text_shapes(text),
            source=source,
        )
    if kind != QUALITY_FORMAT:
        return None
    config, source = read_quality_record(folder)
    encoder, head = config.encoder, config.head
    bounds = f"from {head.bounded.replace('-', ' to ')}" if head.bounded else "of any size"
    return Summary(
        kind="a video-quality model",
        facts={
            "video encoder": f"width {encoder.hidden_size}, {encoder.num_layers} layers",
            **_text_facts(folder, config.text),
            "head": f"sees the {config.feature.replace('_', ' ')} of a video and the prompt",
            "scores": f"{', '.join(SCORES)}; {bounds}",
            "input": f"{config.num_frames} frames of {config.crop_size} x {config.crop_size}",
        },
        shapes=quality_shapes(config),
        source=source,
    )


def _text_facts(folder: Path, config: TextConfig) -> dict[str, str]:
    longest = read_tokenizer(folder, config).max_length
    return {
        "text encoder": f"width {config.hidden_size}, {config.num_layers} layers, "
        f"{config.pooling} pooling, {config.vocab_size:,} words, {longest} tokens at most"
    }
