"""Parity with Meta's official code, whose outputs are in tests/golden."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import relative_error
from safetensors.numpy import load_file

from jvjepa import Encoder, EncoderConfig
from jvjepa.typing import Params
from jvjepa.weights import stack_layers

GOLDEN = Path(__file__).parent / "golden"
CONFIG = EncoderConfig(hidden_size=32, num_layers=4, num_heads=2, mlp_dim=128, crop_size=64)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "vjepa2_tiny.io.safetensors")


@pytest.fixture(scope="module")
def params() -> Params:
    """The official names and layouts, spelled out once more here, independent of jvjepa.convert."""
    checkpoint = torch.load(GOLDEN / "vjepa2_tiny.pt", weights_only=True)["target_encoder"]
    theirs = {k.removeprefix("module.backbone."): v.numpy() for k, v in checkpoint.items()}

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    def block(i: int) -> Params:
        qkv = dense(f"blocks.{i}.attn.qkv")
        thirds = {
            name: {k: np.split(v, 3, axis=-1)[part] for k, v in qkv.items()}
            for part, name in enumerate(("query", "key", "value"))
        }
        return {
            "norm1": norm(f"blocks.{i}.norm1"),
            "attention": {**thirds, "proj": dense(f"blocks.{i}.attn.proj")},
            "norm2": norm(f"blocks.{i}.norm2"),
            "mlp": {name: dense(f"blocks.{i}.mlp.{name}") for name in ("fc1", "fc2")},
        }

    patches = theirs["patch_embed.proj.weight"].transpose(2, 3, 4, 1, 0).reshape(-1, 32)
    return stack_layers(
        {
            "patch_embed": {"kernel": patches, "bias": theirs["patch_embed.proj.bias"]},
            **{f"blocks_{i}": block(i) for i in range(CONFIG.num_layers)},
            "norm": norm("norm"),
        }
    )


def test_video(data: dict[str, np.ndarray], params: Params) -> None:
    video = np.moveaxis(data["in.video"], 1, -1)
    tokens = Encoder(CONFIG).apply({"params": params}, video)
    assert relative_error(tokens, data["out.video"]) <= 1e-5


def test_masked_video(data: dict[str, np.ndarray], params: Params) -> None:
    video = np.moveaxis(data["in.video"], 1, -1)
    keep = jnp.asarray(data["in.masks_x"], jnp.int32)
    tokens = Encoder(CONFIG).apply({"params": params}, video, keep)
    assert relative_error(tokens, data["out.video_masked"]) <= 1e-5
