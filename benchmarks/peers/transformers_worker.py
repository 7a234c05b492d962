"""Worker for `transformers`: the encoder of a random VJEPA2Model, and torch's own matmul."""

import torch
from protocol import Message, Workload, serve, time_calls, versions, workload_of
from transformers import VJEPA2Config, VJEPA2Model

ATTENTION = {"clip_eager": "eager", "clip_sdpa": "sdpa"}


class TransformersWorker:
    """Times whole clips through the encoder, and the dense matmuls of one of its layers."""

    def setup(self, message: Message) -> Message:
        """Builds the model and the inputs, and runs each subject once.

        Args:
            message: The request, with the fields of `Workload`.

        Returns:
            The versions, thread count, parameters of the encoder, and the operations of `matmul`.
        """
        workload = workload_of(message)
        torch.manual_seed(0)
        self.model = random_model(workload)
        side = workload.resolution
        self.clip = torch.randn(1, workload.frames, 3, side, side)
        self.factors = [
            (torch.randn(m, k), torch.randn(k, n)) for m, k, n in workload.layer_matmuls()
        ]
        expected = (1, workload.tokens, workload.hidden)
        for what in ATTENTION:
            self._select(what)
            output = self._encode()
            if output.shape != expected or not torch.isfinite(output).all():
                raise RuntimeError(f"{what} gave {tuple(output.shape)}, expected {expected}")
        self._multiply()
        return {
            "ok": True,
            "versions": versions(["torch", "transformers"]),
            "threads": torch.get_num_threads(),
            "encoder_parameters": sum(p.numel() for p in self.model.encoder.parameters()),
            "matmul_flops": workload.layer_matmul_flops(),
        }

    def time(self, message: Message) -> Message:
        """Times `clip_eager`, `clip_sdpa`, or `matmul` (the six dense matmuls of one layer).

        Args:
            message: The request: `what` and `repeats`.

        Returns:
            The `seconds` of each call.
        """
        what, repeats = message["what"], message["repeats"]
        if what == "matmul":
            return {"seconds": time_calls(self._multiply, repeats)}
        self._select(what)
        return {"seconds": time_calls(self._encode, repeats)}

    def _select(self, what: str) -> None:
        """Switches the model to the attention of a subject."""
        self.model.set_attn_implementation(ATTENTION[what])
        if self.model.config._attn_implementation != ATTENTION[what]:
            raise RuntimeError(f"the model did not switch to {ATTENTION[what]}")

    @torch.inference_mode()
    def _encode(self) -> torch.Tensor:
        """Runs the encoder over the clip."""
        return self.model(self.clip, skip_predictor=True).last_hidden_state

    @torch.inference_mode()
    def _multiply(self) -> None:
        """Runs the dense matmuls of one layer."""
        for left, right in self.factors:
            torch.mm(left, right)


def random_model(workload: Workload) -> VJEPA2Model:
    """Builds a float32 model with random weights.

    Args:
        workload: The shape of the encoder.

    Returns:
        The model, frozen; its predictor has no layers, so that it costs next to nothing.
    """
    config = VJEPA2Config(
        patch_size=workload.patch,
        crop_size=workload.resolution,
        frames_per_clip=workload.frames,
        tubelet_size=workload.tubelet,
        hidden_size=workload.hidden,
        num_attention_heads=workload.heads,
        num_hidden_layers=workload.layers,
        mlp_ratio=float(workload.mlp_ratio),
        pred_hidden_size=32,
        pred_num_attention_heads=1,
        pred_num_hidden_layers=0,
    )
    return VJEPA2Model(config).eval().requires_grad_(False)


if __name__ == "__main__":
    worker = TransformersWorker()
    serve({"setup": worker.setup, "time": worker.time})
