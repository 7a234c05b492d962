"""Worker for saccadic: its causal streaming step at a full window, with adapters or "bare"."""

import itertools

import torch
from saccade import (
    CheckpointSpec,
    FrozenEncoder,
    ModelConfig,
    StreamingConfig,
    StreamingEncoder,
    apply_causal_lora,
)
from subject import Subject, serve_subject
from transformers_worker import (
    device_of,
    matmuls,
    peak_of,
    random_model,
    synchronize,
)
from work import Work


def build(work: Work, variant: str) -> Subject:
    """Builds a stream on random weights and fills its window.

    A step returns the mean of the newest tubelet's tokens, without a final LayerNorm.

    Args:
        work: the work, a "step" of one stream.
        variant: "lora" has the default adapters; "bare" has none, which is the same function as
            long as the adapters are untrained.

    Returns:
        The subject.

    Raises:
        RuntimeError: the stream does not hold a full window, or torch sees no GPU.
    """
    device = device_of(work)
    stream = _stream(work, variant)
    side = work.resolution
    clip = torch.randn(1, work.frames, 3, side, side)
    frames = itertools.cycle(clip.to(device, getattr(torch, work.dtype)).unbind(1))
    result: torch.Tensor | None = None

    @torch.inference_mode()
    def run() -> None:
        nonlocal result
        for _ in range(work.tubelet):  # the last frame of a tubelet gives the embedding
            result = stream.step(next(frames))
        synchronize(device)

    def check() -> None:
        for layer in range(work.layers):
            keys, _ = stream.cache.get(layer)
            held, full = 0 if keys is None else keys.shape[-2], work.window * work.tubelet_tokens
            if held != full:
                raise RuntimeError(f"layer {layer} caches {held} tokens, expected {full}")
        if result is None or result.shape != (1, work.hidden):
            raise RuntimeError(f"a step gave no embedding of shape {(1, work.hidden)}")
        if not torch.isfinite(result).all() or not result.any():
            raise RuntimeError("a step gave an embedding that is zero or not finite")

    return Subject(
        run=run,
        check=check,
        multiply=matmuls(work),
        settle=work.window,
        peak=peak_of(device),
    )


def _stream(work: Work, variant: str) -> StreamingEncoder:
    targets = {} if variant == "lora" else {"lora_targets": []}
    config = StreamingConfig(window=work.window, **targets)
    encoder = _encoder(work)
    apply_causal_lora(encoder, config)
    return StreamingEncoder(encoder, config)


def _encoder(work: Work) -> FrozenEncoder:
    backbone = random_model(work, "sdpa", encoder_layers=work.layers)
    spec = CheckpointSpec(
        name="random",
        hf_repo_id="",
        params_m=sum(p.numel() for p in backbone.encoder.parameters()) / 1e6,
        frames=work.frames,
        resolution=work.resolution,
        embed_dim=work.hidden,
        patch_size=work.patch,
        tubelet_size=work.tubelet,
    )
    config = ModelConfig(
        frames=work.frames,
        resolution=work.resolution,
        device=device_of(work).type,
        dtype=work.dtype,
    )
    return FrozenEncoder(backbone, spec, config)


if __name__ == "__main__":
    serve_subject(build, ["saccadic", "torch", "transformers"])
