"""Worker for `saccadic`: its causal streaming step at a full window, and its one-shot embedding."""

import itertools

import torch
from protocol import Message, Workload, serve, time_calls, versions, workload_of
from saccade import (
    CheckpointSpec,
    FrozenEncoder,
    ModelConfig,
    StreamingConfig,
    StreamingEncoder,
    apply_causal_lora,
)
from transformers_worker import random_model


class SaccadicWorker:
    """Times `StreamingEncoder.step` and `FrozenEncoder.embed` on random weights.

    Each subject has an encoder of its own, because `apply_causal_lora` converts in place and a
    converted encoder cannot embed. `step` has the default adapters; `step_no_lora` converts with
    `lora_targets=[]`, which is the same function as long as the adapters are untrained. A step
    returns the mean of the newest tubelet's tokens, without the final LayerNorm that `embed` has.
    """

    def setup(self, message: Message) -> Message:
        """Builds the encoders, fills the windows, and runs each subject.

        Args:
            message: The request, with the fields of `Workload`.

        Returns:
            The versions, the thread count, the attention of `embed`, the rows that each stream's
            cache holds, and the shapes of the results.
        """
        workload = workload_of(message)
        torch.manual_seed(0)
        self.workload = workload
        side = workload.resolution
        self.clip = torch.randn(1, workload.frames, 3, side, side)
        self.frames = itertools.cycle(self.clip.unbind(1))
        self.encoder = _encoder(workload)
        default = StreamingConfig(window=workload.window)
        bare = StreamingConfig(window=workload.window, lora_targets=[])
        self.streams = {
            "step": _stream(workload, default),
            "step_no_lora": _stream(workload, bare),
        }
        time_calls(self._embed, 1)
        shapes = {"embed": self._check_result("embed")}
        for what in self.streams:
            self._time_steps(what, workload.window + 1)
            shapes[what] = self._check_result(what)
        return {
            "ok": True,
            "versions": versions(["saccadic", "torch", "transformers"]),
            "threads": torch.get_num_threads(),
            "attention": self.encoder.backbone.config._attn_implementation,
            "cache_rows": {what: len(stream.cache) for what, stream in self.streams.items()},
            "output_shapes": shapes,
        }

    def time(self, message: Message) -> Message:
        """Times `step`, `step_no_lora` (each a tubelet of frames, one result), or `embed`.

        Args:
            message: The request: `what` and `repeats`.

        Returns:
            The `seconds` of each call.
        """
        what, repeats = message["what"], message["repeats"]
        if what == "embed":
            seconds = time_calls(self._embed, repeats)
        else:
            seconds = self._time_steps(what, repeats)
        self._check_result(what)
        return {"seconds": seconds}

    @torch.inference_mode()
    def _embed(self) -> None:
        """Embeds the clip."""
        self.result = self.encoder.embed(self.clip)

    @torch.inference_mode()
    def _step(self, what: str) -> None:
        """Feeds one tubelet to a stream, frame by frame; the last frame gives the embedding."""
        for _ in range(self.workload.tubelet):
            self.result = self.streams[what].step(next(self.frames))

    def _time_steps(self, what: str, repeats: int) -> list[float]:
        """Times steps of a stream, which must end with a full window."""
        seconds = time_calls(lambda: self._step(what), repeats)
        self._check_cache(what)
        return seconds

    def _check_cache(self, what: str) -> None:
        """Fails unless every layer of a stream holds keys of a full window."""
        cache = self.streams[what].cache
        for layer in range(self.workload.layers):
            keys, _ = cache.get(layer)
            held = 0 if keys is None else keys.shape[-2]
            if held != self.workload.tokens:
                raise RuntimeError(
                    f"{what}: layer {layer} caches {held} tokens, expected {self.workload.tokens}"
                )

    def _check_result(self, what: str) -> list[int]:
        """Returns the shape of the last result; fails unless it is a sound embedding."""
        shape = list(self.result.shape)
        if shape != [1, self.workload.hidden]:
            raise RuntimeError(f"{what} gave {shape}, expected [1, {self.workload.hidden}]")
        if not torch.isfinite(self.result).all() or not self.result.any():
            raise RuntimeError(f"{what} gave an embedding that is zero or not finite")
        return shape


def _stream(workload: Workload, config: StreamingConfig) -> StreamingEncoder:
    """Returns a causal stream over a new encoder."""
    encoder = _encoder(workload)
    apply_causal_lora(encoder, config)
    return StreamingEncoder(encoder, config)


def _encoder(workload: Workload) -> FrozenEncoder:
    """Returns a random encoder; `embed` always runs the predictor, so that one is empty."""
    backbone = random_model(workload)
    spec = CheckpointSpec(
        name="random",
        hf_repo_id="",
        params_m=sum(p.numel() for p in backbone.encoder.parameters()) / 1e6,
        frames=workload.frames,
        resolution=workload.resolution,
        embed_dim=workload.hidden,
        patch_size=workload.patch,
        tubelet_size=workload.tubelet,
    )
    config = ModelConfig(
        frames=workload.frames, resolution=workload.resolution, device="cpu", dtype="float32"
    )
    return FrozenEncoder(backbone, spec, config)


if __name__ == "__main__":
    worker = SaccadicWorker()
    serve({"setup": worker.setup, "time": worker.time})
