"""The released checkpoints: what each one is, by name."""

import dataclasses

from jvjepa.config import (
    ActionPredictorConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)
from jvjepa.errors import InputError

_FILES = "https://dl.fbaipublicfiles.com/vjepa2"  # where Meta serves its .pt files
_LICENCE = "not stated"  # theirs, as far as known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One released checkpoint.

    Args:
        source: its Hugging Face id, or the URL of its `.pt` file.
        config: its architecture. The hub's own `config.json` holds the class names; here they are
            numbered.
        num_params: its exact number of parameters by part; "all" is encoder, predictor and
            classifier together.
        licence: of the weights, as far as known.
        key: the sub-dictionary of the `.pt` file that holds the encoder which Meta's hub loads; ""
            for Hugging Face's.
        parity: the largest relative error that `benchmarks/conversion.py NAME --verify` found
            between ours and the PyTorch original, at full size, with random weights, on 4 frames,
            in float32. None: not measured.
    """

    source: str
    config: ModelConfig
    num_params: dict[str, int]
    licence: str
    key: str = ""
    parity: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One released attentive probe: a `.pt` file with a pooler and a classifier, and no encoder.

    Args:
        source: the URL of its file.
        licence: of the weights, as far as known.
        encoder: the name of the release that it was trained on.
        num_classes: its classes, of actions where it anticipates; the file does not name them.
        verbs: of a probe that anticipates actions, the classes of verbs; 0 of a classifier.
        nouns: likewise, the classes of nouns.
        layers: the encoder's layers that it sees, as in `ClassifierConfig`.
        frames: frames of a clip.
        clips: clips of a video whose tokens it sees together.
        views: crops of each clip whose probabilities are averaged.
    """

    source: str
    licence: str
    encoder: str
    num_classes: int
    layers: tuple[int, ...]
    frames: int
    clips: int
    views: int
    verbs: int = 0
    nouns: int = 0


_VIT_B = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
_VIT_L = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
_VIT_H = {"hidden_size": 1280, "num_layers": 32, "num_heads": 16, "mlp_dim": 5120}
_VIT_G = {"hidden_size": 1408, "num_layers": 40, "num_heads": 22, "mlp_dim": 6144}
_VIT_GIGANTIC = {"hidden_size": 1664, "num_layers": 48, "num_heads": 26, "mlp_dim": 8192}

# Where V-JEPA 2.1 has its levels, by the number of layers.
LEVELS = {
    12: (2, 5, 8, 11),
    24: (5, 11, 17, 23),
    40: (9, 19, 29, 39),
    48: (11, 23, 37, 47),  # not evenly spaced, as released
}


def _config(size: dict[str, int], frames: int, crop: int, labels: int = 0) -> ModelConfig:
    """V-JEPA 2."""
    classifier = None
    if labels:
        # Meta trained every probe with 16 heads; Hugging Face's code runs them with the encoder's
        # number. Hugging Face's folders are what we load, so theirs is the default.
        names = tuple(f"LABEL_{i}" for i in range(labels))
        classifier = ClassifierConfig(labels=names, num_heads=size["num_heads"])
    return ModelConfig(
        encoder=EncoderConfig(**size, crop_size=crop, frames_per_clip=frames),
        predictor=PredictorConfig(),
        classifier=classifier,
    )


def _config_2_1(size: dict[str, int], *, teacher: int | None) -> ModelConfig:
    """V-JEPA 2.1: distilled from a teacher of that width, or trained with all levels."""
    encoder = EncoderConfig(
        **size,
        crop_size=384,
        rope="interleaved",
        interpolate=True,
        image_tokenizer=True,
        levels=LEVELS[size["num_layers"]],
    )
    predictor = PredictorConfig(
        num_layers=24 if teacher is None else 12,
        num_mask_tokens=8,
        rope="interleaved",
        num_levels=4 if teacher is None else 1,
        output_dim=teacher,
        context_projection=True,
        modality_embeddings=True,
    )
    return ModelConfig(encoder=encoder, predictor=predictor)


# What `benchmarks/conversion.py NAME --verify` found, see `Release.parity`.
_PARITY = {
    "vjepa2-vitl-fpc64-256": 1.5e-6,
    "vjepa2-vith-fpc64-256": 1.4e-6,
    "vjepa2-vitg-fpc64-256": 1.4e-6,
    "vjepa2-vitg-fpc64-384": 1.4e-6,
    "vjepa2-vitl-fpc16-256-ssv2": 1.5e-6,
    "vjepa2-vitg-fpc64-384-ssv2": 1.4e-6,
    "vjepa2-vitl-fpc32-256-diving48": 1.5e-6,
    "vjepa2-vitg-fpc32-384-diving48": 1.4e-6,
    "vjepa2_vit_large": 1.5e-6,
    "vjepa2_vit_huge": 1.5e-6,
    "vjepa2_vit_giant": 1.4e-6,
    "vjepa2_vit_giant_384": 1.4e-6,
    "vjepa2_ac_vit_giant": 1.4e-6,
    "vjepa2_1_vit_base_384": 1.4e-6,
    "vjepa2_1_vit_large_384": 1.5e-6,
    "vjepa2_1_vit_giant_384": 1.5e-6,
    "vjepa2_1_vit_gigantic_384": 1.5e-6,
}


def _hub(
    name: str, config: ModelConfig, num_params: int, licence: str = "MIT"
) -> tuple[str, Release]:
    return name, Release(
        source=f"facebook/{name}",
        config=config,
        num_params={"all": num_params},
        licence=licence,
        parity=_PARITY.get(name),
    )


def _pt(
    name: str, file: str, key: str, config: ModelConfig, **num_params: int
) -> tuple[str, Release]:
    return name, Release(
        source=f"{_FILES}/{file}",
        config=config,
        num_params=num_params,
        licence=_LICENCE,
        key=key,
        parity=_PARITY.get(name),
    )


_LARGE, _HUGE = _config(_VIT_L, 64, 256), _config(_VIT_H, 64, 256)
_GIANT, _GIANT_384 = _config(_VIT_G, 64, 256), _config(_VIT_G, 64, 384)

RELEASES: dict[str, Release] = dict(
    [
        _hub("vjepa2-vitl-fpc64-256", _LARGE, 325_971_328),
        _hub("vjepa2-vith-fpc64-256", _HUGE, 653_930_880),
        _hub("vjepa2-vitg-fpc64-256", _GIANT, 1_034_555_264, "Apache-2.0"),
        _hub("vjepa2-vitg-fpc64-384", _GIANT_384, 1_034_555_264, "Apache-2.0"),
        _hub("vjepa2-vitl-fpc16-256-ssv2", _config(_VIT_L, 16, 256, 174), 375_485_998),
        _hub("vjepa2-vitg-fpc64-384-ssv2", _config(_VIT_G, 64, 384, 174), 1_128_049_454),
        _hub("vjepa2-vitl-fpc32-256-diving48", _config(_VIT_L, 32, 256, 48), 375_356_848),
        _hub("vjepa2-vitg-fpc32-384-diving48", _config(_VIT_G, 32, 384, 48), 1_127_871_920),
        _pt("vjepa2_vit_large", "vitl.pt", "target_encoder", _LARGE, all=325_971_328),
        _pt("vjepa2_vit_huge", "vith.pt", "target_encoder", _HUGE, all=653_930_880),
        _pt("vjepa2_vit_giant", "vitg.pt", "target_encoder", _GIANT, all=1_034_555_264),
        _pt("vjepa2_vit_giant_384", "vitg-384.pt", "target_encoder", _GIANT_384, all=1_034_555_264),
        _pt(
            "vjepa2_ac_vit_giant",
            "vjepa2-ac-vitg.pt",
            "encoder",
            ModelConfig(encoder=_GIANT.encoder, action_predictor=ActionPredictorConfig()),
            encoder=1_012_173_952,
            action_predictor=305_213_824,
        ),
        _pt(
            "vjepa2_1_vit_base_384",
            "vjepa2_1_vitb_dist_vitG_384.pt",
            "ema_encoder",
            _config_2_1(_VIT_B, teacher=1664),
            encoder=86_833_152,
            predictor=22_874_752,
        ),
        _pt(
            "vjepa2_1_vit_large_384",
            "vjepa2_1_vitl_dist_vitG_384.pt",
            "ema_encoder",
            _config_2_1(_VIT_L, teacher=1664),
            encoder=304_680_960,
            predictor=22_973_056,
        ),
        _pt(
            "vjepa2_1_vit_giant_384",
            "vjepa2_1_vitg_384.pt",
            "target_encoder",
            _config_2_1(_VIT_G, teacher=None),
            encoder=1_013_267_968,
            predictor=55_400_704,
        ),
        _pt(
            "vjepa2_1_vit_gigantic_384",
            "vjepa2_1_vitG_384.pt",
            "target_encoder",
            _config_2_1(_VIT_GIGANTIC, teacher=None),
            encoder=1_845_216_768,
            predictor=59_433_472,
        ),
    ]
)


def _probe(
    file: str, encoder: str, num_classes: int, frames: int, clips: int, *layers: int
) -> tuple[str, Probe]:
    """A classifier."""
    name = file.removesuffix(".pt")
    return name, Probe(
        source=f"{_FILES}/evals/{file}",
        licence=_LICENCE,
        encoder=encoder,
        num_classes=num_classes,
        layers=layers,
        frames=frames,
        clips=clips,
        views=3,
    )


def _anticipator(file: str, encoder: str) -> tuple[str, Probe]:
    """A probe that was trained on EPIC-KITCHENS-100; others report these numbers of its classes."""
    name, probe = _probe(file, encoder, 3568, 32, 1)
    return name, dataclasses.replace(probe, views=1, verbs=97, nouns=289)


_DIVING_L, _DIVING_G = (17, 19, 21, 23), (24, 29, 34, 39)

PROBES: dict[str, Probe] = dict(
    [
        _probe("ssv2-vitl-16x2x3.pt", "vjepa2_vit_large", 174, 16, 2),
        _probe("ssv2-vitg-384-64x2x3.pt", "vjepa2_vit_giant_384", 174, 64, 2),
        _probe("diving48-vitl-256.pt", "vjepa2_vit_large", 48, 32, 4, *_DIVING_L),
        _probe("diving48-vitg-384-32x4x3.pt", "vjepa2_vit_giant_384", 48, 32, 4, *_DIVING_G),
        _anticipator("ek100-vitl-256.pt", "vjepa2_vit_large"),
        _anticipator("ek100-vitg-384.pt", "vjepa2_vit_giant_384"),
    ]
)


def get(name: str) -> Release:
    """Looks up a released checkpoint.

    Args:
        name: its name, with or without the owner ("facebook/").

    Returns:
        The entry.

    Raises:
        InputError: no checkpoint has that name; the message lists those that there are.
    """
    release = RELEASES.get(name.removeprefix("facebook/"))
    if release is None:
        known = ", ".join(RELEASES)
        raise InputError(f"no released checkpoint is called {name!r}; there are {known}")
    return release
