"""What exports cost and how fast they run, beside jitted JAX in the same process.

    python benchmarks/export.py                                     # ViT-L, 16 frames of 256 pixels
    python benchmarks/export.py --layers 4 --size 128 --formats onnx litert

Every format is a process of its own: it exports a clip encoder and a streaming step with the
library's own checks, loads them in their runtime, and then runs artefact and JAX in turns on the
same input. Weights are random: they prove parity and speed. Writes `export.json` and `export.md`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
FORMATS = ("onnx", "onnx-float16", "saved-model", "litert", "stablehlo")
SIZES = {
    "layers": (24, "of the encoder; ViT-L has 24"),
    "frames": (16, "of a clip"),
    "size": (256, "pixels of a side of a frame"),
    "window": (8, "tubelets that a stream sees"),
    "repeats": (5, "turns of everybody"),
}
NOTES = """\
MB: of the files. Write, load: seconds; writing includes the conversion and its checks, not the
comparison with the library. Peak: memory of the process until all was compared, of both artefacts,
the model included. ms: median (lowest to highest) of a clip or a step; of a step keys and values
are written into the ring by the caller. Against JAX: time of jitted JAX over that of the artefact,
above 1 the artefact is faster. Error: largest difference over the largest value, of the library in
float32; of steps chained past the end of the ring."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does.

    Args:
        name: of the format, with the precision.
        model: the converted folder.
        out: the folder to export into.
        sizes: by name.
    """

    name: str
    model: Path
    out: Path
    sizes: dict[str, int]


def measure(task: Task) -> list[dict[str, Any]]:
    """Exports, checks, and runs in turns with JAX; one row for each artefact."""
    from jvjepa.export import manifest
    from jvjepa.export.artefact import artefact
    from jvjepa.export.exporting import Source, export_here, open_artefact
    from jvjepa.export.options import Options
    from jvjepa.weights import load

    form, _, precision = task.name.partition("-float")
    options = Options(
        format=form,
        what=("clip", "step"),
        frames=task.sizes["frames"],
        height=task.sizes["size"],
        width=task.sizes["size"],
        window=task.sizes["window"],
        precision="float16" if precision else "float32",
    )
    task.out.mkdir()
    exported, _ = export_here(Source(model=task.model), task.out, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = load(task.model, dtype="float32")
    rows = []
    for one in exported:
        planned = artefact(one.what, model.config, options)
        entry = manifest.read(task.out).entry(task.out, one.what)
        session = open_artefact(task.out, planned, entry, form)
        ours = {"clip": clip_in_jax, "step": step_in_jax}[one.what](model, task.sizes)
        theirs = artefact_run(session, planned, task.sizes["window"])
        seconds = in_turns([ours, theirs], task.sizes["repeats"])
        worst = max(one.parity.values(), key=lambda parity: parity.relative_error)
        rows.append(
            {
                "format": task.name,
                "what": one.what,
                "bytes": one.num_bytes,
                "write": one.seconds[0],
                "load": one.seconds[1],
                "peak": peak,
                "jax": seconds[0],
                "artefact": seconds[1],
                "error": worst.relative_error,
                "cosine": min(parity.cosine for parity in one.parity.values()),
            }
        )
    return rows


def clip_in_jax(model: Any, sizes: dict[str, int]) -> Callable[[], None]:
    """One clip of jitted JAX, with layers one after the other, its fastest form on a CPU."""
    import jax

    from jvjepa.parameters import unstack_layers

    encoder = dataclasses.replace(model.encoder, scan=False)
    params = unstack_layers(model.params)["encoder"]
    apply = jax.jit(lambda params, video: encoder.apply({"params": params}, video))
    video = _random((1, sizes["frames"], sizes["size"], sizes["size"], 3))
    return lambda: jax.block_until_ready(apply(params, video))


def step_in_jax(model: Any, sizes: dict[str, int]) -> Callable[[], None]:
    """One streaming step of jitted JAX, in the same form."""
    import jax

    from jvjepa import streaming
    from jvjepa.parameters import unstack_layers

    encoder = dataclasses.replace(model.encoder, scan=False)
    params = unstack_layers(model.params)["encoder"]
    side = {"height": sizes["size"], "width": sizes["size"]}
    states = [streaming.init_state(encoder, 1, sizes["window"], **side)]
    tubelet = _random((1, 2, sizes["size"], sizes["size"], 3))

    def run() -> None:
        state, out = streaming.step(encoder, params, states.pop(), tubelet)
        states.append(state)
        jax.block_until_ready(out)

    return run


def artefact_run(session: Any, planned: Any, window: int) -> Callable[[], None]:
    """One run of an artefact; of a step the caller writes the ring, as it must."""
    import numpy as np

    first, *others = planned.inputs
    feed = {first.name: _random(first.sized(1))}
    feed |= {port.name: np.zeros(port.sized(1), port.dtype) for port in others}

    def run() -> None:
        outputs = session.run(feed)
        if planned.what == "step":
            slot = int(feed["time"][0]) % window
            for name in ("keys", "values"):
                feed[name][:, :, slot] = outputs[f"new_{name}"]
            feed["time"] += 1

    return run


def _random(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal(shape, np.float32)


def in_turns(runs: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Seconds of each, after one run of each that is not counted."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, seconds, strict=True):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return seconds


def save_model(folder: Path, layers: int, size: int) -> None:
    """A checkpoint of ViT-L's width with random weights."""
    from quantization import random_params

    from jvjepa import Encoder, EncoderConfig, Model, ModelConfig, save

    config = EncoderConfig(
        hidden_size=1024, num_layers=layers, num_heads=16, mlp_dim=4096, crop_size=size
    )
    whole = ModelConfig(encoder=config)
    params = random_params(whole)
    save(folder, Model(config=whole, encoder=Encoder(config), params=params, source=None))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ("format", "what", "MB", "write", "load", "peak GB", "ms", "against JAX", "error")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        times = sorted(1e3 * seconds for seconds in row["artefact"])
        ratio = statistics.median(row["jax"]) / statistics.median(row["artefact"])
        cells = (
            row["format"],
            row["what"],
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['write']:.0f} s",
            f"{row['load']:.1f} s",
            f"{row['peak'] / 1e9:.1f}",
            f"{statistics.median(times):,.0f} ({times[0]:,.0f} to {times[-1]:,.0f})",
            f"{ratio:.2f} x",
            f"{row['error']:.1e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures every format and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, text) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default}")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as between:
        model = Path(between) / "model"
        with ProcessPoolExecutor(1, mp_context=context) as process:
            process.submit(save_model, model, sizes["layers"], sizes["size"]).result()
        for name in options.formats:
            task = Task(name, model, Path(between) / name, sizes)
            with ProcessPoolExecutor(1, mp_context=context) as process:
                rows += process.submit(measure, task).result()
            print(table(rows[-2:]), flush=True)
    options.out.mkdir(exist_ok=True)
    record = {"sizes": sizes, "machine": machine.describe().splitlines(), "rows": rows}
    (options.out / "export.json").write_text(json.dumps(record, indent=2) + "\n")
    about = ", ".join(f"{name} {value}" for name, value in sizes.items())
    text = f"{table(rows)}\n\n{about}.\n\n{NOTES}\n\n```\n{machine.describe()}\n```\n"
    (options.out / "export.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
