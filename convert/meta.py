"""Meta's own `.pt` files: names and layouts of the tensors, and what in them is left out.

Reference: `src/hub/backbones.py` and the modules it builds, of facebookresearch/vjepa2. A file
holds state dicts under several keys; here every part has a prefix of ours ("encoder.",
"predictor.", ..), and the prefixes that Meta's wrappers leave ("module.", "backbone.") are gone.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from jvjepa.config import ModelConfig
from jvjepa.convert.source import StoredTensor
from jvjepa.convert.tables import (
    CONV3D,
    IMAGE_CONV3D,
    QUERY_TOKENS,
    VECTOR,
    Entry,
    Row,
    dense,
    entries,
    norm,
)
from jvjepa.convert.torchfile import TorchFile, TorchWeights
from jvjepa.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def _mlp(theirs: str, ours: str) -> tuple[Row, ...]:
    return (*dense(f"{theirs}.fc1", f"{ours}/fc1"), *dense(f"{theirs}.fc2", f"{ours}/fc2"))


def _fused(theirs: str, ours: str, names: tuple[str, ...]) -> tuple[Row, ...]:
    """Projections that theirs holds in one matrix, one after the other."""
    rows = (dense(theirs, f"{ours}/{name}", share=(i, len(names))) for i, name in enumerate(names))
    return tuple(row for pair in rows for row in pair)


def _block(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        *norm(f"{theirs}.norm1", f"{ours}/norm1"),
        *_fused(f"{theirs}.attn.qkv", f"{ours}/attention", ("query", "key", "value")),
        *dense(f"{theirs}.attn.proj", f"{ours}/attention/proj"),
        *norm(f"{theirs}.norm2", f"{ours}/norm2"),
        *_mlp(f"{theirs}.mlp", f"{ours}/mlp"),
    )


def _pooler(part: str) -> tuple[Row, ...]:
    theirs, ours = f"{part}.pooler", f"{part}/pooler"
    return (
        Row(f"{theirs}.query_tokens", f"{ours}/query_tokens", QUERY_TOKENS),
        *_block(f"{theirs}.blocks.{{i}}", f"{ours}/blocks"),
        *_cross_block(f"{theirs}.cross_attention_block", f"{ours}/cross_attention"),
    )


def _cross_block(theirs: str, ours: str) -> tuple[Row, ...]:
    """The pooler's cross-attention, which has no output projection."""
    return (
        *norm(f"{theirs}.norm1", f"{ours}/norm1"),
        *dense(f"{theirs}.xattn.q", f"{ours}/attention/query"),
        *_fused(f"{theirs}.xattn.kv", f"{ours}/attention", ("key", "value")),
        *norm(f"{theirs}.norm2", f"{ours}/norm2"),
        *_mlp(f"{theirs}.mlp", f"{ours}/mlp"),
    )


TABLE: tuple[Row, ...] = (
    *dense("encoder.patch_embed.proj", "encoder/patch_embed", CONV3D),
    *dense("encoder.patch_embed_img.proj", "encoder/patch_embed_image", IMAGE_CONV3D),
    Row("encoder.img_mod_embed", "encoder/image_embed", VECTOR),
    Row("encoder.video_mod_embed", "encoder/video_embed", VECTOR),
    *_block("encoder.blocks.{i}", "encoder/blocks"),
    *norm("encoder.norm", "encoder/norm"),
    *norm("encoder.norms_block.{i}", "encoder/norms"),
    *dense("predictor.predictor_embed", "predictor/embed"),
    *dense("predictor.predictor_embed.0", "predictor/embed/fc1"),
    *dense("predictor.predictor_embed.2", "predictor/embed/fc2"),
    Row("predictor.mask_tokens.{i}", "predictor/mask_tokens", VECTOR),
    *_block("predictor.predictor_blocks.{i}", "predictor/blocks"),
    *norm("predictor.predictor_norm", "predictor/norm"),
    Row("predictor.img_mod_embed", "predictor/image_embed", VECTOR),
    Row("predictor.video_mod_embed", "predictor/video_embed", VECTOR),
    *dense("predictor.predictor_proj", "predictor/proj"),
    *dense("predictor.predictor_proj_context", "predictor/proj_context"),
    *dense("action_predictor.predictor_embed", "action_predictor/embed"),
    *dense("action_predictor.action_encoder", "action_predictor/action"),
    *dense("action_predictor.state_encoder", "action_predictor/state"),
    *_block("action_predictor.predictor_blocks.{i}", "action_predictor/blocks"),
    *norm("action_predictor.predictor_norm", "action_predictor/norm"),
    *dense("action_predictor.predictor_proj", "action_predictor/proj"),
    *_pooler("classifier"),
    *dense("classifier.linear", "classifier/linear"),
    *_pooler("anticipator"),
    *dense("anticipator.verb_classifier", "anticipator/verbs"),
    *dense("anticipator.noun_classifier", "anticipator/nouns"),
    *dense("anticipator.action_classifier", "anticipator/actions"),
)

_SINES = "fixed sine positions of older training code; the model has rotary positions"
_EXTRINSICS = "camera extrinsics, which the released 2-AC does not take: never trained"
DROPPED: dict[str, str] = {
    "encoder.pos_embed": _SINES,
    "predictor.predictor_pos_embed": _SINES,
    "action_predictor.predictor_pos_embed": _SINES,
    "action_predictor.extrinsics_encoder.weight": _EXTRINSICS,
    "action_predictor.extrinsics_encoder.bias": _EXTRINSICS,
}

# Which encoder Meta's hub loads: the average over training where there is one. Only 2-AC, whose
# encoder is frozen, is loaded from "encoder".
ENCODER_KEYS = ("target_encoder", "ema_encoder", "encoder")


def meta_entries(config: ModelConfig) -> list[Entry]:
    """Lists every tensor of a Meta checkpoint; see `jvjepa.convert.tables.entries`."""
    return entries(config, TABLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaWeights:
    """The state dicts of one model, with the face of `jvjepa.convert.source.Weights`.

    Args:
        tensors: every tensor that is used, by its name with the part's prefix.
        dropped: the reason for every tensor that is not, by such a name.
        parts: the key of the file under which each part was found.
    """

    tensors: dict[str, StoredTensor]
    dropped: dict[str, str]
    parts: dict[str, str]
    _places: dict[str, tuple[TorchWeights, str]] = dataclasses.field(repr=False)
    _file: TorchFile = dataclasses.field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that is used, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> NDArray[Any]:
        """Reads one tensor into memory."""
        weights, theirs = self._places[name]
        return weights.read(theirs)

    def part(self, part: str) -> "dict[str, torch.Tensor]":
        """One part's tensors as torch's, by their names without prefix; not read yet."""
        places = {n: p for n, p in self._places.items() if n.startswith(f"{part}.")}
        return {
            name.removeprefix(f"{part}."): weights.values[theirs]
            for name, (weights, theirs) in places.items()
        }

    def sha256(self) -> str:
        """Hexadecimal digest of the file's bytes."""
        return self._file.archive.sha256()


def open_parts(file: TorchFile, parts: Mapping[str, tuple[str, int | None]]) -> MetaWeights:
    """Opens the state dicts of one model; no tensor is read.

    Args:
        file: the open `.pt` file.
        parts: by our part ("encoder", "predictor", ..): the key in the file, and the index where a
            list is under it.

    Returns:
        Its tensors.

    Raises:
        CheckpointError: a key is not there, or two tensors have one name.
    """
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, tuple[TorchWeights, str]] = {}
    dropped: dict[str, str] = {}
    for part, (key, index) in parts.items():
        weights = file.part(key, index)
        for theirs, stored in weights.tensors.items():
            name = f"{part}.{_clean(theirs)}"
            if name in places or name in dropped:
                raise CheckpointError(f"{file.path}: {key} holds {name.split('.', 1)[1]} twice")
            if name in DROPPED:
                dropped[name] = DROPPED[name]
            else:
                tensors[name], places[name] = stored, (weights, theirs)
    keys = {
        part: key if index is None else f"{key}[{index}]" for part, (key, index) in parts.items()
    }
    return MetaWeights(tensors=tensors, dropped=dropped, parts=keys, _places=places, _file=file)


def encoder_key(file: TorchFile, asked: str | None, released: str | None) -> str:
    """Chooses the state dict of the encoder.

    Args:
        file: the open `.pt` file.
        asked: the user's choice, or None.
        released: what Meta's hub loads, if this is a released file.

    Returns:
        The key.

    Raises:
        CheckpointError: it is not there, or the file has none, or more than one that it could be.
    """
    there = [key for key in ENCODER_KEYS if key in file.parts]
    if not there:
        raise CheckpointError(
            f"{file.path} has no encoder, which is under {', '.join(ENCODER_KEYS)} in Meta's "
            f"checkpoints; it holds {file}"
        )
    if asked is not None or released is not None:
        key = asked or released
        if key not in there:
            raise CheckpointError(f"{file.path} has no {key!r}; --key may be {', '.join(there)}")
        return key
    averages = [key for key in there if key != "encoder"]
    if len(averages) == 1:
        return averages[0]
    if not averages and _is_action(file):
        return "encoder"
    problem = "only the online encoder" if not averages else f"both {' and '.join(averages)}"
    raise CheckpointError(
        f"{file.path} has {problem}, so that it is not clear which one to take; say it with --key, "
        f"one of {', '.join(there)}"
    )


def model_parts(file: TorchFile, key: str) -> dict[str, tuple[str, int | None]]:
    """Says where the parts of a pretrained model are; `open_parts` takes it."""
    parts: dict[str, tuple[str, int | None]] = {"encoder": (key, None)}
    if "predictor" in file.parts:
        parts["action_predictor" if _is_action(file) else "predictor"] = ("predictor", None)
    return parts


def probe_parts(file: TorchFile, index: int) -> dict[str, tuple[str, int | None]]:
    """Says what a probe is: a classifier, or an anticipator; `open_parts` takes it."""
    names = map(_clean, file.part("classifiers", index).tensors)
    anticipates = any(name.startswith(("action_classifier.", "verb_classifier.")) for name in names)
    return {"anticipator" if anticipates else "classifier": ("classifiers", index)}


def _is_action(file: TorchFile) -> bool:
    """Whether the predictor is that of V-JEPA 2-AC."""
    if "predictor" not in file.parts:
        return False
    return any(
        _clean(name).startswith("action_encoder.") for name in file.part("predictor").tensors
    )


def _clean(name: str) -> str:
    """Takes away what DistributedDataParallel and Meta's wrapper put before a name."""
    return re.sub(r"^(module\.|backbone\.)+", "", name)
