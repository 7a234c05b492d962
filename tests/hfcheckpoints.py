"""Tiny random checkpoints as transformers writes them. Importing this imports torch."""

from pathlib import Path

import torch
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

HFModel = VJEPA2Model | VJEPA2ForVideoClassification


def tiny_config(
    *, head_width: int = 32, layers: int = 2, heads: int = 2, crop: int = 64, labels: int = 0
) -> VJEPA2Config:
    """A config whose dimensions all differ; with `labels` it is a classifier's, else an encoder's.

    The pooler's MLP is 4 times the width, the encoder's 2.5 times, so that one cannot pass for the
    other.
    """
    names = {i: f"Doing thing {i}" for i in range(labels)}
    return VJEPA2Config(
        crop_size=crop,
        frames_per_clip=4,
        hidden_size=head_width * heads,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        mlp_ratio=2.5,
        num_pooler_layers=3,
        pred_hidden_size=32,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=4,
        pred_mlp_ratio=3.0,
        **({"id2label": names, "label2id": {v: k for k, v in names.items()}} if labels else {}),
        architectures=["VJEPA2ForVideoClassification" if labels else "VJEPA2Model"],
    )


def random_model(config: VJEPA2Config, seed: int = 0) -> HFModel:
    """The model in eval mode, float32, every parameter random: no bias zero, no norm's scale one.

    Weights have the size that trained ones have; larger ones amplify rounding chaotically.
    """
    classifier = config.architectures == ["VJEPA2ForVideoClassification"]
    model = (VJEPA2ForVideoClassification if classifier else VJEPA2Model)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.split(".")[-2]
            if is_norm and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("weight"):
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model


def save_checkpoint(
    folder: Path, config: VJEPA2Config, *, seed: int = 0, shard_size: str | None = None
) -> HFModel:
    """Writes `random_model(config, seed)` into `folder`, and returns it.

    `shard_size` ("100KB") makes several files and an index.
    """
    model = random_model(config, seed)
    sizes = {} if shard_size is None else {"max_shard_size": shard_size}
    model.save_pretrained(folder, **sizes)
    return model
