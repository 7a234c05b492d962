"""`config.json` of the folders that we write: its format, and where the weights came from."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jvjepa.errors import CheckpointError, ConfigError

_Config = TypeVar("_Config")

CONFIG_FILE = "config.json"
FORMAT = "jvjepa-2"  # changes when names or layouts of the parameters do
TEXT_FORMAT, QUALITY_FORMAT = "jvjepa-text-1", "jvjepa-quality-1"
LORA_FORMAT = "jvjepa-lora-1"  # changes when names or layouts of the factors do
PROBE_FORMAT, FEATURES_FORMAT = "jvjepa-probe-1", "jvjepa-features-1"
_FORMATS = {
    FORMAT: "a converted checkpoint, which jvjepa.load loads",
    TEXT_FORMAT: "a text encoder, which jvjepa.text_weights.load_text loads",
    QUALITY_FORMAT: "a video-quality model, which jvjepa.quality.load_quality loads",
    LORA_FORMAT: "LoRA adapters, which --lora and jvjepa.load(lora=..) take beside a model",
    PROBE_FORMAT: "the head of a probe, which jvjepa.train.probe_files.load_probe loads",
    FEATURES_FORMAT: "features, which jvjepa.train.feature_cache.open_features opens",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where converted weights came from; kept with them.

    Args:
        name: the hub id, folder or file that was converted.
        revision: the hub's commit, or "".
        sha256: hexadecimal digest of the source's weight files, in the order of their names.
        converter: version of jvjepa that converted.
        config: the source's own configuration, word for word; None for a `.pt` file, which has
            none.
        preprocessor: the source's own preprocessing configuration, word for word, or None.
        keys: of a `.pt` file: under which key each part was found.
        dropped: of a `.pt` file: tensors that were left out, each with the reason.
        probe: where the classifier or the anticipator came from, if it was attached later.
        lora: of adapters that were merged into the weights, one after the other: name and sha256
            of their file.
        text: of a video-quality model: where its text encoder came from, if from elsewhere.
    """

    name: str
    revision: str
    sha256: str
    converter: str
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    probe: "Source | None" = None
    lora: tuple[dict[str, str], ...] = ()
    text: "Source | None" = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Source":
        """Builds it from its JSON form."""
        inner = {name: values[name] for name in ("probe", "text") if values.get(name) is not None}
        lora = values.get("lora") or ()  # the first folders had one record or null
        return cls(
            **{
                **values,
                **{name: cls.from_json(part) for name, part in inner.items()},
                "lora": (lora,) if isinstance(lora, dict) else tuple(lora),
            }
        )


def read_architecture(
    folder: str | Path, kind: str, what: str, key: str, build: Callable[[Any], _Config]
) -> tuple[_Config, Source | None]:
    """Reads the `config.json` of a folder of ours: an architecture, and where weights came from.

    Args:
        folder: where it is.
        kind: as in `read_json`.
        what: as in `read_json`.
        key: under which the architecture stands.
        build: makes it of its JSON form.

    Returns:
        Both.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    record = read_json(folder, kind, what)
    try:
        source = record.get("source")
        return build(record[key]), None if source is None else Source.from_json(source)
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE}: {error}") from None


def read_json(folder: str | Path, kind: str, what: str) -> dict[str, Any]:
    """Reads the `config.json` of a folder of ours.

    Args:
        folder: where it is.
        kind: the format that it must have.
        what: what such a folder is called, for the message.

    Returns:
        The JSON object.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    record, path = _read_json(folder, what), Path(folder) / CONFIG_FILE
    found = record.get("format")
    if found == kind:
        return record
    if "model_type" in record:
        hint = "; convert it first: jvjepa convert SOURCE OUT"
    else:
        hint = f" but {_FORMATS[found]}" if str(found) in _FORMATS else ""
    raise CheckpointError(f"{path} is not of format {kind!r}{hint}")


def read_format(folder: str | Path) -> str | None:
    """The format that a folder's `config.json` says it has, or None where it says none.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    found = _read_json(folder, "converted checkpoint").get("format")
    return found if isinstance(found, str) else None


def _read_json(folder: str | Path, what: str) -> dict[str, Any]:
    path = Path(folder) / CONFIG_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; {folder} is no {what}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    return record if isinstance(record, dict) else {}
