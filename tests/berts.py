"""Tiny random BERT sentence encoders as Hugging Face has them. Importing this imports torch."""

from pathlib import Path

import torch
from quality import VOCABULARY, write_sentence_modules, write_tokenizer
from transformers import BertConfig, BertModel

from jvjepa.text_config import Pooling


def tiny_bert_config(**changes: int | str) -> BertConfig:
    """The same sizes as `quality.tiny_text_config`."""
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 16,
    }
    return BertConfig(**{**sizes, **changes})


def random_bert(config: BertConfig, seed: int = 0) -> BertModel:
    """The model in eval mode; every parameter is random: no bias zero, no norm's scale one."""
    model = BertModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "LayerNorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("weight") and "embeddings" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model


def save_sentence_encoder(
    folder: Path, *, pooling: Pooling = "cls", seed: int = 0, **changes: int | str
) -> BertModel:
    """Writes a random sentence encoder with all its files into `folder`, and returns the BERT."""
    model = random_bert(tiny_bert_config(**changes), seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    write_sentence_modules(folder, pooling, width=model.config.hidden_size)
    return model


def sentence_embeddings(
    model: BertModel, ids: torch.Tensor, mask: torch.Tensor, pooling: Pooling
) -> torch.Tensor:
    """[B, D] of length 1, as sentence-transformers' modules Transformer, Pooling and Normalize."""
    with torch.no_grad():
        tokens = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[..., None].to(tokens.dtype)
    mean = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(tokens[:, 0] if pooling == "cls" else mean, p=2, dim=1)
