"""The PyTorch original, run in float32. Importing this imports torch and transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging

from jvjepa.config import ModelConfig, RopeGrid
from jvjepa.convert.huggingface import to_hf_config
from jvjepa.errors import CheckpointError

Floats = NDArray[np.float32]


class Oracle:
    """Hugging Face's model, from and to NumPy.

    Args:
        model: theirs, with weights in float32.
        rounding: "bfloat16" rounds every weight to bfloat16 first; the computation stays float32.
    """

    name = f"transformers {transformers.__version__}"
    rope_grid: RopeGrid = "config"  # where their code takes positions from

    def __init__(self, model: torch.nn.Module, *, rounding: str) -> None:
        """Takes the model over."""
        if rounding == "bfloat16":
            model.to(torch.bfloat16).to(torch.float32)
        self._whole = model.eval()
        classifies = isinstance(model, transformers.VJEPA2ForVideoClassification)
        self._model = model.vjepa2 if classifies else model

    @classmethod
    def from_folder(cls, folder: Path, *, classifier: bool, rounding: str) -> "Oracle":
        """Loads a checkpoint of theirs; reads nothing from the network.

        Args:
            folder: the checkpoint.
            classifier: whether it has a pooler and a classifier.
            rounding: as above.

        Returns:
            The oracle.

        Raises:
            CheckpointError: transformers would fill weights at random.
        """
        kind = transformers.VJEPA2ForVideoClassification if classifier else transformers.VJEPA2Model
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        finally:
            if bars:
                logging.enable_progress_bar()
        problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
        if problems:
            raise CheckpointError(f"transformers cannot load all of {folder}: {problems}")
        return cls(model, rounding=rounding)

    @classmethod
    def from_meta(
        cls,
        config: ModelConfig,
        encoder: Mapping[str, torch.Tensor],
        predictor: Mapping[str, torch.Tensor],
        *,
        rounding: str,
    ) -> "Oracle":
        """Puts Meta's weights into Hugging Face's model.

        The names are translated here once more, as Hugging Face's own script did it, independent of
        the tables that `convert` goes by.

        Args:
            config: the architecture.
            encoder: Meta's state dict, without prefixes.
            predictor: the same.
            rounding: as above.

        Returns:
            The oracle.
        """
        with torch.device("meta"):
            model = transformers.VJEPA2Model(
                transformers.VJEPA2Config.from_dict(to_hf_config(config, None))
            )
        weights = {
            **_hf_names(encoder, "blocks", "encoder"),
            **_hf_names(predictor, "predictor_blocks", "predictor"),
        }
        numbers = range(config.predictor.num_mask_tokens)
        stack = [weights.pop(f"mask_tokens.{i}") for i in numbers]
        weights["predictor.embeddings.mask_tokens"] = torch.stack(stack)
        weights = {name: value.to(torch.float32) for name, value in weights.items()}
        model.load_state_dict(weights, strict=True, assign=True)
        return cls(model, rounding=rounding)

    @torch.inference_mode()
    def tokens(self, video: Floats) -> Floats:
        """Encodes [B, T, H, W, 3] to [B, N, D], after the final norm."""
        return self._model(_pixels(video), skip_predictor=True).last_hidden_state.numpy()

    @torch.inference_mode()
    def layers(self, video: Floats) -> Floats:
        """Encodes [B, T, H, W, 3] to [L+1, B, N, D]: patch tokens, then what each layer gives."""
        output = self._model(_pixels(video), skip_predictor=True, output_hidden_states=True)
        return torch.stack(output.hidden_states).numpy()

    @torch.inference_mode()
    def masked(self, video: Floats, keep: NDArray[Any]) -> Floats:
        """Encodes only the tokens `keep` [B, M], dropping the rest before the first layer.

        Their model masks the encoder's output; Meta's training masks its input. This puts their
        layers together as Meta does.
        """
        encoder, ids = self._model.encoder, torch.from_numpy(keep).long()
        x = encoder.embeddings(_pixels(video))
        x = torch.take_along_dim(x, ids[..., None], dim=1)
        for layer in encoder.layer:
            x, _ = layer(x, position_mask=ids)
        return encoder.layernorm(x).numpy()

    @torch.inference_mode()
    def predict(
        self, tokens: Floats, context_ids: NDArray[Any], target_ids: NDArray[Any]
    ) -> Floats:
        """Predicts the tokens of `target_ids` [B, K] from those of `context_ids` in [B, N, D]."""
        masks = [[torch.from_numpy(ids).long()] for ids in (context_ids, target_ids)]
        return self._model.predictor(torch.from_numpy(tokens), *masks).last_hidden_state.numpy()

    @torch.inference_mode()
    def classify(self, tokens: Floats) -> Floats:
        """Maps tokens [B, N, D] to logits."""
        return self._whole.classifier(self._whole.pooler(torch.from_numpy(tokens))).numpy()


def _hf_names(
    weights: Mapping[str, torch.Tensor], blocks: str, part: str
) -> dict[str, torch.Tensor]:
    """Meta's names and fused projections as Hugging Face's."""
    renamed = {
        "patch_embed.": "encoder.embeddings.patch_embeddings.",
        "norm.": "encoder.layernorm.",
        "predictor_embed.": "predictor.embeddings.predictor_embeddings.",
        "predictor_norm.": "predictor.layernorm.",
        "predictor_proj.": "predictor.proj.",
    }
    found: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if name.startswith(f"{blocks}."):
            name = name.replace(f"{blocks}.", f"{part}.layer.", 1).replace(".attn.", ".attention.")
            if ".qkv." in name:
                for third, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    found[name.replace("qkv", third)] = piece
                continue
        for old, new in renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        found[name] = value
    return found


def _pixels(video: Floats) -> torch.Tensor:
    """Channels last to [B, T, 3, H, W]."""
    return torch.from_numpy(video).permute(0, 1, 4, 2, 3)
