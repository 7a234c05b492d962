"""Meta's golden checkpoints as our parameters and as the PyTorch port, their inputs and outputs.

The official names and layouts are spelled out once more here, independent of jvjepa.convert; the
port takes the tensors as they are.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from jvjepa.config import (
    ActionPredictorConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)
from jvjepa.convert.official import Official
from jvjepa.parameters import stack_layers
from jvjepa.typing import Params

GOLDEN = Path(__file__).parent / "golden"
Weights = dict[str, np.ndarray]
StateDicts = dict[str, dict[str, torch.Tensor]]

_SIZES = {"hidden_size": 32, "num_heads": 2, "mlp_dim": 128, "crop_size": 64, "frames_per_clip": 8}
_PREDICTOR = {"hidden_size": 24, "num_heads": 2, "mlp_dim": 96}

V2 = ModelConfig(
    encoder=EncoderConfig(**_SIZES, num_layers=4),
    predictor=PredictorConfig(**_PREDICTOR, num_layers=3, num_mask_tokens=10),
    classifier=ClassifierConfig(
        labels=tuple("abcdefg"), num_layers=2, num_heads=2, layer_norm_eps=1e-5
    ),
    action_predictor=ActionPredictorConfig(hidden_size=48, num_layers=3, num_heads=2, mlp_dim=192),
)


def _v2_1(**predictor: int) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(
            **_SIZES,
            num_layers=12,
            rope="interleaved",
            interpolate=True,
            image_tokenizer=True,
            levels=(2, 5, 8, 11),
        ),
        predictor=PredictorConfig(
            **_PREDICTOR,
            **predictor,
            num_layers=4,
            num_mask_tokens=8,
            rope="interleaved",
            context_projection=True,
            modality_embeddings=True,
        ),
    )


TEACHER = _v2_1(num_levels=4)  # vjepa2_1_tiny_teacher
DISTILLED = _v2_1(output_dim=96)  # vjepa2_1_tiny_distilled

MODELS = {  # by part: the file and the way to its state dict
    "vjepa2_tiny": (
        V2,
        {
            "encoder": ("vjepa2_tiny.pt", "target_encoder"),
            "predictor": ("vjepa2_tiny.pt", "predictor"),
            "classifier": ("vjepa2_tiny_probe.pt", "classifiers", 0),
            "action_predictor": ("vjepa2_ac_tiny.pt", "predictor"),
        },
    ),
    "vjepa2_1_tiny_teacher": (
        TEACHER,
        {
            "encoder": ("vjepa2_1_tiny_teacher.pt", "target_encoder"),
            "predictor": ("vjepa2_1_tiny_teacher.pt", "predictor"),
        },
    ),
    "vjepa2_1_tiny_distilled": (
        DISTILLED,
        {
            "encoder": ("vjepa2_1_tiny_distilled.pt", "ema_encoder"),
            "predictor": ("vjepa2_1_tiny_distilled.pt", "predictor"),
        },
    ),
}


def data(name: str) -> Weights:
    """The inputs and outputs of `name`.io.safetensors."""
    return load_file(GOLDEN / f"{name}.io.safetensors")


def video(array: np.ndarray) -> np.ndarray:
    """Their [B, 3, T, H, W] as ours, [B, T, H, W, 3]."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def weights(file: str, key: str | int, *keys: str | int) -> Weights:
    """One state dict of a `.pt` file without the prefixes of its names."""
    found: Any = torch.load(GOLDEN / file, weights_only=True)
    for step in (key, *keys):
        found = found[step]
    return {
        name.replace("module.", "").replace("backbone.", ""): value.numpy()
        for name, value in found.items()
    }


@functools.cache
def tensors(name: str) -> StateDicts:
    """The state dict of each part of one of `MODELS`."""
    return {
        part: {key: torch.from_numpy(value) for key, value in weights(*place).items()}
        for part, place in MODELS[name][1].items()
    }


@functools.cache
def model(name: str, rounding: str = "float32") -> Official:
    """The PyTorch port of one of `MODELS`."""
    return Official(MODELS[name][0], tensors(name), rounding=rounding)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def frames(count: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, actions and states of two clips."""
    tokens = random_tokens(2, count * rows * columns, 32)
    return tokens, random_tokens(2, count, 7, seed=1), random_tokens(2, count, 7, seed=2)


def encoder(theirs: Weights) -> Params:
    params: dict[str, Any] = {
        "patch_embed": _patches(theirs, "patch_embed.proj"),
        **_blocks(theirs, "blocks"),
    }
    if "norm.weight" in theirs:
        return stack_layers({**params, "norm": _norm(theirs, "norm")})
    norms = [_norm(theirs, f"norms_block.{i}") for i in range(4)]
    params["norms"] = {key: np.stack([norm[key] for norm in norms]) for key in ("scale", "bias")}
    params["patch_embed_image"] = _patches(theirs, "patch_embed_img.proj")
    return stack_layers({**params, **_modality(theirs)})


def predictor(theirs: Weights) -> Params:
    count = sum(name.startswith("mask_tokens.") for name in theirs)
    params: dict[str, Any] = {
        "mask_tokens": np.stack([theirs[f"mask_tokens.{i}"][0, 0] for i in range(count)]),
        **_blocks(theirs, "predictor_blocks"),
        "norm": _norm(theirs, "predictor_norm"),
        "proj": _dense(theirs, "predictor_proj"),
    }
    if "predictor_embed.weight" in theirs:
        params["embed"] = _dense(theirs, "predictor_embed")
    else:
        layers = {"fc1": 0, "fc2": 2}
        params["embed"] = {k: _dense(theirs, f"predictor_embed.{i}") for k, i in layers.items()}
    if "predictor_proj_context.weight" in theirs:
        params["proj_context"] = _dense(theirs, "predictor_proj_context")
        params |= _modality(theirs)
    return stack_layers(params)


def classifier(theirs: Weights) -> Params:
    return stack_layers({"pooler": _pooler(theirs), "linear": _dense(theirs, "linear")})


def anticipator(theirs: Weights) -> Params:
    kinds = [kind for kind in ("verb", "noun", "action") if f"{kind}_classifier.weight" in theirs]
    heads = {f"{kind}s": _dense(theirs, f"{kind}_classifier") for kind in kinds}
    return stack_layers({"pooler": _pooler(theirs), **heads})


def _pooler(theirs: Weights) -> Params:
    cross = "pooler.cross_attention_block"
    kv = {key: np.split(x, 2, axis=-1) for key, x in _dense(theirs, f"{cross}.xattn.kv").items()}
    attention = {
        "query": _dense(theirs, f"{cross}.xattn.q"),
        "key": {key: halves[0] for key, halves in kv.items()},
        "value": {key: halves[1] for key, halves in kv.items()},
    }
    return {
        "query_tokens": theirs["pooler.query_tokens"][0],
        **_blocks(theirs, "pooler.blocks"),
        "cross_attention": {**_block(theirs, cross), "attention": attention},
    }


def action_predictor(theirs: Weights) -> Params:
    return stack_layers(
        {
            "embed": _dense(theirs, "predictor_embed"),
            "action": _dense(theirs, "action_encoder"),
            "state": _dense(theirs, "state_encoder"),
            **_blocks(theirs, "predictor_blocks"),
            "norm": _norm(theirs, "predictor_norm"),
            "proj": _dense(theirs, "predictor_proj"),
        }
    )


def _dense(theirs: Weights, name: str) -> Weights:
    return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}


def _norm(theirs: Weights, name: str) -> Weights:
    return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}


def _patches(theirs: Weights, name: str) -> Weights:
    kernel = theirs[f"{name}.weight"].transpose(2, 3, 4, 1, 0)
    return {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": theirs[f"{name}.bias"]}


def _modality(theirs: Weights) -> Weights:
    names = {"image_embed": "img_mod_embed", "video_embed": "video_mod_embed"}
    return {ours: theirs[name][0, 0] for ours, name in names.items()}


def _blocks(theirs: Weights, name: str) -> Params:
    count = len({key.split(".")[name.count(".") + 1] for key in theirs if key.startswith(name)})
    return {f"blocks_{i}": _attention_block(theirs, f"{name}.{i}") for i in range(count)}


def _attention_block(theirs: Weights, name: str) -> Params:
    qkv = {key: np.split(x, 3, axis=-1) for key, x in _dense(theirs, f"{name}.attn.qkv").items()}
    attention: dict[str, Weights] = {
        part: {key: thirds[i] for key, thirds in qkv.items()}
        for i, part in enumerate(("query", "key", "value"))
    }
    attention["proj"] = _dense(theirs, f"{name}.attn.proj")
    return {**_block(theirs, name), "attention": attention}


def _block(theirs: Weights, name: str) -> Params:
    return {
        **{part: _norm(theirs, f"{name}.{part}") for part in ("norm1", "norm2")},
        "mlp": {part: _dense(theirs, f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
    }
