"""Worker for jvjepa itself: whole clips, streaming steps, skipped steps, and JAX's own matmul."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Message, Workload, serve, time_calls, versions, workload_of

from jvjepa import Encoder, EncoderConfig, gating, streaming
from jvjepa.encoder import forward_flops
from jvjepa.gating import Gate
from jvjepa.parameters import unstack_layers

ENCODE, SKIP = Gate(tau=0.0), Gate(tau=2.0, max_hold=1_000_000)


class JvjepaWorker:
    """Times what `cpu.py` puts into its table."""

    def setup(self, message: Message) -> Message:
        """Builds the encoder, fills the window, and runs each subject once.

        Args:
            message: The request, with the fields of `Workload`.

        Returns:
            The versions, parameters of the encoder, the operations of `clip`, `step` and
            `matmul`, and the seconds that compiling took.
        """
        workload = workload_of(message)
        self.encoder = Encoder(_config(workload))
        self.unrolled = Encoder(_config(workload), scan=False)
        side = workload.resolution
        rng = np.random.default_rng(0)
        shape = (1, workload.frames, side, side, 3)
        self.clip = jnp.asarray(rng.normal(size=shape), jnp.float32)
        self.tubelet = self.clip[:, : workload.tubelet]
        self.params = jax.jit(self.encoder.init)(jax.random.key(0), self.tubelet)["params"]
        self.factors = [
            (jnp.asarray(rng.normal(size=(m, k)), jnp.float32), jnp.ones((k, n), jnp.float32))
            for m, k, n in workload.layer_matmuls()
        ]
        self.layers = unstack_layers(self.params)
        self.forward = jax.jit(lambda params, clip: self.encoder.apply({"params": params}, clip))
        self.product = jax.jit(jnp.matmul)
        self.stream = streaming.init_state(self.encoder, 1, workload.window)
        self.unrolled_stream = streaming.init_state(self.unrolled, 1, workload.window)
        self.gated = gating.init_state(self.encoder, 1, workload.window)
        compile_seconds = {what: time_calls(run, 1)[0] for what, run in self._subjects().items()}
        for _ in range(workload.window):
            self._step()
            self._unrolled_step()
            self._gated(ENCODE)
        tokens = workload.tokens // workload.window
        config = self.encoder.config
        return {
            "ok": True,
            "versions": versions(["jax", "jaxlib", "flax"]),
            "encoder_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "clip_flops": forward_flops(config, workload.tokens, workload.tokens),
            "step_flops": forward_flops(config, tokens, workload.tokens),
            "matmul_flops": workload.layer_matmul_flops(),
            "compile_seconds": compile_seconds,
        }

    def time(self, message: Message) -> Message:
        """Times one of `_subjects`.

        Args:
            message: The request: `what` and `repeats`.

        Returns:
            The `seconds` of each call.
        """
        return {"seconds": time_calls(self._subjects()[message["what"]], message["repeats"])}

    def _subjects(self) -> dict[str, Callable[[], object]]:
        return {
            "clip": lambda: self.forward(self.params, self.clip).block_until_ready(),
            "step": self._step,
            "step_unrolled": self._unrolled_step,
            "gated_encode": lambda: self._gated(ENCODE),
            "gated_skip": lambda: self._gated(SKIP),
            "matmul": self._multiply,
        }

    def _step(self) -> None:
        self.stream, out = streaming.step(self.encoder, self.params, self.stream, self.tubelet)
        out.embedding.block_until_ready()

    def _unrolled_step(self) -> None:
        self.unrolled_stream, out = streaming.step(
            self.unrolled, self.layers, self.unrolled_stream, self.tubelet
        )
        out.embedding.block_until_ready()

    def _gated(self, gate: Gate) -> None:
        self.gated, out = gating.step(self.encoder, self.params, self.gated, self.tubelet, gate)
        out.embedding.block_until_ready()
        if bool(out.is_new[0]) != (gate is ENCODE) and int(self.gated.gate.seen[0]) > 1:
            raise RuntimeError(f"the gate did not do what it was told: {out.is_new}")

    def _multiply(self) -> None:
        for a, b in self.factors:
            self.product(a, b).block_until_ready()


def _config(workload: Workload) -> EncoderConfig:
    return EncoderConfig(
        hidden_size=workload.hidden,
        num_layers=workload.layers,
        num_heads=workload.heads,
        mlp_dim=workload.hidden * workload.mlp_ratio,
        crop_size=workload.resolution,
        frames_per_clip=workload.frames,
        patch_size=workload.patch,
        tubelet_size=workload.tubelet,
    )


if __name__ == "__main__":
    worker = JvjepaWorker()
    serve({"setup": worker.setup, "time": worker.time})
