"""`jvjepa quantize`: a checkpoint with small weights, and how far it is from its original."""

import dataclasses
import errno
import functools
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray
from rich.table import Table

from jvjepa.adapters import weights_sha256
from jvjepa.encoder import Encoder
from jvjepa.errors import ConfigError, InputError
from jvjepa.packing import Calibration, Quantization
from jvjepa.parameters import parameter_shapes
from jvjepa.pictures import read_clip
from jvjepa.quantization import (
    BLOCKS,
    Scheme,
    dequantize,
    is_quantized,
    nbytes,
    plan,
    quantize,
    require_qwix,
)
from jvjepa.ranges import input_ranges
from jvjepa.storage import check_apart, check_free
from jvjepa.typing import Array, Params
from jvjepa.weights import WEIGHTS_FILE, Model, load, read_quantization, read_record, save

if TYPE_CHECKING:
    from rich.console import Console

_ROUNDS = 3  # of which the median is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a checkpoint with small weights, MODEL OUT, and compare it with the one it is made of.

    int8, int4, nf4 and fp8 make the weights small; int8-dynamic and int8-static multiply integers
    too, with the steps of inputs taken as they come, or measured before on --calibrate.
    """

    model: tyro.conf.Positional[Path]
    """A converted folder with floating-point weights."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    scheme: Scheme = "int8"
    """What becomes of the weights, and of the inputs of layers."""
    layers: str = BLOCKS
    """Regular expression; the dense layers all of whose name it matches are quantized."""
    exclude: tuple[str, ...] = ()
    """Regular expressions; layers all of whose name one of them matches are left as they are."""
    tile: int | None = None
    """Inputs that share a scale, for int4 and nf4; by default 64."""
    calibrate: tuple[str, ...] = ()
    """Videos to measure the ranges of inputs on, one clip of each, for int8-static."""
    percentile: float = 100.0
    """Of |input| in a clip that counts as its largest; below 100 it cuts off outliers."""
    num_frames: int | None = None
    """Frames of a clip; by default as many as the model was trained with."""
    video: str | None = None
    """A video to compare on; by default random pixels."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


class Comparison(NamedTuple):
    """How far small weights are from what they were made of.

    Args:
        group: which parameters: a part of the model, and a kind of layer.
        parameters: how many.
        before: bytes.
        after: bytes.
        weights: of the kernels that were quantized, |difference| / |kernel| (Frobenius); None where
            none was.
        cosine: mean over tokens of their cosine, if nothing else were quantized; None where the
            encoder does not change.
        largest: the largest difference of a token's value, over the largest value.
    """

    group: str
    parameters: int
    before: int
    after: int
    weights: float | None
    cosine: float | None
    largest: float | None


def quantize_command(options: Quantize, console: "Console") -> int:
    """`jvjepa quantize`."""
    _check(options)
    model = load(options.model)
    calibration = None
    how = {"num_frames": options.num_frames}
    clips = [read_clip(model.config, video, **how).pixels for video in options.calibrate]
    clip = _random_clip(model, options.num_frames)
    if options.video is not None:
        clip = read_clip(model.config, options.video, **how).pixels
    begin = time.perf_counter()
    with console.status("") as status:
        ranges = None
        if clips:
            sizes = {"num_frames": len(clips[0]), "percentile": options.percentile}
            calibration = Calibration(videos=options.calibrate, **sizes)
            show = {"progress": status.update}
            ranges = input_ranges(model, clips, percentile=options.percentile, **show)
        status.update(f"quantizing to {options.scheme}")
        choice = {"layers": options.layers, "exclude": options.exclude, "tile": options.tile}
        params = quantize(model.params, options.scheme, **choice, ranges=ranges)
        seconds = time.perf_counter() - begin
        small = dataclasses.replace(
            model, params=params, quantization=_record(options, model, calibration)
        )
        rows = list(compare(model.encoder, model.params, params, clip, status.update))
        status.update("timing")
        before, after = (
            statistics.median(times)
            for times in interleaved_seconds(model.encoder, (model.params, params), clip)
        )
        save(options.out, small, force=options.force)
    console.print(_table(rows))
    what = "random pixels" if options.video is None else options.video
    console.print(
        "weights: relative error of the kernels that are quantized; cosine and largest: mean "
        f"cosine and largest relative error of the encoder's tokens of {len(clip)} frames of "
        f"{what}, with nothing but the group quantized"
    )
    console.print(
        f"a clip takes {after:.3g} s, {before:.3g} s before, on {jax.default_backend()}; "
        f"quantized in {seconds:.1f} s"
    )
    size = (options.out / WEIGHTS_FILE).stat().st_size
    whole = (options.model / WEIGHTS_FILE).stat().st_size
    console.print(
        f"wrote {options.out}: {size / 1e6:,.1f} MB, {size / whole:.1%} of {whole / 1e6:,.1f} MB"
    )
    return 0


def _check(options: Quantize) -> None:
    """Raises what can be known before the long work."""
    check_apart(options.out, options.model, options.video, *options.calibrate)
    check_free(options.out, WEIGHTS_FILE, force=options.force)
    if options.num_frames is not None and options.num_frames < 1:
        raise InputError(f"num-frames = {options.num_frames}; it must be 1 or more")
    folder = options.out.absolute().parent
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    require_qwix()
    found = read_quantization(options.model)
    if found is not None:
        raise InputError(
            f"{options.model} is quantized already, to {found.scheme}; quantize what it was made "
            f"of, {found.model}"
        )
    shapes = parameter_shapes(read_record(options.model)[0])
    choice = {"layers": options.layers, "exclude": options.exclude, "tile": options.tile}
    plan(shapes, options.scheme, **choice)
    static = options.scheme == "int8-static"
    if static and not options.calibrate:
        raise ConfigError("scheme int8-static measures inputs; give it videos, --calibrate VIDEO..")
    if options.calibrate and not static:
        raise ConfigError(f"--calibrate is for int8-static; {options.scheme} measures nothing")
    if options.percentile != 100 and not static:
        raise ConfigError(f"--percentile is for int8-static; {options.scheme} measures nothing")


def _record(options: Quantize, model: Model, calibration: Calibration | None) -> Quantization:
    choice = {"layers": options.layers, "exclude": options.exclude, "tile": options.tile}
    layers, tile = plan(parameter_shapes(model.config), options.scheme, **choice)
    with open(options.model / WEIGHTS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Quantization(
        scheme=options.scheme,
        layers=tuple(layers),
        exclude=options.exclude,
        tile=tile,
        calibration=calibration,
        model=str(options.model),
        sha256=digest,
        base={part: weights_sha256(params) for part, params in model.params.items()},
    )


def _random_clip(model: Model, num_frames: int | None) -> NDArray[np.float32]:
    config = model.config.encoder
    frames = config.frames_per_clip if num_frames is None else num_frames
    shape = (frames, config.crop_size, config.crop_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def compare(
    encoder: Encoder,
    params: Params,
    small: Params,
    clip: NDArray[np.float32],
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Comparison]:
    """Compares small weights with those that they were made of, group by group.

    Args:
        encoder: the encoder of both.
        params: of the whole model, in floating point.
        small: from `jvjepa.quantization.quantize`.
        clip: float [T, H, W, 3], what the encoder sees.
        progress: told what runs now.

    Yields:
        A row for each group of parameters, and one for all.
    """
    flat, quantized = flatten_dict(params, sep="/"), flatten_dict(small, sep="/")
    groups: dict[str, list[str]] = {}
    for name in flat:
        groups.setdefault(_group(name), []).append(name)
    progress("encoding with the floating-point weights")
    right = _encode(encoder, params["encoder"], clip[None])
    for group, names in {**groups, "all": list(flat)}.items():
        chosen = [name for name in names if is_quantized(quantized[name])]
        error = cosine = largest = None
        if chosen:
            error = _weight_error([(flat[name], quantized[name]) for name in chosen])
        if any(name.startswith("encoder/") for name in chosen):
            progress(f"encoding with {group} quantized")
            mixed = {**flat, **{name: quantized[name] for name in chosen}}
            tokens = _encode(encoder, unflatten_dict(mixed, sep="/")["encoder"], clip[None])
            cosine, largest = nearness(tokens, right)
        yield Comparison(
            group=group,
            parameters=sum(int(np.prod(flat[name].shape)) for name in names),
            before=nbytes([flat[name] for name in names]),
            after=nbytes([quantized[name] for name in names]),
            weights=error,
            cosine=cosine,
            largest=largest,
        )


def _group(name: str) -> str:
    part, *layers = name.split("/")
    kinds = ("patch_embed", "attention", "mlp")
    return f"{part} {next((kind for kind in kinds if kind in layers), 'other')}"


def _weight_error(pairs: Sequence[tuple[Array, object]]) -> float:
    squares = np.sum([_squares(kernel, small) for kernel, small in pairs], axis=0)
    return float(np.sqrt(squares[0] / squares[1]))


@jax.jit
def _squares(kernel: Array, small: object) -> Array:
    """Float32 [2]: of the differences and of the kernel, summed layer by layer."""

    def of(pair: tuple[Array, object]) -> Array:
        kernel = pair[0].astype(jnp.float32)
        return jnp.stack([jnp.sum((dequantize(pair[1]) - kernel) ** 2), jnp.sum(kernel**2)])

    if kernel.ndim == 2:
        return of((kernel, small))
    return jnp.sum(jax.lax.map(of, (kernel, small)), axis=0)


def nearness(tokens: Array, right: Array) -> tuple[float, float]:
    """Says how near tokens are to others.

    Args:
        tokens: [.., D].
        right: [.., D].

    Returns:
        The mean cosine, and the largest difference over the largest value of `right`.
    """
    a, b = np.asarray(tokens, np.float64), np.asarray(right, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.mean(np.sum(a * b, axis=-1) / lengths)
    return float(cosine), float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def interleaved_seconds(
    encoder: Encoder,
    models: Sequence[Mapping[str, Params]],
    clip: NDArray[np.float32],
    rounds: int = _ROUNDS,
) -> list[list[float]]:
    """Times the encoder with several parameters, in turns and after compilation.

    Args:
        encoder: of all of them.
        models: parameters of whole models.
        clip: float [T, H, W, 3].
        rounds: turns of each.

    Returns:
        Of each the seconds of all turns.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):  # the first compiles
        for times, params in zip(seconds, models, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(_encode(encoder, params["encoder"], clip[None]))
            if turn:
                times.append(time.perf_counter() - begin)
    return seconds


@functools.partial(jax.jit, static_argnames="encoder")
def _encode(encoder: Encoder, params: Params, video: Array) -> Array:
    return encoder.apply({"params": params}, video)


def _table(rows: Sequence[Comparison]) -> Table:
    table = Table()
    table.add_column("group", no_wrap=True)
    for head in ("parameters", "MB", "weights", "cosine", "largest"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.group,
            f"{row.parameters:,}",
            f"{row.before / 1e6:,.2f} to {row.after / 1e6:,.2f}",
            "–" if row.weights is None else f"{row.weights:.2%}",
            "–" if row.cosine is None else f"{row.cosine:.6f}",
            "–" if row.largest is None else f"{row.largest:.2%}",
        )
    return table
