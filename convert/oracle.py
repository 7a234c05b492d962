"""The PyTorch original, run in float32. Importing this imports torch and transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging

from jvjepa.errors import CheckpointError

Floats = NDArray[np.float32]


class Oracle:
    """Hugging Face's model, from and to NumPy.

    Args:
        folder: a checkpoint of theirs.
        classifier: whether it has a pooler and a classifier.
        rounding: "bfloat16" rounds every weight to bfloat16 first; the computation stays float32.

    Raises:
        CheckpointError: transformers would fill weights at random.
    """

    def __init__(self, folder: Path, *, classifier: bool, rounding: str) -> None:
        """Loads it; reads nothing from the network."""
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
        if rounding == "bfloat16":
            model.to(torch.bfloat16).to(torch.float32)
        self._model = (model.vjepa2 if classifier else model).eval()

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


def _pixels(video: Floats) -> torch.Tensor:
    """Channels last to [B, T, 3, H, W]."""
    return torch.from_numpy(video).permute(0, 1, 4, 2, 3)
