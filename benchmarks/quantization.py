"""Small weights and small caches at ViT-L's width: size, nearness to float32, and time.

    python benchmarks/quantization.py                        # 4 layers, 16 frames of 256 pixels
    python benchmarks/quantization.py --layers 24 --size 384 --repeats 5

Every scheme of `jvjepa quantize` encodes the same clip with the same weights, and every kind of
cache streams the same tubelets; rounds are interleaved, and times are without compilation. Weights
are drawn with the spread of trained ones, and pixels too: nearness says what rounding does to
numbers of that size, not what it does to a trained model, which `jvjepa quantize` measures. The
steps of int8-static come from another clip. Writes `quantization.json` and `quantization.md`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from flax.traverse_util import unflatten_dict

from jvjepa import Encoder, EncoderConfig, Model, ModelConfig, streaming
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.quantization import SCHEMES, nbytes, quantize
from jvjepa.quantize import interleaved_seconds, nearness
from jvjepa.ranges import input_ranges
from jvjepa.typing import Params

HERE = Path(__file__).parent
FLOAT = "float32"
VIT_L = 24  # layers
CACHES = (FLOAT, "int8", "fp8")
SIZES = {
    "layers": (4, "of the encoder; ViT-L has 24"),
    "frames": (16, "of a clip"),
    "size": (256, "pixels of a side of a frame"),
    "window": (8, "tubelets that a stream sees"),
    "repeats": (5, "turns of everybody"),
}
NOTES = """\
Size: of ViT-L's encoder with all its 24 layers, 4 bits for a value of int4 and nf4; of the keys
and values of the layers that ran.
Cosine: mean over the tokens of theirs to float32's. Largest error: of a value, over the largest
value of float32. Milliseconds: median (lowest to highest), and over those of float32."""


def random_params(config: ModelConfig) -> Params:
    """Draws parameters of the spread of trained ones; kernels keep the size of what they take."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        spread = shape[-2] ** -0.5 if name.endswith("/kernel") else 0.1
        values = spread * rng.standard_normal(shape, np.float32)
        return jnp.asarray(values + np.float32(name.endswith("/scale")))

    shapes = parameter_shapes(config)
    return unflatten_dict({name: draw(name, x) for name, x in shapes.items()}, sep="/")


def measure_schemes(
    encoder: Encoder, params: Params, clip: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Measures float32 and every scheme on one clip.

    Args:
        encoder: the encoder.
        params: of the whole model, blocks as the encoder takes them.
        clip: float32 [T, H, W, 3].
        repeats: turns.

    Returns:
        By name: `bytes` of a whole ViT-L, `cosine`, `largest` and `seconds`.
    """
    config = ModelConfig(encoder=encoder.config)
    model = Model(config=config, encoder=encoder, params=params, source=None)
    other = np.random.default_rng(1).standard_normal(clip.shape, np.float32)
    ranges = input_ranges(model, [other])
    models = {FLOAT: params}
    for scheme in SCHEMES:
        static = ranges if scheme == "int8-static" else None
        models[scheme] = quantize(params, scheme, ranges=static)
    seconds = interleaved_seconds(encoder, list(models.values()), clip, repeats)
    encode = jax.jit(lambda params, video: encoder.apply({"params": params}, video))
    tokens = {name: encode(some["encoder"], clip[None]) for name, some in models.items()}
    rows = {}
    for (name, some), times in zip(models.items(), seconds, strict=True):
        cosine, largest = nearness(tokens[name], tokens[FLOAT])
        facts = {"cosine": cosine, "largest": largest, "seconds": times}
        rows[name] = {"bytes": whole_bytes(some["encoder"], encoder.config.num_layers), **facts}
    return rows


def whole_bytes(params: Params, layers: int) -> int:
    """Bytes of an encoder's parameters if it had as many layers as ViT-L."""
    blocks = nbytes([part for name, part in params.items() if name.startswith("blocks")])
    return nbytes(params) + blocks // layers * (VIT_L - layers)


def measure_caches(
    encoder: Encoder, params: Params, tubelets: np.ndarray, window: int, repeats: int
) -> dict[str, Any]:
    """Measures a streaming step with every kind of cache.

    Args:
        encoder: the encoder.
        params: its parameters.
        tubelets: float32 [n, 1, 2, H, W, 3].
        window: tubelets.
        repeats: turns, of one pass over the tubelets each.

    Returns:
        As `measure_schemes`, `bytes` of the cache; `seconds` are of steps with a full window.
    """
    sides = {"height": tubelets.shape[3], "width": tubelets.shape[4]}
    rows: dict[str, Any] = {name: {"seconds": []} for name in CACHES}
    tokens: dict[str, list[np.ndarray]] = {}
    for turn in range(repeats + 1):  # the first compiles
        for name in CACHES:
            kind = None if name == FLOAT else name
            state = streaming.init_state(encoder, 1, window, **sides, cache=kind)
            rows[name]["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
            tokens[name] = []
            for i, tubelet in enumerate(tubelets):
                begin = time.perf_counter()
                state, out = streaming.step(encoder, params, state, tubelet)
                tokens[name].append(np.asarray(out.tokens))
                if turn and i >= window - 1:
                    rows[name]["seconds"].append(time.perf_counter() - begin)
    for name, row in rows.items():
        row["cosine"], row["largest"] = nearness(np.stack(tokens[name]), np.stack(tokens[FLOAT]))
    return rows


def markdown(report: dict[str, Any]) -> str:
    """Writes the tables and the machine.

    Args:
        report: `machine`, a list of lines; `work`, the sizes; `schemes` and `caches`, the rows.

    Returns:
        The document, with a final newline.
    """
    work = report["work"]
    loop = "blocks one after the other" if work["unrolled"] else "a loop over blocks"
    what = (
        f"{work['layers']} layers of ViT-L's width (1,024; ViT-L has 24), {loop}, "
        f"{work['frames']} frames of {work['size']} pixels, float32 computation, random weights."
    )
    parts = ["# Quantization", what, NOTES, "## Weights", table("scheme", report["schemes"])]
    parts += ["## Cache", f"A streaming step, window {work['window']}."]
    parts += [table("cache", report["caches"])]
    parts.append("\n".join(f"- {line}" for line in report["machine"]))
    return "\n\n".join(parts) + "\n"


def table(title: str, rows: dict[str, Any]) -> str:
    """Writes one table.

    Args:
        title: of its first column.
        rows: by name, float32 among them.

    Returns:
        Markdown.
    """
    head = [title, "MB", "share", "cosine", "largest error", "ms", "time"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    whole = rows[FLOAT]
    for name, row in rows.items():
        values = [1e3 * f(row["seconds"]) for f in (statistics.median, min, max)]
        ratio = statistics.median(row["seconds"]) / statistics.median(whole["seconds"])
        cells = [name, f"{row['bytes'] / 1e6:,.1f}", f"{row['bytes'] / whole['bytes']:.0%}"]
        cells += [f"{row['cosine']:.6f}", f"{row['largest']:.2%}"]
        lines.append([*cells, "{:,.0f} ({:,.0f} to {:,.0f})".format(*values), f"{ratio:.2f} x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes `quantization.json` and `quantization.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(report, indent=1) + "\n", ".md": markdown(report)}
    for suffix, text in texts.items():
        part = folder / f"quantization{suffix}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / f"quantization{suffix}")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; {default}")
    parser.add_argument("--unrolled", action="store_true", help="no loop over the blocks")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the tables")
    options = parser.parse_args()
    for name in SIZES:
        if getattr(options, name) < 1:
            parser.error(f"--{name} = {getattr(options, name)}; it must be 1 or more")
    config = EncoderConfig(
        hidden_size=1024,
        num_layers=options.layers,
        num_heads=16,
        mlp_dim=4096,
        crop_size=options.size,
    )
    encoder = Encoder(config, scan=not options.unrolled)
    params = random_params(ModelConfig(encoder=config))
    params = unstack_layers(params) if options.unrolled else params
    rng = np.random.default_rng(2)
    clip = rng.standard_normal((options.frames, options.size, options.size, 3), np.float32)
    tubelets = rng.standard_normal((options.window + 3, 1, 2, *clip.shape[1:]), np.float32)
    before = os.getloadavg()[0]
    schemes = measure_schemes(encoder, params, clip, options.repeats)
    steps = measure_caches(encoder, params["encoder"], tubelets, options.window, options.repeats)
    about = machine.describe().splitlines()
    about.append(f"load average: {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    work = {name: getattr(options, name) for name in SIZES} | {"unrolled": options.unrolled}
    write(options.out, {"machine": about, "work": work, "schemes": schemes, "caches": steps})
    print((options.out / "quantization.md").read_text())


if __name__ == "__main__":
    main()
