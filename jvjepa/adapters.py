"""Saved LoRA adapters: folders with `config.json` and `adapters.safetensors`, tied to a base."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.lora import LoraConfig, factor_shapes, merge_lora, split, stacked_shapes, with_constants
from jvjepa.packing import Quantization, pack_params
from jvjepa.parameters import stack_layers, unstack_layers
from jvjepa.records import CONFIG_FILE, LORA_FORMAT
from jvjepa.storage import (
    check_apart,
    check_free,
    new_folder,
    open_safetensors,
    write_safetensors,
)
from jvjepa.typing import Array, Params
from jvjepa.weights import WEIGHTS_FILE, check_names, load, save

if TYPE_CHECKING:
    from rich.console import Console

    from jvjepa import cli

ADAPTERS_FILE = "adapters.safetensors"
_F32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters, and what they belong to.

    Args:
        config: of what kind they are.
        base: `weights_sha256` of each adapted part, {"encoder": .., ..}, that they were trained on.
        lora: the collection "lora" of each of these parts, see `jvjepa.lora`.
    """

    config: LoraConfig
    base: Mapping[str, str]
    lora: Params


def base_sha256(params: Params, lora: Params) -> dict[str, str]:
    """The `Adapters.base` of adapters that are made for `params`, both of a whole model."""
    return {part: weights_sha256(params[part]) for part in lora}


def weights_sha256(params: Params) -> str:
    """Digests the names, dtypes, shapes and values of the parameters of one part.

    Args:
        params: of the part; blocks stacked or each of its own, which gives the same. Of quantized
            kernels it takes what is stored.

    Returns:
        The sha256, hexadecimal.
    """
    pieces: dict[str, dict[int, Array]] = {}  # of each array: the whole of it, or its layers
    for name, leaf in flatten_dict(pack_params(params), sep="/").items():
        block = re.search(r"\bblocks_(\d+)", name)
        stacked = name if block is None else name.replace(block[0], "blocks", 1)
        pieces.setdefault(stacked, {})[-1 if block is None else int(block[1])] = leaf
    digest = hashlib.sha256()
    for name, rows in sorted(pieces.items()):
        stack = () if -1 in rows else (len(rows),)
        leaf = next(iter(rows.values()))
        digest.update(f"{name} {leaf.dtype} {(*stack, *leaf.shape)}\n".encode())
        for i in sorted(rows):
            digest.update(np.ascontiguousarray(rows[i]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_adapters(folder: str | Path, adapters: Adapters, *, force: bool = False) -> None:
    """Saves adapters as a folder, which appears whole or not at all.

    Args:
        folder: where; it must not exist unless `force`.
        adapters: whole and finite; blocks stacked or each of its own.
        force: replace the folder.

    Raises:
        InputError: the folder exists, or the adapters are not what their config says.
    """
    trained, _ = split(stack_layers(adapters.lora))
    flat = flatten_dict(trained, sep="/")
    factors = {name: np.asarray(flat[name]) for name in sorted(flat)}
    _check_factors("adapters", factors, adapters.config)
    if set(adapters.base) != set(adapters.lora):
        raise InputError(f"base = {adapters.base}; it must have {', '.join(adapters.lora)}")
    record = {
        "format": LORA_FORMAT,
        "lora": dataclasses.asdict(adapters.config),
        "base": dict(adapters.base),
    }
    with new_folder(Path(folder), ADAPTERS_FILE, force=force) as work:
        (work / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shapes = {name: factor.shape for name, factor in factors.items()}
        write_safetensors(
            work / ADAPTERS_FILE, shapes, _F32, factors.items(), {"format": LORA_FORMAT}
        )


def load_adapters(
    folder: str | Path,
    params: Params | None = None,
    quantization: Quantization | None = None,
) -> Adapters:
    """Loads adapters.

    Args:
        folder: what `save_adapters` wrote.
        params: of the whole model that they are for, {"encoder": .., ..}, to check that they were
            made for it; None checks nothing of the kind.
        quantization: how `params` were quantized, `Model.quantization`; adapters of the
            floating-point weights that they were made of are for them too.

    Returns:
        The adapters; their blocks are as those of `params`, and stacked without them.

    Raises:
        CheckpointError: the folder is not whole, or the adapters are for another architecture or
            for other weights.
    """
    folder = Path(folder)
    config, base = _read_record(folder / CONFIG_FILE)
    path = folder / ADAPTERS_FILE
    with open_safetensors(path) as file:
        factors = {name: file.get_tensor(name) for name in file.keys()}
    _check_factors(str(path), factors, config)
    try:
        if params is not None:
            expected = factor_shapes(stacked_shapes(params), config)
            check_names(str(path), {name: x.shape for name, x in factors.items()}, expected)
        lora = with_constants({name: jnp.asarray(x) for name, x in factors.items()}, config)
    except ConfigError as error:
        raise CheckpointError(f"{folder} does not fit the model: {error}") from None
    if set(base) != set(lora):
        raise CheckpointError(f"{folder}: base has {list(base)}, the adapters are of {list(lora)}")
    if params is not None:
        for part, right in base.items():
            found = weights_sha256(params[part])
            if right not in (found, quantization and quantization.base.get(part)):
                raise CheckpointError(
                    f"{folder} was trained on other weights: those of its {part} had the sha256 "
                    f"{right}, the model's have {found}"
                )
        if stacked_shapes(params).keys() != flatten_dict(params, sep="/").keys():
            lora = unstack_layers(lora)
    return Adapters(config=config, base=base, lora=lora)


def _read_record(path: Path) -> tuple[LoraConfig, dict[str, str]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist; {path.parent} holds no adapters") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != LORA_FORMAT:
        raise CheckpointError(f"{path} is not of format {LORA_FORMAT!r}")
    lora, base = record.get("lora"), record.get("base")
    if not isinstance(lora, dict) or not isinstance(base, dict):
        raise CheckpointError(f"{path}: lora = {lora!r}, base = {base!r}; both must be objects")
    for part, digest in base.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise CheckpointError(f"{path}: base.{part} = {digest!r}; it must be a sha256 in hex")
    values = {key: tuple(x) if isinstance(x, list) else x for key, x in lora.items()}
    try:
        return LoraConfig(**values), base
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_factors(where: str, factors: Mapping[str, np.ndarray], config: LoraConfig) -> None:
    """Raises unless there are factors, all float32, finite, and of the config's rank."""
    if not factors:
        raise CheckpointError(f"{where}: there are no adapters")
    for name, factor in factors.items():
        axis = {"a": -1, "b": -2}.get(name.rpartition("/")[2])
        if axis is None or factor.ndim < 2:
            raise CheckpointError(f"{where}: {name} {list(factor.shape)} is no factor a or b")
        if factor.shape[axis] != config.rank:
            raise CheckpointError(
                f"{where}: {name} has rank {factor.shape[axis]}, the config says {config.rank}"
            )
        if factor.dtype != _F32:
            raise CheckpointError(f"{where}: {name} is {factor.dtype}; it must be float32")
        if not np.isfinite(factor).all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite")


def merge_saved(folder: str | Path, params: Params) -> tuple[Params, dict[str, str]]:
    """Merges saved adapters into the parameters of a whole model.

    Args:
        folder: what `save_adapters` wrote.
        params: {"encoder": .., ..}, those that the adapters were trained on.

    Returns:
        The merged parameters, and for `Source.lora` what was merged.

    Raises:
        CheckpointError: as `load_adapters`.
    """
    merged = merge_lora(params, load_adapters(folder, params).lora)
    with open(Path(folder) / ADAPTERS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return merged, {"name": str(folder), "sha256": digest}


def merge_command(options: "cli.LoraMerge", console: "Console") -> int:
    """`jvjepa lora merge`."""
    check_apart(options.out, options.model, options.adapter)
    check_free(options.out, WEIGHTS_FILE, force=options.force)
    save(options.out, load(options.model, lora=options.adapter), force=options.force)
    console.print(f"wrote {options.out}: {options.model} with {options.adapter} merged into it")
    return 0


def export_peft_command(options: "cli.LoraExportPeft", console: "Console") -> int:
    """`jvjepa lora export-peft`."""
    from jvjepa.convert.peft import export_peft

    count = export_peft(options.model, options.adapter, options.out, force=options.force)
    console.print(f"wrote {options.out}: {count} adapted layers, for the peft library")
    return 0


def info_command(options: "cli.LoraInfo", console: "Console") -> int:
    """`jvjepa lora info`."""
    adapters = load_adapters(options.adapter)
    config, (trained, _) = adapters.config, split(adapters.lora)
    factors = flatten_dict(trained, sep="/")
    which = (
        "all layers" if config.layers is None else f"layers {', '.join(map(str, config.layers))}"
    )
    size = sum(math.prod(factor.shape) for factor in factors.values())
    console.print(
        f"{options.adapter}: rank {config.rank}, alpha {config.alpha:g}, dropout "
        f"{config.dropout:g}, {which}; {size:,} values"
    )
    for part, digest in adapters.base.items():
        console.print(f"trained on {part} weights with sha256 {digest}")
    for name, factor in factors.items():
        console.print(f"  {name} {list(factor.shape)}")
    return 0
