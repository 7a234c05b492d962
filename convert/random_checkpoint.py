"""A small V-JEPA 2 with random weights, saved by transformers as a released one would be."""

import errno
from pathlib import Path

from safetensors import SafetensorError

from jvjepa.errors import InputError


def save_random_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Makes a 6-layer encoder of width 384 for 256-pixel input, in Hugging Face's format.

    Args:
        folder: where to save it.
        seed: of the weights.

    Raises:
        InputError: torch or transformers is missing.
        OSError: the folder cannot be written, or the disk is full.
    """
    try:
        import torch
        from transformers import VJEPA2Config, VJEPA2Model
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"needs {error.name}: pip install 'jvjepa[torch]'") from None
    config = VJEPA2Config(
        hidden_size=384,
        num_attention_heads=6,
        num_hidden_layers=6,
        frames_per_clip=16,
        pred_hidden_size=96,
        pred_num_attention_heads=3,
        pred_num_hidden_layers=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VJEPA2Model(config)
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # which hides the number of the OSError that it is
        raise OSError(errno.EIO, str(error), str(folder)) from None
