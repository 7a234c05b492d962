"""The released checkpoints: what each one is, by name."""

import dataclasses

from jvjepa.config import ClassifierConfig, EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """One released checkpoint.

    Args:
        repo: its Hugging Face id.
        config: its architecture. The hub's own `config.json` holds the class names; here they are
            numbered.
        num_params: its exact number of parameters, encoder, predictor and classifier together.
    """

    repo: str
    config: ModelConfig
    num_params: int


_VIT_L = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}
_VIT_H = {"hidden_size": 1280, "num_layers": 32, "num_heads": 16, "mlp_dim": 5120}
_VIT_G = {"hidden_size": 1408, "num_layers": 40, "num_heads": 22, "mlp_dim": 6144}


def _release(
    name: str, size: dict[str, int], frames: int, crop: int, labels: int, num_params: int
) -> tuple[str, Release]:
    classifier = None
    if labels:
        # Meta trained every probe with 16 heads; Hugging Face's code runs them with the encoder's
        # number. Hugging Face's folders are what we load, so theirs is the default.
        names = tuple(f"LABEL_{i}" for i in range(labels))
        classifier = ClassifierConfig(labels=names, num_heads=size["num_heads"])
    config = ModelConfig(
        encoder=EncoderConfig(**size, crop_size=crop, frames_per_clip=frames),
        predictor=PredictorConfig(),
        classifier=classifier,
    )
    return name, Release(repo=f"facebook/{name}", config=config, num_params=num_params)


RELEASES: dict[str, Release] = dict(
    [
        _release("vjepa2-vitl-fpc64-256", _VIT_L, 64, 256, 0, 325_971_328),
        _release("vjepa2-vith-fpc64-256", _VIT_H, 64, 256, 0, 653_930_880),
        _release("vjepa2-vitg-fpc64-256", _VIT_G, 64, 256, 0, 1_034_555_264),
        _release("vjepa2-vitg-fpc64-384", _VIT_G, 64, 384, 0, 1_034_555_264),
        _release("vjepa2-vitl-fpc16-256-ssv2", _VIT_L, 16, 256, 174, 375_485_998),
        _release("vjepa2-vitg-fpc64-384-ssv2", _VIT_G, 64, 384, 174, 1_128_049_454),
        _release("vjepa2-vitl-fpc32-256-diving48", _VIT_L, 32, 256, 48, 375_356_848),
        _release("vjepa2-vitg-fpc32-384-diving48", _VIT_G, 32, 384, 48, 1_127_871_920),
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
