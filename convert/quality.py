"""From checkpoints of text encoders and of video-quality models to ours."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from jvjepa.convert import hub
from jvjepa.convert.architecture import Hints
from jvjepa.convert.bert import bert_entries, is_bert, read_text_config, split
from jvjepa.convert.conversion import (
    NO_HINTS,
    DTypeName,
    Report,
    read_pieces,
    target_dtype,
)
from jvjepa.convert.progress import progress
from jvjepa.convert.qualivision import infer, open_qualivision, qualivision_entries
from jvjepa.convert.source import StoredTensor, Weights, open_weights
from jvjepa.convert.tables import expected_shapes
from jvjepa.convert.torchfile import open_torch
from jvjepa.parameters import count_shapes
from jvjepa.quality_weights import quality_shapes
from jvjepa.records import QUALITY_FORMAT, TEXT_FORMAT, Source
from jvjepa.storage import check_apart, check_free, new_folder
from jvjepa.text_config import TextConfig
from jvjepa.text_weights import read_tokenizer, text_shapes
from jvjepa.version import __version__
from jvjepa.weights import WEIGHTS_FILE, check_dtype, check_names, write_folder


def is_text_source(source: str, revision: str | None = None) -> bool:
    """Whether a source is a text encoder, see `convert_text`; downloads it to find out.

    Raises:
        InputError: it cannot be found.
    """
    path = hub.resolve(source, revision).path
    return path.is_dir() and is_bert(path)


def convert_text(
    source: str,
    out: str | Path,
    *,
    dtype: DTypeName | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Report:
    """Converts a BERT sentence encoder into a folder that `load_text` reads.

    Every tensor is used or dropped by name with a reason, every parameter is filled, shapes are
    checked, and values are finite. `out` appears whole or not at all.

    Args:
        source: a Hugging Face folder with the files of sentence-transformers, or a hub id, such as
            "BAAI/bge-large-en-v1.5".
        out: the folder to make.
        dtype: of the parameters to write; None takes the source's, float32 or bfloat16.
        revision: the hub's branch, tag or commit.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: the source cannot be read, is of another kind, or is damaged; or `out` exists.
    """
    out = Path(out)
    check_dtype(dtype)
    check_free(out, WEIGHTS_FILE, force=force)
    found = hub.resolve(source, revision)
    check_apart(out, found.path)
    hf_config, config = read_text_config(found.path)
    tokenizer = read_tokenizer(found.path, config)
    wanted = bert_entries(config)
    with open_weights(found.path) as weights:
        used = _check_text(found.path, weights, config)
        target = target_dtype(used, dtype)
        record = _text_record(found, weights, hf_config)
        pieces = progress(read_pieces(weights, wanted, target), len(wanted), "converting")
        with new_folder(out, WEIGHTS_FILE, force=force) as work:
            shapes = text_shapes(config)
            described = {"text": config.to_json()}
            write_folder(work, TEXT_FORMAT, described, record, target, shapes, pieces)
            tokenizer.save(work)
    return Report.of(out, target, count_shapes(shapes), record)


def convert_quality(
    source: str,
    out: str | Path,
    *,
    text: str,
    dtype: DTypeName | None = None,
    revision: str | None = None,
    hints: Hints = NO_HINTS,
    force: bool = False,
) -> Report:
    """Converts a checkpoint of QualiVision into a folder that `load_quality` reads.

    The video encoder, the text encoder and the head are in the file; what the text encoder is, and
    its tokenizer, are in the folder of the released encoder that it was trained with. Files of the
    original's training script hold no text encoder, which it does not train: then that folder's
    weights are taken too, and the record says so.

    Args:
        source: the `.pt` file.
        out: the folder to make.
        text: a Hugging Face folder with the files of sentence-transformers, or a hub id: for
            QualiVision "BAAI/bge-large-en-v1.5".
        dtype: of the parameters to write; None takes the source's, float32 or bfloat16.
        revision: the hub's branch, tag or commit of `text`.
        hints: what the file does not say: attention heads of the video encoder, where no released
            one has its width; the size of its input, where it is not 384.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: a source cannot be read, is of another kind, or is damaged; they do not fit
            together; or `out` exists.
    """
    path, out = Path(source), Path(out)
    check_dtype(dtype)
    check_apart(out, path)
    check_free(out, WEIGHTS_FILE, force=force)
    found = hub.resolve(text, revision)
    check_apart(out, found.path)
    hf_config, text_config = read_text_config(found.path)
    tokenizer = read_tokenizer(found.path, text_config)
    with contextlib.ExitStack() as stack:
        weights = open_qualivision(stack.enter_context(open_torch(path)))
        config = infer(path, weights, text_config, hints)
        record = Source(
            name=source,
            revision="",
            sha256=weights.sha256(),
            converter=__version__,
            keys={part: weights.key for part in ("encoder", "text", "head")},
            dropped=weights.dropped,
        )
        if not weights.has_text:
            released = stack.enter_context(open_weights(found.path))
            _check_text(found.path, released, text_config)
            weights = weights.with_text(released)
            elsewhere = _text_record(found, released, hf_config)
            keys = {part: key for part, key in record.keys.items() if part != "text"}
            record = dataclasses.replace(record, keys=keys, text=elsewhere)
        wanted = qualivision_entries(config)
        check_names(str(path), weights.shapes, expected_shapes(wanted))
        target = target_dtype(weights.tensors, dtype)
        pieces = progress(read_pieces(weights, wanted, target), len(wanted), "converting")
        shapes = quality_shapes(config)
        with new_folder(out, WEIGHTS_FILE, force=force) as work:
            described = {"quality": config.to_json()}
            write_folder(work, QUALITY_FORMAT, described, record, target, shapes, pieces)
            tokenizer.save(work)
    return Report.of(out, target, count_shapes(shapes), record)


def _check_text(path: Path, weights: Weights, config: TextConfig) -> dict[str, StoredTensor]:
    """The tensors of a text encoder that are used; raises CheckpointError if they do not fit."""
    used, _ = split(weights.tensors)
    found = {name: tensor.shape for name, tensor in used.items()}
    check_names(str(path), found, expected_shapes(bert_entries(config)))
    return used


def _text_record(found: hub.Checkpoint, weights: Weights, hf_config: dict[str, Any]) -> Source:
    return Source(
        name=found.name,
        revision=found.revision,
        sha256=weights.sha256(),
        converter=__version__,
        config=hf_config,
        dropped=split(weights.tensors)[1],
    )
