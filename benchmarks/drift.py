"""How a stream's embedding differs from encoding its last window afresh.

    python benchmarks/drift.py MODEL VIDEO

A step of the stream equals the full forward pass under the banded block-causal mask, so its cached
keys remember what came before the window. This prints how far that is from encoding the last
window of tubelets alone, causally (same mask, nothing before) and as a clip (no mask).
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jvjepa
from jvjepa import streaming
from jvjepa.calibration import cosine
from jvjepa.live import tubelets


def main() -> None:
    """Streams the video, encodes each window afresh, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("video")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--tubelets", type=int, default=40)
    options = parser.parse_args()
    model = jvjepa.load(options.model)
    clip = []
    for tubelet in tubelets(options.video, model):
        clip.append(tubelet.pixels)
        if len(clip) == options.tubelets:
            break
    if len(clip) < options.window:
        parser.error(
            f"{options.video} has {len(clip)} tubelets; --window {options.window} needs as many"
        )
    stream, causal, bidirectional = _embeddings(model, clip, options.window)
    table = Table("last window, encoded afresh", "mean cosine", "worst cosine", "mean rel. error")
    for name, fresh in (("causally", causal), ("as a clip", bidirectional)):
        cosines = cosine(stream, fresh)
        error = np.linalg.norm(stream - fresh, axis=1) / np.linalg.norm(fresh, axis=1)
        table.add_row(name, f"{cosines.mean():.5f}", f"{cosines.min():.5f}", f"{error.mean():.4f}")
    Console().print(f"{len(stream)} windows of {options.window} tubelets, mean over the window")
    Console().print(table)


def _embeddings(
    model: jvjepa.Model, clip: list[np.ndarray], window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings [n, D] of every full window: streamed, fresh causal, fresh bidirectional."""
    encoder, params = model.encoder, model.params["encoder"]

    @jax.jit
    def afresh(video: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = (encoder.apply({"params": params}, video, window=w) for w in (window, None))
        causal, bidirectional = (x.astype(jnp.float32).mean(axis=1)[0] for x in tokens)
        return causal, bidirectional

    state = streaming.init_state(encoder, 1, window)
    rows = []
    for i, pixels in enumerate(clip):
        state, out = streaming.step(encoder, params, state, pixels[None], pool="window")
        if i >= window - 1:
            video = np.concatenate(clip[i - window + 1 : i + 1])[None]
            rows.append((out.embedding[0], *afresh(video)))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


if __name__ == "__main__":
    main()
