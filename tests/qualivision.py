"""QualiVision's model as the original has it, in torch. Importing this imports torch."""

import numpy as np
import torch
from berts import sentence_embeddings
from transformers import BertModel, VJEPA2Model

from jvjepa.typing import Params

HIDDEN = (16, 8)


def head_layers(width: int, hidden: tuple[int, int]) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, hidden[0]),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(*hidden),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(hidden[1], 5),
    )


def torch_head(params: Params) -> torch.nn.Sequential:
    """The original's layers, with our weights."""
    sizes = [params[name]["kernel"].shape for name in ("fc1", "fc2", "fc3")]
    layers = head_layers(sizes[0][0], sizes[1]).eval()
    state = {"0.weight": params["norm"]["scale"], "0.bias": params["norm"]["bias"]}
    for place, name in ((1, "fc1"), (4, "fc2"), (7, "fc3")):
        state[f"{place}.weight"] = params[name]["kernel"].T
        state[f"{place}.bias"] = params[name]["bias"]
    layers.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()})
    return layers


class Original(torch.nn.Module):
    """Its parts under the names that the original has them; scores as its forward pass."""

    def __init__(self, venc: VJEPA2Model, bert: BertModel, seed: int = 0) -> None:
        super().__init__()
        self.venc = venc
        transformer = torch.nn.Module()
        transformer.auto_model = bert
        self.tenc = torch.nn.Sequential(transformer)
        width = venc.config.hidden_size + bert.config.hidden_size
        self.head = torch.nn.Module()
        self.head.net = head_layers(width, HIDDEN)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not name.startswith("tenc."):
                    noise = torch.randn(parameter.shape, generator=generator)
                    scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
                    norm = "norm" in name or "net.0" in name
                    parameter.copy_(scale * noise + (norm and name.endswith("weight")))
        self.eval()

    def scores(self, video: np.ndarray, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        """Float32 [B, 5] of [B, T, H, W, 3]."""
        frames = torch.from_numpy(video).permute(0, 1, 4, 2, 3)
        with torch.no_grad():
            tokens = self.venc(pixel_values_videos=frames).last_hidden_state
            text = sentence_embeddings(self.tenc[0].auto_model, ids, mask, "cls")
            return self.head.net(torch.cat([tokens[:, 0], text], dim=-1)).numpy()
