"""What each command of the command line does."""

import contextlib
import dataclasses
import hashlib
import itertools
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jvjepa import calibration, cli, plot, registry, streaming
from jvjepa.attention import available, resolve
from jvjepa.conversion_command import print_parameters, print_source
from jvjepa.errors import InputError, VideoError
from jvjepa.export.edge_session import EdgeSession
from jvjepa.export.manifest import read as read_manifest
from jvjepa.export.sessions import CPU
from jvjepa.gate import Gate
from jvjepa.live import Result, Session, Tubelet, read_tubelets, tubelets
from jvjepa.long import embed_long, is_long
from jvjepa.options import Streaming
from jvjepa.parameters import count_shapes, parameter_shapes
from jvjepa.pictures import read_clip
from jvjepa.quality_summary import Summary, summarise
from jvjepa.recording import Recorder, Thumbnails, check_output, save_npz
from jvjepa.storage import open_safetensors
from jvjepa.weights import (
    WEIGHTS_FILE,
    Model,
    check_stored,
    read_quantization,
    read_record,
)


def export_hf(options: cli.ExportHf, console: Console) -> int:
    """`jvjepa export-hf`."""
    from jvjepa.convert import export_hf

    export_hf(options.model, options.out, force=options.force)
    console.print(f"wrote {options.out}, which transformers loads")
    return 0


def verify(options: cli.Verify, console: Console) -> int:
    """`jvjepa verify`."""
    from jvjepa.convert import verify

    checks = verify(
        options.model,
        options.source,
        revision=options.revision,
        probe=options.probe,
        frames=options.frames,
    )
    if read_record(options.model)[0].encoder.has_areas:
        console.print("area attention is left out: the original has full attention in all layers")
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = "ok  " if check.ok else "FAIL"
        numbers = f"relative error {check.error:.1e}, tolerance {check.tolerance:.0e}"
        console.print(f"{verdict} {check.name:{width}}  {numbers}; {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


def doctor(options: cli.Doctor, console: Console) -> int:
    """`jvjepa doctor`."""
    from jvjepa.convert import diagnose

    diagnosis = diagnose(options.path)
    console.print(f"{diagnosis.path}: {diagnosis.kind}")
    for about, text in diagnosis.facts.items():
        console.print(f"  {about}: {text}")
    for problem in diagnosis.problems:
        console.print(f"problem: {problem}")
    if not diagnosis.problems:
        console.print("whole: every tensor is there, in its shape")
    for command in diagnosis.commands:
        console.print(f"next: {command}")
    return 1 if diagnosis.problems else 0


def embed(options: cli.Embed, console: Console) -> int:
    """`jvjepa embed`."""
    sources = (options.model, options.lora, options.video)
    check_output(options.out, suffix=".npz", force=options.force, sources=sources)
    if is_long(options):
        return embed_long(options, console)
    model = options.load()
    clip = read_clip(
        model.config,
        options.video,
        num_frames=options.num_frames,
        fps=options.fps,
        start=options.start,
        end=options.end,
        repeat_frame=options.repeat_frame,
    )
    forward = jax.jit(lambda params, clip: model.encoder.apply({"params": params}, clip))
    begin = time.perf_counter()
    tokens = np.asarray(forward(model.params["encoder"], clip.pixels[None])[0], np.float32)
    seconds = time.perf_counter() - begin
    arrays = {"embedding": tokens.mean(axis=0), "times": clip.times}
    save_npz(options.out, {**arrays, "tokens": tokens} if options.tokens else arrays)
    first, last = clip.times[0], clip.times[-1]
    what = f"{len(clip.pixels)} frames from {first:.2f} to {last:.2f} s"
    console.print(
        f"{'a picture' if clip.is_picture else what}, {len(tokens)} tokens, {seconds:.1f} s with "
        f"compilation; wrote {options.out}"
    )
    return 0


def stream(options: cli.Stream, console: Console) -> int:
    """`jvjepa stream`."""
    stream_video(options, console)
    return 0


def stream_video(options: cli.Stream, console: Console) -> float | None:
    """Streams and writes the .npz; Ctrl-C ends the stream, and what there is by then is kept.

    Args:
        options: the command's.
        console: where to print.

    Returns:
        Seconds that the encoder's steps took, or None where it was interrupted.

    Raises:
        InputError: bad input; if the video is damaged, what comes before is written all the same.
        KeyboardInterrupt: there was nothing to write yet.
    """
    how = {"force": options.force, "sources": (options.model, options.lora, options.video)}
    check_output(options.out, suffix=".npz", **how)
    if options.plot is not None:
        check_output(options.plot, suffix=".png", **how)
        plot.require_matplotlib()
    if options.provider is not None and options.runtime != "onnx":
        raise InputError(
            f"--provider {options.provider} is of ONNX Runtime, and --runtime is "
            f"{options.runtime}; leave it out, or use --runtime onnx"
        )
    gate = Gate(
        tau=options.tau,
        max_hold=options.max_hold,
        settle=options.settle,
        reference=options.reference,
    )
    source = _exported(options, gate) if options.runtime != "jax" else options.load()
    columns = {
        "embeddings": (np.dtype(np.float32), (_width(source),)),
        "is_new": (np.dtype(np.bool_), ()),
        "surprise": (np.dtype(np.float32), ()),
        "times": (np.dtype(np.float64), ()),
    }
    interrupted = False
    with contextlib.closing(_incoming(options, source)) as incoming:
        # A video that cannot be read says so before the long compilation.
        first = next(incoming, None)
        if first is None:
            raise VideoError(f"{options.video} has no whole tubelet of 2 frames in this range")
        session = source
        if isinstance(source, Model):
            session = _session(options, source, gate, console)
        with Recorder(options.out, columns) as recorder:
            progress = _StreamProgress(options, console)
            try:
                for tubelet in itertools.chain((first,), incoming):
                    progress.take(session.step(tubelet), recorder)
            except KeyboardInterrupt:
                if not recorder.rows:
                    raise
                interrupted = True
            except VideoError as error:
                saved = f"; the {recorder.rows} embeddings before it are in {options.out}"
                raise VideoError(f"{error}{saved if recorder.rows else ''}") from None
            finally:
                incoming.close()
                if recorder.rows:
                    with _uninterrupted():
                        recorder.save()
                    progress.finish(session, interrupted)
    return None if interrupted else progress.step_seconds


def calibrate(options: cli.Calibrate, console: Console) -> int:
    """`jvjepa calibrate`."""
    if not 0 < options.target_fidelity <= 1:
        raise InputError(f"target-fidelity = {options.target_fidelity}; it must be in (0, 1]")
    gate = Gate(tau=0.0, max_hold=options.max_hold, settle=options.settle)
    model = options.load()
    with contextlib.closing(_incoming(options, model)) as incoming:
        no_frame = np.empty((0, 0, 3), np.uint8)  # of a large video they would fill the memory
        clip = [tubelet._replace(frame=no_frame) for tubelet in incoming]
    session = _session(options, model, gate, console)
    table = Table("tau", "encoded", "mean cosine", "worst cosine", "seconds", "speed-up")
    rows = []
    with console.status("") as status:
        steps = calibration.sweep(
            session,
            clip,
            max_hold=options.max_hold,
            settle=options.settle,
            progress=lambda text: status.update(text),
        )
        for row in steps:
            rows.append(row)
            table.add_row(
                "0 (ungated)" if row.tau == 0 else f"{row.tau:g}",
                f"{row.encoded:.1%}",
                f"{row.mean:.5f}",
                f"{row.worst:.5f}",
                f"{row.seconds:.2f}",
                f"{rows[0].seconds / row.seconds:.2f} x",
            )
    console.print(table)
    chosen = calibration.best(rows, options.target_fidelity, options.criterion)
    target = f"{options.criterion} cosine at least {options.target_fidelity:g}"
    if chosen.tau == 0:
        console.print(f"no threshold keeps the {target}; use --tau 0, which encodes everything")
    else:
        console.print(f"use --tau {chosen.tau:g}: the largest with a {target} on this video")
    return 0


def demo(options: cli.Demo, console: Console) -> int:
    """`jvjepa demo`."""
    from jvjepa.demo import demo

    return demo(options.out, console)


def info(options: cli.Info, console: Console) -> int:
    """`jvjepa info`."""
    folder = Path(options.model)
    if folder.is_dir() and (summary := summarise(folder)) is not None:
        return _info_quality(folder, summary, options.shapes, console)
    if folder.is_dir():
        config, source = read_record(folder)
        quantization = read_quantization(folder)
        weights = folder / WEIGHTS_FILE
        with open_safetensors(weights) as file:
            dtype = check_stored(weights, file, config, quantization)
        console.print(f"{folder}: {dtype.name}, {weights.stat().st_size / 1e6:,.1f} MB")
        if quantization is not None:
            console.print(quantization.describe())
        with open(weights, "rb") as file:
            console.print(f"weights' sha256: {hashlib.file_digest(file, 'sha256').hexdigest()}")
        print_source(source, console)
    elif folder.exists():
        raise InputError(f"{folder} is a file; give the folder that holds it")
    else:
        try:
            release = registry.get(options.model)
        except InputError as error:
            raise InputError(f"{folder} is not a folder, and {error}") from None
        config = release.config
        console.print(f"{options.model}: released as {release.source}")
    encoder = config.encoder
    console.print(
        f"encoder: width {encoder.hidden_size}, {encoder.num_layers} layers, {encoder.num_heads} "
        f"heads of {encoder.head_width}, MLP {encoder.mlp_dim}, {encoder.rope} rope; trained on "
        f"{encoder.frames_per_clip} frames of {encoder.crop_size} x {encoder.crop_size}"
        + (", and on images" if encoder.image_tokenizer else "")
    )
    if encoder.has_areas:
        first, end = encoder.area_layers
        console.print(
            f"area attention in layers {first} to {end - 1}: {encoder.area_spatial_splits} x "
            f"{encoder.area_temporal_splits} (spatial x temporal) areas"
        )
    if config.classifier is not None:
        labels = config.classifier.labels
        console.print(
            f"classifier: {len(labels)} classes, {labels[0]!r} to {labels[-1]!r}; "
            f"{config.classifier.num_heads} heads, trained on {config.classifier_frames} frames"
        )
    if config.anticipator is not None:
        part = config.anticipator
        counts = f"{len(part.verbs)} verbs, {len(part.nouns)} nouns, {len(part.actions)} actions"
        console.print(
            f"anticipator: {counts}; trained on {part.frames_per_clip} frames, "
            f"{part.frames_per_second} a second"
        )
    tubelets = max(1, encoder.frames_per_clip // encoder.tubelet_size)
    tokens = tubelets * encoder.config_grid**2
    backend = resolve("auto", (1, encoder.num_heads, tokens, tokens))
    platform = jax.default_backend()
    others = " and ".join(name for name in available(platform) if name not in ("auto", backend))
    console.print(
        f"attention: auto takes {backend} on {platform} for a clip of {tokens:,} tokens; "
        f"there is also {others}"
    )
    _print_shapes(parameter_shapes(config), options.shapes, console)
    return 0


def _info_quality(folder: Path, summary: Summary, shapes: bool, console: Console) -> int:
    """`jvjepa info` of a text encoder or a video-quality model."""
    dtype, weights = summary.check(folder), folder / WEIGHTS_FILE
    megabytes = f"{weights.stat().st_size / 1e6:,.1f} MB"
    console.print(f"{folder}: {summary.kind}, {dtype.name}, {megabytes}")
    print_source(summary.source, console)
    for about, text in summary.facts.items():
        console.print(f"{about}: {text}")
    _print_shapes(summary.shapes, shapes, console)
    return 0


def _print_shapes(shapes: Mapping[str, tuple[int, ...]], each: bool, console: Console) -> None:
    """The parameters of every part, and with `each` all of them."""
    print_parameters(count_shapes(shapes), console)
    for name, shape in shapes.items() if each else ():
        console.print(f"  {name} {list(shape)}")


def _incoming(
    options: cli.Stream | cli.Calibrate, source: Model | EdgeSession
) -> Generator[Tubelet, None, None]:
    span = {"fps": options.fps, "start": options.start, "end": options.end}
    if isinstance(source, EdgeSession):
        return read_tubelets(options.video, source, source.tubelet_size, **span)
    return tubelets(options.video, source, **span)


def _width(source: Model | EdgeSession) -> int:
    return source.width if isinstance(source, EdgeSession) else source.config.encoder.hidden_size


def _exported(options: cli.Stream, gate: Gate) -> EdgeSession:
    """Opens what was exported; options that only a model can follow are refused."""
    fixed = ("window", "positions", "cache", "lora", "area", "area_layers", "dtype", "attention")
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    odd = [name for name in fixed if getattr(options, name) != defaults[name]]
    if odd:
        raise InputError(
            f"--{odd[0].replace('_', '-')} belongs to jvjepa export, and {options.model} has it in "
            "it; leave it out, or use --runtime jax with a converted folder"
        )
    found = read_manifest(options.model).runtime
    if found != options.runtime:
        raise InputError(
            f"--runtime {options.runtime}: {options.model} was exported for {found}; onnx and "
            "tensorrt can be streamed, each with an export for it"
        )
    provider = CPU if options.provider is None else options.provider
    return EdgeSession(options.model, gate, pool=options.pool, provider=provider)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets a second Ctrl-C not lose what the first one wants to keep."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _session(options: Streaming, model: Model, gate: Gate, console: Console) -> Session:
    begin = time.perf_counter()
    how = {"positions": options.positions, "pool": options.pool, "cache": options.cache}
    session = Session(model, gate, window=options.window, **how)
    encoder = model.encoder
    tokens = session.state.gate.reference.shape[1]
    scores = (1, encoder.config.num_heads, tokens, tokens * options.window)
    console.print(
        f"{np.dtype(encoder.dtype).name} on {jax.default_backend()}, attention "
        f"{resolve(encoder.attention, scores)}, window {options.window}, state "
        f"{streaming.nbytes(session.state.stream) / 1e6:,.1f} MB, compiled in "
        f"{time.perf_counter() - begin:.1f} s"
    )
    return session


class _StreamProgress:
    """The live line, the timeline, and the summary of `jvjepa stream`."""

    def __init__(self, options: cli.Stream, console: Console) -> None:
        self.options, self.console = options, console
        self.begin = self.printed = time.perf_counter()
        self.encoded_ms: list[float] = []
        self.skipped_ms: list[float] = []
        self.thumbnails = Thumbnails()
        self.last: Result | None = None
        self.count = self.not_finite = 0
        self.step_seconds = 0.0

    def take(self, result: Result, recorder: Recorder) -> None:
        tubelet, self.last = result.tubelet, result
        if self.options.plot is not None:
            self.thumbnails.add(tubelet.time, tubelet.frame)
        row = {"is_new": result.is_new, "surprise": result.surprise, "times": tubelet.time}
        recorder.append({"embeddings": result.embedding, **row})
        self.count += 1
        self.not_finite += not result.finite
        self.step_seconds += result.seconds
        times = self.encoded_ms if result.is_new else self.skipped_ms
        times.append(1e3 * result.seconds)
        del times[:-1000]  # the newest thousand say what the machine does now
        now = time.perf_counter()
        if now - self.printed >= (0.1 if self.console.is_terminal else 2.0):
            self.printed = now
            end = "\r" if self.console.is_terminal else "\n"
            self.console.print(self._line(result, now), end=end)

    def _line(self, result: Result, now: float) -> str:
        rate = self.count * len(result.tubelet.pixels) / (now - self.begin)
        what = "encoded" if result.is_new else "skipped"
        dropped = f"  dropped {result.tubelet.dropped}" if result.tubelet.dropped else ""
        return (
            f"{result.tubelet.time:9.2f} s  surprise {result.surprise:9.2e}  {what}  "
            f"{1e3 * result.seconds:7.1f} ms  {rate:6.1f} frames/s{dropped}"
        )

    def finish(self, session: Session | EdgeSession, interrupted: bool) -> None:
        if self.console.is_terminal:
            self.console.print()  # leaves the live line as it was
        if interrupted:
            self.console.print("interrupted")
        statistics = session.statistics()
        seconds = time.perf_counter() - self.begin
        seen, encoded = int(statistics.seen[0]), int(statistics.encoded[0])
        frames = seen * session.tubelet_size
        self.console.print(
            f"{seen} tubelets ({frames} frames) in {seconds:.1f} s: {encoded} encoded, "
            f"{seen - encoded} skipped; {statistics.compute:.1%} of the compute of encoding all"
        )
        medians = [
            f"{name} {np.median(times):.1f} ms"
            for name, times in (("encoded", self.encoded_ms), ("skipped", self.skipped_ms))
            if times
        ]
        self.console.print(f"median step: {', '.join(medians)}")
        if self.not_finite:
            self.console.print(f"{self.not_finite} tubelets were not finite")
        if self.last is not None and self.last.tubelet.dropped:
            self.console.print(f"{self.last.tubelet.dropped} tubelets dropped: the source is live")
        self.console.print(f"wrote {self.options.out}")
        if self.options.plot is not None:
            with np.load(self.options.out) as saved:
                columns = (saved[name] for name in ("times", "surprise", "is_new"))
                frames = self.thumbnails.kept
                plot.timeline(self.options.plot, *columns, session.gate.tau, frames)
            self.console.print(f"wrote {self.options.plot}")
