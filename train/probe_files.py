"""Trained heads as folders: `config.json` and `model.safetensors`.

    save_probe("runs/stream/head", result)
    ...
    probe = load_probe("runs/stream/head", model.params)
    state, out = streaming.step(model.encoder, model.params["encoder"], state, tubelet)
    logits = probe.logits(out.embedding[:, None])  # of a probe that sees the mean of a tubelet

A head that sees all tokens of clips can be a part of a model instead, see
`jvjepa.train.probe.attach_probe`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jvjepa.adapters import weights_sha256
from jvjepa.config import ModelConfig
from jvjepa.errors import CheckpointError, InputError
from jvjepa.fields import build
from jvjepa.records import CONFIG_FILE, PROBE_FORMAT, read_json
from jvjepa.storage import new_folder
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.probe import ProbeResult
from jvjepa.train.probe_heads import Heads, ProbeConfig
from jvjepa.typing import Params
from jvjepa.weights import WEIGHTS_FILE, read_params, stored_tensors, write_folder

_SCALARS = ("head", "learning_rate", "weight_decay", "accuracy", "encoder")


def save_probe(folder: str | Path, result: ProbeResult, *, force: bool = False) -> None:
    """Saves the best head of a probe; the folder appears whole or not at all.

    Args:
        folder: where; it must not exist unless `force`.
        result: the head.
        force: replace the folder.

    Raises:
        InputError: the folder exists, or the parameters are not those of such a head.
    """
    heads, shapes = result.heads, _shapes(result.heads)
    params = {"head": result.params, "statistics": result.statistics}
    dtypes, tensors = stored_tensors(params, shapes)
    record = {
        "probe": dataclasses.asdict(heads.config),
        "features": dataclasses.asdict(heads.features),
        "architecture": dataclasses.asdict(heads.encoder),
        "labels": result.labels,
        **{name: getattr(result, name) for name in _SCALARS},
    }
    with new_folder(Path(folder), WEIGHTS_FILE, force=force) as work:
        write_folder(work, PROBE_FORMAT, record, None, dtypes, shapes, tensors)


def load_probe(folder: str | Path, params: Params | None = None) -> ProbeResult:
    """Loads the head of a probe.

    Args:
        folder: what `save_probe` wrote.
        params: of the whole model whose tokens it will see, {"encoder": .., ..}, to check that it
            was trained on them; None checks nothing of the kind.

    Returns:
        The head, its parameters on JAX's default device; `ProbeResult.logits` runs it.

    Raises:
        CheckpointError: the folder is not whole, or the head is for other weights.
    """
    path = Path(folder) / CONFIG_FILE
    record: dict[str, Any] = read_json(folder, PROBE_FORMAT, "head of a probe")
    try:
        heads = Heads(
            config=build(ProbeConfig, record["probe"]),
            encoder=ModelConfig.from_json({"encoder": record["architecture"]}).encoder,
            features=FeatureConfig.from_json(record["features"]),
            classes=len(record["labels"]),
        )
        known = {name: record[name] for name in _SCALARS}
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error}") from None
    except (InputError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    found = None if params is None else weights_sha256(params["encoder"])
    if found not in (None, known["encoder"]):
        raise CheckpointError(
            f"{folder} was trained on other weights: those of its encoder had the sha256 "
            f"{known['encoder']}, the model's have {found}"
        )
    stored, _ = read_params(Path(folder) / WEIGHTS_FILE, _shapes(heads), scan=True)
    return ProbeResult(
        heads=heads,
        labels=tuple(record["labels"]),
        params=stored["head"],
        statistics=stored.get("statistics", {}),
        **known,
    )


def _shapes(heads: Heads) -> dict[str, tuple[int, ...]]:
    """Of all arrays of one head, by flat name."""
    width = (heads.encoder.hidden_size,)
    names = ("mean", "std") if heads.config.kind == "linear" else ()
    return flatten_dict({"head": heads.shapes, "statistics": dict.fromkeys(names, width)}, sep="/")
