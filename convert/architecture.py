"""What model a Meta checkpoint is, from the shapes of its tensors and the table of releases."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvjepa import registry
from jvjepa.config import (
    ActionPredictorConfig,
    AnticipatorConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)
from jvjepa.convert.labels import ActionLabels
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.fields import check, is_whole
from jvjepa.registry import LEVELS, RELEASES, Probe, Release

Shapes = Mapping[str, tuple[int, ...]]
_PROBE_HEADS = 16  # of every probe that Meta released, whatever the encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hints:
    """What the shapes of tensors do not say; needed only where no released model has them.

    Args:
        heads: attention heads of the encoder.
        predictor_heads: attention heads of the predictor.
        crop_size: pixels of a side of the input that the weights were trained on.
    """

    heads: int | None = None
    predictor_heads: int | None = None
    crop_size: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fits = value is None or is_whole(value, 1)
            check(fits, self, field.name, "a whole number above 0")


def released_file(path: Path) -> Release | None:
    """The release that a file's name says it is, or None."""
    by_file = {release.source.rpartition("/")[2]: release for release in RELEASES.values()}
    return by_file.get(path.name) if path.suffix == ".pt" else None


def released_probe(path: Path) -> Probe | None:
    """The released probe that a file's name says it is, or None."""
    return registry.PROBES.get(path.stem)


def infer(path: Path, shapes: Shapes, hints: Hints) -> ModelConfig:
    """Finds the architecture of encoder and predictor.

    Sizes come from the shapes. Attention heads and the size of the input, which shapes do not say,
    come from the hints, else from the released models of these sizes.

    Args:
        path: the file; if its name is a release's, it must be that release.
        shapes: by name with the part's prefix, from `jvjepa.convert.meta.open_parts`.
        hints: what the user says.

    Returns:
        The architecture.

    Raises:
        CheckpointError: the shapes are of no V-JEPA, the parts are of different models, or the file
            has a release's name and other sizes, or hints say other ones.
        InputError: something is not known and must be said.
    """
    encoder = _encoder(path, shapes)
    named = released_file(path)
    releases = [named] if named else RELEASES.values()
    alike = [release.config for release in releases if _agree(encoder, release.config.encoder)]
    if named and not alike:
        raise CheckpointError(
            f"{path} is called as a released file and is another model: its encoder has "
            f"{_list(encoder)}; give the file another name"
        )
    if named:
        _check_hints(path, hints, named.config)
    head_counts = {r.config.encoder.hidden_size: r.config.encoder.num_heads for r in releases}
    encoder["num_heads"] = hints.heads
    if hints.heads is None:
        what = "attention heads of an encoder"
        encoder["num_heads"] = _known(path, "--heads", what, encoder["hidden_size"], head_counts)
    crops = {config.crop_size for config in alike}
    if hints.crop_size is None and len(crops) != 1:
        known = f"; released with these sizes are {sorted(crops)}" if crops else ""
        raise InputError(
            f"{path} does not say for which size of input it was trained; say it with "
            f"--crop-size{known}"
        )
    encoder["crop_size"] = crops.pop() if hints.crop_size is None else hints.crop_size
    try:
        return ModelConfig(
            encoder=EncoderConfig(**encoder),
            predictor=_predictor(path, shapes, encoder["hidden_size"], hints.predictor_heads),
            action_predictor=_action_predictor(path, shapes, hints.predictor_heads),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def infer_probe(
    path: Path,
    shapes: Shapes,
    labels: tuple[str, ...],
    *,
    heads: int | None,
    layers: tuple[int, ...] | None,
    frames: int | None,
) -> ClassifierConfig:
    """Finds the architecture of a probe.

    Args:
        path: its file.
        shapes: as in `infer`.
        labels: the names of its classes, which the file does not hold.
        heads: attention heads of its pooler; None means Meta's 16.
        layers: the encoder's layers that it sees; None means those of the released probe of that
            file name, else the last one.
        frames: frames of the clips that it was trained on; None means those of the released probe
            of that file name, else as many as the encoder.

    Returns:
        The architecture.

    Raises:
        CheckpointError: the shapes are of no such probe.
        InputError: there are too few or too many labels.
    """
    classes = _shape(path, shapes, "classifier.linear.weight", 2)[0]
    if len(labels) != classes:
        raise InputError(f"{path} has {classes} classes, and there are {len(labels)} labels")
    released = released_probe(path)
    if layers is None:
        layers = released.layers if released else ()
    if frames is None:
        frames = released.frames if released else None
    return ClassifierConfig(
        labels=labels,
        num_layers=_count(path, shapes, "classifier.pooler.blocks"),
        num_heads=_PROBE_HEADS if heads is None else heads,
        layer_norm_eps=1e-5,
        layers=layers,
        frames_per_clip=frames,
    )


def infer_anticipator(
    path: Path, shapes: Shapes, labels: ActionLabels, *, heads: int | None, frames: int | None
) -> AnticipatorConfig:
    """Finds the architecture of a probe for the anticipation of actions.

    Args:
        path: its file.
        shapes: as in `infer`.
        labels: the names of its classes, which the file does not hold.
        heads: attention heads of its pooler; None means Meta's 16.
        frames: frames of the clips that it was trained on; None means Meta's 32.

    Returns:
        The architecture.

    Raises:
        CheckpointError: the shapes are of no such probe.
        InputError: there are too few or too many labels.
    """
    classes, named = {}, {}
    for kind in ("verb", "noun", "action"):
        head = f"anticipator.{kind}_classifier.weight"
        needed = head in shapes or kind == "action"
        classes[f"{kind}s"] = _shape(path, shapes, head, 2)[0] if needed else 0
        named[f"{kind}s"] = len(getattr(labels, f"{kind}s"))
    if named != classes:
        there, given = (
            ", ".join(f"{count} {kind}" for kind, count in counts.items())
            for counts in (classes, named)
        )
        raise InputError(f"{path} has {there}, and there are labels for {given}")
    config = AnticipatorConfig(
        actions=labels.actions,
        verbs=labels.verbs,
        nouns=labels.nouns,
        num_layers=_count(path, shapes, "anticipator.pooler.blocks"),
    )
    changes = {"num_heads": heads, "frames_per_clip": frames}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)


def _encoder(path: Path, shapes: Shapes) -> dict[str, Any]:
    width, _, frames, side, _ = _shape(path, shapes, "encoder.patch_embed.proj.weight", 5)
    layers = _count(path, shapes, "encoder.blocks")
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": layers,
        "mlp_dim": _shape(path, shapes, "encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "patch_size": side,
        "tubelet_size": frames,
    }
    marks = ("patch_embed_img.", "norms_block.", "img_mod_embed", "video_mod_embed")
    if not any(name.startswith(tuple(f"encoder.{mark}" for mark in marks)) for name in shapes):
        return sizes
    if layers not in LEVELS:
        raise CheckpointError(
            f"{path} is a V-JEPA 2.1 of {layers} layers; where its levels are is known for "
            f"{', '.join(map(str, LEVELS))} layers"
        )
    family = {"rope": "interleaved", "interpolate": True, "image_tokenizer": True}
    return {**sizes, **family, "levels": LEVELS[layers]}


def _predictor(path: Path, shapes: Shapes, width: int, heads: int | None) -> PredictorConfig | None:
    if not any(name.startswith("predictor.") for name in shapes):
        return None
    first = "predictor.predictor_embed"
    first = f"{first}.0.weight" if f"{first}.0.weight" in shapes else f"{first}.weight"
    inputs = _shape(path, shapes, first, 2)[1]
    if inputs % width:
        raise CheckpointError(
            f"{path}: the predictor takes {inputs} channels, which are no multiple of the "
            f"encoder's {width}; these parts are of different models"
        )
    outputs, inner = _shape(path, shapes, "predictor.predictor_proj.weight", 2)
    is_2_1 = any(name.startswith("predictor.video_mod_embed") for name in shapes)
    known = {
        r.config.predictor.hidden_size: r.config.predictor.num_heads for r in _with_predictor()
    }
    return PredictorConfig(
        hidden_size=inner,
        num_layers=_count(path, shapes, "predictor.predictor_blocks"),
        num_heads=_predictor_heads(path, heads, inner, known),
        mlp_dim=_shape(path, shapes, "predictor.predictor_blocks.0.mlp.fc1.weight", 2)[0],
        num_mask_tokens=_count(path, shapes, "predictor.mask_tokens"),
        rope="interleaved" if is_2_1 else "tiled",
        num_levels=inputs // width,
        output_dim=None if outputs == inputs else outputs,
        context_projection="predictor.predictor_proj_context.weight" in shapes,
        modality_embeddings=is_2_1,
    )


def _action_predictor(
    path: Path, shapes: Shapes, heads: int | None
) -> ActionPredictorConfig | None:
    if not any(name.startswith("action_predictor.") for name in shapes):
        return None
    inner, action = _shape(path, shapes, "action_predictor.action_encoder.weight", 2)
    blocks = "action_predictor.predictor_blocks"
    known = {ActionPredictorConfig().hidden_size: ActionPredictorConfig().num_heads}
    return ActionPredictorConfig(
        hidden_size=inner,
        num_layers=_count(path, shapes, blocks),
        num_heads=_predictor_heads(path, heads, inner, known),
        mlp_dim=_shape(path, shapes, f"{blocks}.0.mlp.fc1.weight", 2)[0],
        action_dim=action,
    )


def _with_predictor() -> list[Release]:
    return [release for release in RELEASES.values() if release.config.predictor is not None]


def _check_hints(path: Path, hints: Hints, release: ModelConfig) -> None:
    """Raises CheckpointError where a hint is not what the release has that a file is called as."""
    predictor = release.predictor or release.action_predictor
    released = Hints(
        heads=release.encoder.num_heads,
        predictor_heads=predictor.num_heads if predictor else None,
        crop_size=release.crop_size,
    )
    for name, right in dataclasses.asdict(released).items():
        asked = getattr(hints, name)
        if asked not in (None, right):
            raise CheckpointError(
                f"{path} is called as a released file, for which --{name.replace('_', '-')} "
                f"{right} is right and {asked} is not; give another model's file another name"
            )


def _predictor_heads(path: Path, asked: int | None, width: int, by_width: Mapping[int, int]) -> int:
    if asked is not None:
        return asked
    what = "attention heads of a predictor"
    return _known(path, "--predictor-heads", what, width, by_width)


def _known(path: Path, option: str, what: str, width: int, by_width: Mapping[int, int]) -> int:
    if width not in by_width:
        raise InputError(
            f"{path} does not say the number of {what} of width {width}, and no released model has "
            f"that width; say it with {option}"
        )
    return by_width[width]


def _agree(sizes: Mapping[str, Any], config: EncoderConfig) -> bool:
    family = {"rope": "tiled"} | dict(sizes)
    return all(getattr(config, name) == value for name, value in family.items())


def _list(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _shape(path: Path, shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{path} has no {name}; it is not of Meta's V-JEPA 2, 2.1 or 2-AC")
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)}; it must have {rank} axes")
    return shape


def _count(path: Path, shapes: Shapes, stem: str) -> int:
    """How many layers are called `stem`.0, `stem`.1, ..."""
    pattern = re.compile(re.escape(stem) + r"\.(\d+)(\.|$)")
    found = {int(match[1]) for match in map(pattern.match, shapes) if match}
    if not found:
        raise CheckpointError(f"{path} has no {stem}.0; it is not of Meta's V-JEPA 2, 2.1 or 2-AC")
    return max(found) + 1  # a hole in the numbers is a missing tensor, which is said later
