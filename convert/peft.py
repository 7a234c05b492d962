"""From our LoRA adapters to those of Hugging Face's peft library, for V-JEPA 2.

Reference: `LoraConfig` and `save_pretrained` of peft 0.21.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from jvjepa.adapters import Adapters, load_adapters
from jvjepa.convert.huggingface import hf_entries, to_hf_config
from jvjepa.convert.tables import LINEAR, Entry
from jvjepa.errors import ConfigError
from jvjepa.records import CONFIG_FILE
from jvjepa.storage import check_apart, check_free, new_folder, write_safetensors
from jvjepa.weights import load

_PREFIX = "base_model.model"  # peft's wrappers
_WEIGHTS_FILE = "adapter_model.safetensors"
_F32 = np.dtype(np.float32)


def export_peft(
    model: str | Path, adapter: str | Path, out: str | Path, *, force: bool = False
) -> int:
    """Writes adapters so that `peft.PeftModel.from_pretrained(hf_model, out)` loads them.

    Args:
        model: the converted checkpoint that they were trained on.
        adapter: what `jvjepa.adapters.save_adapters` wrote.
        out: the folder to make; it appears whole or not at all.
        force: replace `out`.

    Returns:
        How many layers of Hugging Face's model are adapted.

    Raises:
        InputError: an input is not whole, they do not belong together, or `out` exists or
            holds one.
        ConfigError: transformers does not have this model, or peft not this kind of adapter.
    """
    out = Path(out)
    check_apart(out, model, adapter)
    check_free(out, _WEIGHTS_FILE, force=force)
    loaded = load(model)
    source = loaded.source
    try:
        to_hf_config(loaded.config, None if source is None else source.config)
    except ConfigError as error:
        raise ConfigError(f"{Path(model) / CONFIG_FILE}: {error}") from None
    adapters = load_adapters(adapter, loaded.params)
    pieces = dict(_pieces(adapters, hf_entries(loaded.config)))
    modules = [name.removesuffix(".lora_A.weight") for name in pieces if ".lora_A." in name]
    config = _config(adapters, [name.removeprefix(f"{_PREFIX}.") for name in modules])
    config["base_model_name_or_path"] = None if source is None else source.name
    with new_folder(out, _WEIGHTS_FILE, force=force) as work:
        text = json.dumps(config, indent=2) + "\n"
        (work / "adapter_config.json").write_text(text, encoding="utf-8")
        path, shapes = work / _WEIGHTS_FILE, {n: x.shape for n, x in pieces.items()}
        write_safetensors(path, shapes, _F32, pieces.items(), {"format": "pt"})
    return len(modules)


def _pieces(adapters: Adapters, entries: list[Entry]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Their factors, [r, in] and [out, r], of every layer that was chosen."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(adapters.lora, sep="/").items()}
    for entry in entries:
        ours = entry.ours.removesuffix("/kernel")
        if f"{ours}/a" not in flat:
            continue
        if entry.transform is not LINEAR:
            raise ConfigError(f"{ours} is no linear layer in transformers; peft cannot adapt it so")
        layer = () if entry.layer is None else entry.layer
        if flat[f"{ours}/scale"][layer] == 0:
            continue
        module = f"{_PREFIX}.{entry.theirs.removesuffix('.weight')}"
        yield f"{module}.lora_A.weight", flat[f"{ours}/a"][layer].T
        yield f"{module}.lora_B.weight", flat[f"{ours}/b"][layer].T


def _config(adapters: Adapters, modules: list[str]) -> dict[str, Any]:
    config = adapters.config
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
