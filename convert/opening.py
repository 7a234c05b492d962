"""Opening what is to be converted or verified, whatever it is."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jvjepa.config import ModelConfig
from jvjepa.convert import hub
from jvjepa.convert.architecture import Hints, infer, released_file
from jvjepa.convert.huggingface import hf_entries
from jvjepa.convert.meta import MetaWeights, encoder_key, meta_entries, model_parts, open_parts
from jvjepa.convert.qualivision import state_dict_key
from jvjepa.convert.source import Weights, open_weights, read_config, read_preprocessor
from jvjepa.convert.tables import Entry
from jvjepa.convert.torchfile import open_torch
from jvjepa.errors import InputError
from jvjepa.version import __version__
from jvjepa.weights import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Original:
    """A checkpoint of somebody else's, open.

    Args:
        name: the hub id, or the folder or file as it was given.
        path: the folder or the file.
        revision: the hub's commit, or "".
        config: its architecture.
        entries: every tensor that there should be.
        weights: the tensors that there are.
        hf_config: Hugging Face's `config.json`, or None.
        preprocessor: Hugging Face's preprocessing configuration, or None.
    """

    name: str
    path: Path
    revision: str
    config: ModelConfig
    entries: list[Entry]
    weights: Weights | MetaWeights
    hf_config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None

    def record(self) -> Source:
        """Describes it, for the converted checkpoint; reads all of the files for their digest."""
        meta = self.weights if isinstance(self.weights, MetaWeights) else None
        return Source(
            name=self.name,
            revision=self.revision,
            sha256=self.weights.sha256(),
            converter=__version__,
            config=self.hf_config,
            preprocessor=self.preprocessor,
            keys=meta.parts if meta else {},
            dropped=meta.dropped if meta else {},
        )


@contextlib.contextmanager
def open_original(
    source: str, *, revision: str | None, key: str | None, hints: Hints
) -> Iterator[Original]:
    """Finds and opens a checkpoint.

    Args:
        source: see `jvjepa.convert.hub.resolve`.
        revision: the hub's branch, tag or commit.
        key: of a `.pt` file: the state dict of the encoder; None takes what Meta's hub loads.
        hints: of a `.pt` file: what its shapes do not say.

    Yields:
        The checkpoint; whether the tensors are the right ones has not been checked.

    Raises:
        InputError: it cannot be found, opened, or understood.
    """
    found = hub.resolve(source, revision)
    if found.path.is_dir():
        if key is not None or hints != Hints():
            raise InputError(
                f"{source} is a Hugging Face checkpoint, whose config.json says all; --key, "
                "--heads, --predictor-heads and --crop-size are for .pt files"
            )
        hf_config, config = read_config(found.path)
        with open_weights(found.path) as weights:
            yield Original(
                name=found.name,
                path=found.path,
                revision=found.revision,
                config=config,
                entries=hf_entries(config),
                weights=weights,
                hf_config=hf_config,
                preprocessor=read_preprocessor(found.path),
            )
        return
    with open_torch(found.path) as file:
        if "classifiers[0]" in file.parts:
            raise InputError(
                f"{source} is a probe without an encoder; attach it to a converted one: "
                f"jvjepa convert --probe {source} --encoder MODEL --labels FILE OUT"
            )
        if state_dict_key(file) is not None:
            raise InputError(
                f"{source} is a checkpoint of QualiVision, and does not describe its text encoder; "
                f"name that: jvjepa convert {source} OUT --text BAAI/bge-large-en-v1.5"
            )
        release = released_file(found.path)
        chosen = encoder_key(file, key, release.key if release else None)
        meta = open_parts(file, model_parts(file, chosen))
        config = infer(found.path, meta.shapes, hints)
        yield Original(
            name=found.name,
            path=found.path,
            revision="",
            config=config,
            entries=meta_entries(config),
            weights=meta,
        )
