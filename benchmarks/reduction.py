"""Token reduction on a clip of ViT-L: time against the whole clip, and how far the result is off.

    python benchmarks/reduction.py                   # 4 layers of ViT-L width, 16 frames, 256 px
    python benchmarks/reduction.py --layers 24       # the whole ViT-L

Weights are random: they prove speed, not quality. With weights that nobody trained the cosines show
that an error stays small where little goes and grows where much goes, and nothing else; the
numbers of a trained encoder on its task are others.

The clips are 16 frames at 4 a second of the H.264 file that `jvjepa demo` makes: a box enters a
still room, and a slow pan. All plans and the plain encoder compute in turns in one process, layers
unrolled. The ratio is of medians; below 1 is faster than the encoder without a plan.

Writes reduction.json and reduction.md into the folder.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from table import milliseconds

from jvjepa import Encoder, EncoderConfig, video
from jvjepa.calibration import cosine
from jvjepa.demo import save_clip
from jvjepa.reduced import unmerge
from jvjepa.reduction import (
    DropPredictable,
    MergeStatic,
    Plan,
    count_tokens,
    encode,
    merge_schedule,
)
from jvjepa.typing import Params

HERE = Path(__file__).parent
FRAMES, GRID = 16, (8, 16, 16)
SCENES = {"a box enters": 4.0, "a slow pan": 12.5}  # seconds at which a clip of 4 s begins
BASE = "no plan"


def plans(layers: int) -> dict[str, Plan]:
    """What is compared, by name; of 2,048 tokens.

    Args:
        layers: L. ToMe's numbers are such that about as many go in all, whatever L.

    Returns:
        The plans.
    """
    found: dict[str, Plan] = {"empty plan": ()}
    for total in (256, 512, 1024):
        each = total // layers
        found[f"ToMe, r = {each}"] = merge_schedule(each, range(layers))
    each = 1024 // layers
    found[f"ToMe, r = {each}, decreasing"] = merge_schedule(each, range(layers), -1.0)
    for columns in (64, 128, 192):
        name = f"static, {columns} of 256 patches"
        found[name] = (MergeStatic(columns=columns, segment=8),)
    for remove in (512, 1024):
        found[f"predictable, {remove}"] = (DropPredictable(layer=0, remove=remove),)
    eight = {"layer": 0, "remove": 1024, "neighbours": 8}
    found["predictable, 1024, 8 neighbours"] = (DropPredictable(**eight),)
    found["predictable, 1024, as saccadic"] = (DropPredictable(**eight, causal=False),)
    each = 256 // layers
    static = MergeStatic(columns=128, segment=8)
    found[f"static, 128, and ToMe, r = {each}"] = (static, *merge_schedule(each, range(layers)))
    return found


def random_params(encoder: Encoder) -> Params:
    """Draws parameters that keep the size of what goes through them; the same in every run."""
    image = jnp.zeros((1, 2, 16, 16, 3))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key != "kernel":
            return jnp.full(leaf.shape, float(path[-1].key == "scale"), leaf.dtype)
        values = rng.standard_normal(leaf.shape, dtype=np.float32)
        return jnp.asarray(values / np.sqrt(leaf.shape[-2]))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def clips(config: EncoderConfig) -> dict[str, jax.Array]:
    """Makes the video and reads its scenes: each [1, T, H, W, 3], by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        save_clip(path)
        found = {}
        for name, start in SCENES.items():
            frames, _ = video.read(path, num_frames=FRAMES, fps=4.0, start=start)
            found[name] = jnp.asarray(video.preprocess(frames, config)[None])
    return found


def measure(layers: int, rounds: int, out: Path) -> None:
    """Measures all plans and writes the table.

    Args:
        layers: L.
        rounds: how often everybody has a turn.
        out: the folder.
    """
    config = EncoderConfig(hidden_size=1024, num_layers=layers, num_heads=16, mlp_dim=4096)
    encoder = Encoder(config, scan=False)
    params, scenes = random_params(encoder), clips(config)
    apply = jax.jit(encoder.apply)
    full = {name: np.asarray(apply({"params": params}, clip)[0]) for name, clip in scenes.items()}
    rows: dict[str, dict[str, Any]] = {BASE: {"tokens": [len(full["a box enters"])], "scenes": {}}}
    runs: dict[str, Callable[[jax.Array], object]] = {
        BASE: lambda clip: apply({"params": params}, clip)
    }
    for name, plan in plans(layers).items():
        begin = time.perf_counter()
        results = {scene: encode(encoder, params, clip, plan) for scene, clip in scenes.items()}
        seconds = time.perf_counter() - begin
        row = rows[name] = {"tokens": count_tokens(plan, config, GRID), "first_seconds": seconds}
        row["scenes"] = {scene: fidelity(found, full[scene]) for scene, found in results.items()}
        runs[name] = lambda clip, plan=plan: encode(encoder, params, clip, plan)
        print(name, row["tokens"][-1], row["scenes"], sep=" | ", flush=True)
    clip = scenes["a box enters"]
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(clip))
            rows[name].setdefault("seconds", []).append(time.perf_counter() - begin)
        write(out, {"machine": machine.describe(), "layers": layers, "rows": rows})
    print(out / "reduction.md")


def fidelity(found: Any, full: np.ndarray) -> dict[str, float]:
    """Cosines to `full` [N, D]: that of the embedding, and the mean one of the tokens put back."""
    grid = np.asarray(unmerge(found.tokens, found.source)[0])
    embedding = np.asarray(found.embedding)
    return {
        "embedding": float(cosine(embedding, full.mean(axis=0, keepdims=True))[0]),
        "tokens": float(cosine(grid, full).mean()),
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes the numbers, and the table of them."""
    scenes = list(SCENES)
    head = ["plan", "tokens at the end", "ms per clip, median (range)", "ratio"]
    head += [f"{scene}: {what}" for scene in scenes for what in ("embedding", "tokens")]
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    base = statistics.median(report["rows"][BASE]["seconds"])
    for name, row in report["rows"].items():
        ratio = statistics.median(row["seconds"]) / base
        cells = [name, f"{row['tokens'][-1]:,}", milliseconds(row["seconds"]), f"{ratio:.2f}"]
        for scene in scenes:
            found = row["scenes"].get(scene, {"embedding": 1.0, "tokens": 1.0})
            cells += [f"{found[what]:.4f}" for what in ("embedding", "tokens")]
        lines.append(" | ".join(cells))
    what = f"{report['layers']} layers of ViT-L width, {FRAMES} frames, 256 px, float32, random"
    text = "\n".join([f"| {line} |" for line in lines])
    about = "\n".join(f"- {line}" for line in report["machine"].splitlines())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reduction.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    note = f"{what} weights, which prove speed, not quality: cosines to the encoder without a plan."
    (folder / "reduction.md").write_text(f"{note}\n\n{text}\n\n{about}\n", encoding="utf-8")


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=4, help="of the encoder, 2 or more; ViT-L has 24"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often everybody has a turn")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the table")
    options = parser.parse_args()
    for name, least in (("layers", 2), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} = {getattr(options, name)}; it must be {least} or more")
    measure(options.layers, options.rounds, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
