"""QualiVision's `.pt` checkpoints: names of the tensors, and what in them is left out.

Reference: `VJEPAModel` of QualiVision's `src/models/vjepa_model.py` (github.com/RITIK-12). A file
holds one state dict, under "model_state_dict" beside the optimizer's and other things, or alone:
"venc." is Hugging Face's V-JEPA 2, "tenc." a SentenceTransformer, "head." the head.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jvjepa.config import EncoderConfig
from jvjepa.convert import bert, huggingface
from jvjepa.convert.architecture import Hints
from jvjepa.convert.source import StoredTensor, Weights
from jvjepa.convert.tables import Entry, Row, dense, norm, shape_entries
from jvjepa.convert.torchfile import TorchFile, TorchWeights
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.quality_config import HeadConfig, QualityConfig
from jvjepa.quality_weights import quality_shapes
from jvjepa.registry import RELEASES
from jvjepa.text_config import TextConfig

VIDEO, TEXT, HEAD = "venc.", "tenc.0.auto_model.", "head.net."
_CROP_SIZE, _NUM_FRAMES = 384, 64  # of its video processor, and of its clips
_KEYS = ("model_state_dict", "")


def _of(part: str, prefix: str, table: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a table that are of one of our parts."""
    rows = (row for row in table if row.ours.startswith(f"{part}/"))
    return tuple(row._replace(theirs=f"{prefix}{row.theirs}") for row in rows)


TABLE: tuple[Row, ...] = (
    *_of("encoder", VIDEO, huggingface.TABLE),
    *_of("text", TEXT, bert.TABLE),
    *norm(f"{HEAD}0", "head/norm"),
    *dense(f"{HEAD}1", "head/fc1"),
    *dense(f"{HEAD}4", "head/fc2"),
    *dense(f"{HEAD}7", "head/fc3"),
)

_PREDICTOR = "V-JEPA's predictor, which the scores do not depend on"
DROPPED: dict[str, str] = {  # {i} stands for the layer
    **{row.theirs: _PREDICTOR for row in _of("predictor", VIDEO, huggingface.TABLE)},
    **{f"{TEXT}{name}": reason for name, reason in bert.DROPPED.items()},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualiVisionWeights:
    """The state dict of a file, with the face of `jvjepa.convert.source.Weights`.

    Args:
        tensors: every tensor that is used, by name.
        dropped: the reason for every tensor that is not, by name.
        key: where the state dict is in the file.
        has_text: whether the text encoder is in the file.
    """

    tensors: dict[str, StoredTensor]
    dropped: dict[str, str]
    key: str
    has_text: bool
    _places: dict[str, tuple[TorchWeights | Weights, str]] = dataclasses.field(repr=False)
    _file: TorchFile = dataclasses.field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is used, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor into memory."""
        weights, theirs = self._places[name]
        return weights.read(theirs)

    def sha256(self) -> str:
        """Hexadecimal digest of the file's bytes."""
        return self._file.archive.sha256()

    def with_text(self, weights: Weights) -> "QualiVisionWeights":
        """Adds a text encoder that is not in the file, of a Hugging Face checkpoint."""
        used, _ = bert.split(weights.tensors)
        places = {f"{TEXT}{name}": (weights, name) for name in used}
        tensors = {f"{TEXT}{name}": tensor for name, tensor in used.items()}
        return dataclasses.replace(
            self, tensors={**self.tensors, **tensors}, _places={**self._places, **places}
        )


def state_dict_key(file: TorchFile) -> str | None:
    """Where the state dict of QualiVision's V-JEPA model is in a file; None if it has none."""
    parts = file.parts
    for key in _KEYS:
        names = map(_clean, map(str, parts.get(key, ())))
        if any(name.startswith((VIDEO, HEAD)) for name in names):
            return key
    return None


def open_qualivision(file: TorchFile) -> QualiVisionWeights:
    """Opens the state dict of a file; no tensor is read.

    Args:
        file: the open `.pt` file.

    Returns:
        Its tensors.

    Raises:
        CheckpointError: it has none, or two tensors have one name.
    """
    key = state_dict_key(file)
    if key is None:
        raise CheckpointError(
            f"{file.path} is no checkpoint of QualiVision's V-JEPA model, which has {VIDEO}* and "
            f"{HEAD}* under {_KEYS[0]!r}; it holds {file}"
        )
    stored = file.part(key)
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, tuple[TorchWeights, str]] = {}
    dropped: dict[str, str] = {}
    for theirs, tensor in stored.tensors.items():
        name = _clean(theirs)
        if name in places or name in dropped:
            raise CheckpointError(f"{file.path}: {key or 'it'} holds {name} twice")
        reason = DROPPED.get(re.sub(r"\.layer\.\d+\.", ".layer.{i}.", name))
        if reason is None:
            tensors[name], places[name] = tensor, (stored, theirs)
        else:
            dropped[name] = reason
    return QualiVisionWeights(
        tensors=tensors,
        dropped=dropped,
        key=key,
        has_text=any(name.startswith("tenc.") for name in tensors),
        _places=places,
        _file=file,
    )


def infer(path: Path, weights: QualiVisionWeights, text: TextConfig, hints: Hints) -> QualityConfig:
    """Finds the architecture.

    Args:
        path: the file.
        weights: its tensors.
        text: the text encoder, which its folder describes.
        hints: attention heads of the video encoder, where no released one has its width; and the
            size of its input, if it is not the original's 384 pixels.

    Returns:
        The architecture.

    Raises:
        CheckpointError: the shapes are of no such model.
        InputError: the number of heads is not known and must be said.
    """
    shapes = weights.shapes

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != rank or 0 in found:
            problem = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(f"{path}: {name} {problem}; it must have {rank} axes")
        return found

    width, _, frames, side, _ = shape(f"{VIDEO}encoder.embeddings.patch_embeddings.proj.weight", 5)
    mlp_dim = shape(f"{VIDEO}encoder.layer.0.mlp.fc1.weight", 2)[0]
    hidden = tuple(shape(f"{HEAD}{i}.weight", 2)[0] for i in (1, 4))
    layer = re.compile(re.escape(f"{VIDEO}encoder.layer.") + r"(\d+)\.")
    layers = 1 + max(int(match[1]) for match in map(layer.match, shapes) if match)
    try:
        encoder = EncoderConfig(
            hidden_size=width,
            num_layers=layers,
            num_heads=_heads(path, width) if hints.heads is None else hints.heads,
            mlp_dim=mlp_dim,
            crop_size=_CROP_SIZE if hints.crop_size is None else hints.crop_size,
            frames_per_clip=_NUM_FRAMES,
            patch_size=side,
            tubelet_size=frames,
        )
        head = HeadConfig(hidden=hidden)
        return QualityConfig(encoder=encoder, text=text, head=head, num_frames=_NUM_FRAMES)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def qualivision_entries(config: QualityConfig) -> list[Entry]:
    """Lists every tensor of a checkpoint; see `jvjepa.convert.tables.entries`."""
    return shape_entries(quality_shapes(config), TABLE, config.encoder)


def _heads(path: Path, width: int) -> int:
    by_width: Mapping[int, int] = {
        release.config.encoder.hidden_size: release.config.encoder.num_heads
        for release in RELEASES.values()
    }
    if width not in by_width:
        raise InputError(
            f"{path} does not say the number of attention heads of its video encoder of width "
            f"{width}, and no released model has that width; say it with --heads"
        )
    return by_width[width]


def _clean(name: str) -> str:
    """Takes away what DistributedDataParallel and torch.compile put before a name."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)
