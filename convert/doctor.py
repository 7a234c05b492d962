"""Saying what a file or a folder is, whether it is whole, and what to do with it."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jvjepa import records
from jvjepa import weights as our_weights
from jvjepa.adapters import ADAPTERS_FILE, load_adapters
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.convert.architecture import Hints, infer, released_probe
from jvjepa.convert.bert import bert_entries, is_bert, read_text_config, split
from jvjepa.convert.huggingface import hf_entries
from jvjepa.convert.meta import (
    ENCODER_KEYS,
    meta_entries,
    model_parts,
    open_parts,
    probe_parts,
)
from jvjepa.convert.qualivision import (
    HEAD,
    TEXT,
    VIDEO,
    open_qualivision,
    qualivision_entries,
    state_dict_key,
)
from jvjepa.convert.qualivision import infer as infer_quality
from jvjepa.convert.source import open_weights, read_config
from jvjepa.convert.tables import expected_shapes
from jvjepa.convert.torchfile import TorchFile, open_torch
from jvjepa.convert.torchpickle import inspect_pickle
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.export import manifest as exports
from jvjepa.parameters import count_parameters
from jvjepa.quality_summary import Summary, summarise
from jvjepa.registry import RELEASES
from jvjepa.storage import open_safetensors
from jvjepa.text_config import TextConfig
from jvjepa.text_weights import read_tokenizer
from jvjepa.weights import check_names, check_stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Args:
        path: what was looked at.
        kind: what it is, in a few words.
        facts: more about it, by what each is about.
        problems: what is wrong with it; empty if it is whole.
        commands: what to type next.
    """

    path: Path
    kind: str
    facts: dict[str, str]
    problems: list[str]
    commands: list[str]


def diagnose(path: str | Path) -> Diagnosis:
    """Looks at a checkpoint without converting it, and without running anything in it.

    Args:
        path: a folder of ours (converted, adapters, or an export), a Hugging Face folder, a `.pt`
            file of Meta's, or what may be one.

    Returns:
        The diagnosis. A damaged or unknown file is a diagnosis too.

    Raises:
        InputError: there is nothing at that path, or torch is not installed and it is needed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        if not path.is_dir():
            return _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
        if (path / exports.MANIFEST).exists():
            return _export(path)
        if not (path / records.CONFIG_FILE).exists():
            return _folder_without_config(path)
        return _ours(path) if _is_ours(path) else _hugging_face(path)
    except (CheckpointError, ConfigError) as error:
        facts = _files([path]) if path.is_file() else {}
        return Diagnosis(
            path=path,
            kind="cannot be used",
            facts=facts,
            problems=[str(error)],
            commands=[],
        )


def _is_ours(folder: Path) -> bool:
    try:
        values = json.loads((folder / records.CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False  # reading it as Hugging Face's says what is wrong with it
    return isinstance(values, dict) and "format" in values


def _ours(folder: Path) -> Diagnosis:
    if records.read_format(folder) == records.LORA_FORMAT:
        return _adapters(folder)
    summary = summarise(folder)
    if summary is not None:
        return _quality(folder, summary)
    config, source = our_weights.read_record(folder)
    quantization = our_weights.read_quantization(folder)
    path = folder / our_weights.WEIGHTS_FILE
    facts = _describe(config)
    if source is not None:
        revision = f" at {source.revision}" if source.revision else ""
        facts["converted from"] = f"{source.name}{revision}, sha256 {source.sha256}"
    if quantization is not None:
        facts["quantized"] = quantization.describe()
    problems = []
    with open_safetensors(path) as file:
        try:
            facts["dtype"] = check_stored(path, file, config, quantization).name
        except CheckpointError as error:
            problems.append(str(error))
    facts |= _files([path])
    verb, out = "embed", " --out embedding.npz"
    if config.classifier is not None or config.anticipator is not None:
        verb, out = "classify" if config.anticipator is None else "anticipate", ""
    return Diagnosis(
        path=folder,
        kind="a converted checkpoint",
        facts=facts,
        problems=problems,
        commands=[
            f"jvjepa {verb} {folder} VIDEO{out}",
            f"jvjepa stream {folder} VIDEO --out F.npz",
        ]
        if not problems
        else [],
    )


def _adapters(folder: Path) -> Diagnosis:
    adapters = load_adapters(folder)
    config = adapters.config
    facts = {"adapters": f"rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}"}
    for part, digest in adapters.base.items():
        facts[f"trained on, {part}"] = f"weights with sha256 {digest}"
    return Diagnosis(
        path=folder,
        kind="LoRA adapters",
        facts=facts | _files([folder / ADAPTERS_FILE]),
        problems=[],
        commands=[f"jvjepa lora info {folder}", f"jvjepa lora merge MODEL {folder} OUT"],
    )


def _export(folder: Path) -> Diagnosis:
    """Of what `jvjepa export` wrote."""
    found, problems = exports.read(folder), []
    for what in found.artefacts:
        try:
            found.entry(folder, what)
        except CheckpointError as error:
            problems.append(str(error))
    runs = {"step", "gate"} <= set(found.artefacts) and found.runtime in ("onnx", "tensorrt")
    stream = f"jvjepa stream {folder} VIDEO --runtime {found.runtime} --out F.npz"
    return Diagnosis(
        path=folder,
        kind=f"an export for {found.runtime}",
        facts={"holds": ", ".join(found.artefacts), "precision": found.precision},
        problems=problems,
        commands=[stream] if runs and not problems else [],
    )


def _safetensors(path: Path) -> Diagnosis:
    """Of a file that says nothing without the folder that it is in."""
    return Diagnosis(
        path=path,
        kind="weights without a config.json",
        facts=_files([path]),
        problems=[f"they are understood with the config.json of their folder, {path.parent}"],
        commands=[f"jvjepa doctor {path.parent}"],
    )


def _quality(folder: Path, summary: Summary) -> Diagnosis:
    """Of a converted text encoder or a video-quality model."""
    facts, problems = dict(summary.facts), []
    if summary.source is not None:
        facts["converted from"] = f"{summary.source.name}, sha256 {summary.source.sha256}"
    try:
        facts["dtype"] = summary.check(folder).name
    except CheckpointError as error:
        problems.append(str(error))
    scores = "scores" in facts and not problems
    return Diagnosis(
        path=folder,
        kind=summary.kind,
        facts=facts | _files([folder / our_weights.WEIGHTS_FILE]),
        problems=problems,
        commands=[f'jvjepa mos {folder} VIDEO --prompt "TEXT"'] if scores else [],
    )


def _hugging_face(folder: Path) -> Diagnosis:
    if is_bert(folder):
        return _text(folder)
    _, config = read_config(folder)
    facts, problems = _describe(config), []
    with open_weights(folder) as weights:
        facts["dtype"] = _dtypes(weights.tensors)
        facts |= _files(list(weights.files))
        try:
            check_names(str(folder), weights.shapes, expected_shapes(hf_entries(config)))
        except CheckpointError as error:
            problems.append(str(error))
    return Diagnosis(
        path=folder,
        kind="a Hugging Face checkpoint of V-JEPA 2",
        facts=facts,
        problems=problems,
        commands=[f"jvjepa convert {folder} OUT", f"jvjepa verify OUT {folder}"]
        if not problems
        else [],
    )


def _text(folder: Path) -> Diagnosis:
    """Of a Hugging Face folder of a sentence encoder."""
    _, config = read_text_config(folder)
    tokenizer = read_tokenizer(folder, config)
    problems = []
    with open_weights(folder) as weights:
        used, _ = split(weights.tensors)
        shapes = {name: tensor.shape for name, tensor in used.items()}
        try:
            check_names(str(folder), shapes, expected_shapes(bert_entries(config)))
        except CheckpointError as error:
            problems.append(str(error))
        files = _files(list(weights.files))
    sizes = f"width {config.hidden_size}, {config.num_layers} layers, {config.pooling} pooling"
    return Diagnosis(
        path=folder,
        kind="a Hugging Face checkpoint of a sentence encoder",
        facts={"text encoder": f"{sizes}, {tokenizer.max_length} tokens at most", **files},
        problems=problems,
        commands=[] if problems else [f"jvjepa convert {folder} OUT"],
    )


def _folder_without_config(folder: Path) -> Diagnosis:
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:10]) + (", .." if len(names) > 10 else "")
    return Diagnosis(
        path=folder,
        kind="a folder without a config.json",
        facts={"files": shown or "none"},
        problems=["it is neither a converted checkpoint nor one of Hugging Face's"],
        commands=[
            f"jvjepa doctor {folder / name}"
            for name in names
            if name.endswith(".pt") or (folder / name / records.CONFIG_FILE).exists()
        ],
    )


def _torch_file(path: Path) -> Diagnosis:
    report = inspect_pickle(path)
    if report.code:
        return Diagnosis(
            path=path,
            kind="a file of torch.save that holds code; it was not loaded",
            facts=_files([path]),
            problems=[f"loading it would run {', '.join(report.code)}"],
            commands=[],
        )
    with open_torch(path) as file:
        if "classifiers[0]" in file.parts:
            return _probe(file)
        if any(key in file.parts for key in ENCODER_KEYS):
            return _pretrained(file)
        if state_dict_key(file) is not None:
            return _qualivision(file)
        return Diagnosis(
            path=path,
            kind="a file of torch.save, not of Meta's V-JEPA",
            facts={"holds": str(file), **_files([path])},
            problems=[f"an encoder would be under {', '.join(ENCODER_KEYS)}"],
            commands=[],
        )


def _records(file: TorchFile, problems: list[str]) -> dict[str, str]:
    """Size and digest of a file; a record whose checksum is wrong is added to the problems."""
    try:
        return {file.path.name: _size(file.path, file.archive.sha256())}
    except CheckpointError as error:
        problems.append(str(error))
        return _files([file.path])


def _pretrained(file: TorchFile) -> Diagnosis:
    """Every encoder that is in the file is looked at."""
    facts, problems, commands = {"holds": str(file)}, [], []
    for key in ENCODER_KEYS:
        if key not in file.parts:
            continue
        weights = open_parts(file, model_parts(file, key))
        facts[f"{key}, dtype"] = _dtypes(weights.tensors)
        facts |= {f"left out, {name}": why for name, why in weights.dropped.items()}
        # Numbers of heads and of pixels change no shape; where nobody knows them, any will do here.
        config, unknown = _infer(file.path, weights.shapes)
        facts |= {f"{key}, {what}": text for what, text in _describe(config, unknown).items()}
        options = "".join(f" {option} .." for option in unknown)
        try:
            wanted = expected_shapes(meta_entries(config))
            check_names(f"{file.path}, {key}", weights.shapes, wanted)
            commands.append(f"jvjepa convert {file.path} OUT --key {key}{options}")
        except CheckpointError as error:
            problems.append(str(error))
    damage: list[str] = []
    facts |= _records(file, damage)
    return Diagnosis(
        path=file.path,
        kind="a checkpoint of Meta's V-JEPA",
        facts=facts,
        problems=problems + damage,
        commands=[] if damage else commands,
    )


def _qualivision(file: TorchFile) -> Diagnosis:
    weights, problems = open_qualivision(file), []
    # Numbers of heads change no shape; one will do here.
    try:
        text = _text_config(file.path, weights.shapes)
        config = infer_quality(file.path, weights, text, Hints(heads=1))
        wanted = expected_shapes(qualivision_entries(config))
        if not weights.has_text:
            wanted = {name: shape for name, shape in wanted.items() if not name.startswith(TEXT)}
        check_names(str(file.path), weights.shapes, wanted)
    except CheckpointError as error:
        problems.append(str(error))
    left_out = {f"left out, {name}": why for name, why in weights.dropped.items()}
    facts = {"holds": str(file), "dtype": _dtypes(weights.tensors), **left_out}
    facts["text encoder"] = "in the file" if weights.has_text else "not in the file"
    facts |= _records(file, problems)
    text = "--text BAAI/bge-large-en-v1.5"
    return Diagnosis(
        path=file.path,
        kind="a checkpoint of QualiVision",
        facts=facts,
        problems=problems,
        commands=[] if problems else [f"jvjepa convert {file.path} OUT {text}"],
    )


def _text_config(path: Path, shapes: dict[str, tuple[int, ...]]) -> TextConfig:
    """The text encoder of a checkpoint of QualiVision, as far as shapes tell."""
    inside = {name.removeprefix(TEXT): shape for name, shape in shapes.items() if TEXT in name}
    if not inside:  # only its width matters
        (joined,) = shapes.get(f"{HEAD}0.weight", (0,))
        width = shapes.get(f"{VIDEO}encoder.layernorm.weight", (0,))[0]
        return TextConfig(hidden_size=max(1, joined - width), num_heads=1)
    tables = {
        size: inside.get(f"embeddings.{name}_embeddings.weight", (1, 1))
        for size, name in (
            ("vocab_size", "word"),
            ("max_positions", "position"),
            ("type_vocab_size", "token_type"),
        )
    }
    layers = [int(x[1]) for x in map(re.compile(r"encoder\.layer\.(\d+)\.").match, inside) if x]
    return TextConfig(
        **{size: shape[0] for size, shape in tables.items()},
        hidden_size=tables["vocab_size"][-1],
        num_layers=max(layers, default=0) + 1,
        num_heads=1,
        mlp_dim=inside.get("encoder.layer.0.intermediate.dense.bias", (1,))[0],
    )


def _infer(path: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[ModelConfig, list[str]]:
    """The architecture, and the options without which `convert` would not know it."""
    guesses = {"--heads": {"heads": 1}, "--predictor-heads": {"predictor_heads": 1}}
    guesses["--crop-size"] = {"crop_size": 16 * 7 * 18}  # a multiple of any size of patch
    given: dict[str, int] = {}
    unknown: list[str] = []
    while True:
        try:
            return infer(path, shapes, Hints(**given)), unknown
        except CheckpointError:
            raise
        except InputError as error:
            option = next(name for name in guesses if f"with {name}" in str(error))
            given |= guesses.pop(option)
            unknown.append(option)


def _probe(file: TorchFile) -> Diagnosis:
    weights = open_parts(file, probe_parts(file, 0))
    shapes = weights.shapes
    facts = {"holds": str(file), "dtype": _dtypes(weights.tensors)}
    kinds = {"classifier.linear.weight": ""}
    kinds |= {f"anticipator.{x}_classifier.weight": f" {x}s" for x in ("verb", "noun", "action")}
    heads = {name: f"{shapes[name][0]}{kind}" for name, kind in kinds.items() if name in shapes}
    anticipates = "anticipator" in weights.parts
    needed = "anticipator.action_classifier" if anticipates else "classifier.linear"
    if f"{needed}.weight" in heads:
        width = shapes[f"{needed}.weight"][1]
        facts["classes"] = f"{', '.join(heads.values())}, on an encoder of width {width}"
    released = released_probe(file.path)
    if released is not None:
        facts["named as"] = f"the released probe for {released.encoder}"
    problems = [] if "classes" in facts else [f"it has no {needed}.weight"]
    facts |= _records(file, problems)
    convert = f"jvjepa convert --probe {file.path} --encoder MODEL --labels FILE OUT"
    return Diagnosis(
        path=file.path,
        kind="an attentive probe of Meta's, without an encoder",
        facts=facts,
        problems=problems,
        commands=[] if problems else [convert],
    )


def _describe(config: ModelConfig, unknown: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    encoder = config.encoder
    family = "V-JEPA 2.1" if encoder.rope == "interleaved" else "V-JEPA 2"
    family = "V-JEPA 2-AC" if config.action_predictor is not None else family
    sizes = f"{family}, width {encoder.hidden_size}, {encoder.num_layers} layers"
    if "--crop-size" not in unknown:
        sizes += f", trained on {encoder.crop_size} pixels"
    counts = count_parameters(config)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    alike = [name for name, release in RELEASES.items() if _alike(config, release.config)]
    return {
        "model": sizes,
        "parameters": parts,
        "released with these sizes": ", ".join(alike) or "none",
    }


def _alike(config: ModelConfig, release: ModelConfig) -> bool:
    def sizes(encoder: EncoderConfig) -> tuple[Any, ...]:
        return (encoder.hidden_size, encoder.num_layers, encoder.mlp_dim, encoder.rope)

    parts = ("predictor", "classifier", "anticipator", "action_predictor")
    same_parts = all(
        (getattr(config, part) is None) == (getattr(release, part) is None) for part in parts
    )
    return same_parts and sizes(config.encoder) == sizes(release.encoder)


def _dtypes(tensors: dict[str, Any]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))


def _files(paths: list[Path]) -> dict[str, str]:
    facts = {}
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts[path.name] = _size(path, digest)
    return facts


def _size(path: Path, digest: str) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB, sha256 {digest}"
