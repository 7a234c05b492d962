"""A live embedding on a box without JAX: numpy, and ONNX Runtime or TensorRT.

    from jvjepa.export.runtime import EdgeStream

    stream = EdgeStream("edge")  # of `jvjepa export MODEL edge --what step gate`
    embedding, is_new, surprise = stream.step(frame)  # uint8 [H, W, 3], every frame of a camera

The same numbers as `jvjepa stream`: the gate compares with the last encoded tubelet, and what is
skipped leaves the stream as it was (`jvjepa.gating`). `pip install --no-deps jvjepa` is enough.
"""

from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.export.manifest import BATCH, MANIFEST, Arrays, read
from jvjepa.export.sessions import CPU, Session, open_session
from jvjepa.gate import Gate
from jvjepa.preprocessing import preprocess


class Frame(NamedTuple):
    """What a frame led to.

    Args:
        embedding: float32 [D]; NaN before the first tubelet is whole.
        is_new: whether it was encoded now.
        surprise: 1 - cosine to the gate's reference: infinite where there is none yet; NaN for a
            frame that waits for the rest of its tubelet, and where a pixel is not finite.
    """

    embedding: NDArray[np.float32]
    is_new: bool
    surprise: float


class Crop(NamedTuple):
    """What `preprocess` needs to know."""

    crop_size: int


class EdgeStream:
    """One gated stream of an exported model.

    Args:
        folder: an export for ONNX or TensorRT with a step, and a gate if there is to be one.
        gate: when to encode; with `tau=0` everything is encoded, and no exported gate is needed.
        pool: "tubelet" embeds the new tubelet, "window" those in the window.
        provider: of ONNX Runtime; it runs there or not at all.

    Raises:
        CheckpointError: the folder is not whole, or its engines are another machine's.
        InputError: the folder has no step or gate, it was exported for several streams at a time,
            or the runtime or its provider is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        gate: Gate | None = None,
        pool: Literal["tubelet", "window"] = "tubelet",
        provider: str = CPU,
    ) -> None:
        """Loads the graphs."""
        if pool not in ("tubelet", "window"):
            raise ConfigError(f"pool = {pool!r}; it must be 'tubelet' or 'window'")
        folder = Path(folder)
        manifest = read(folder)
        self.gate, self.pool, self.crop_size = gate or Gate(), pool, manifest.crop_size
        entry = manifest.entry(folder, "step")
        ports = {port.name: port for port in (*entry.inputs, *entry.outputs)}
        about: dict[str, Any] = manifest.stream or {}
        try:
            self.window, self._cache_form = about["window"], about["cache"]
            self._rings = {name: ports[name] for name in ("keys", "values")}
            tubelet, embedding = ports["tubelet"], ports["embedding"]
        except KeyError as error:
            raise CheckpointError(f"{folder / MANIFEST} lacks {error} of its step") from error
        if tubelet.shape[0] not in (1, BATCH):
            count = tubelet.shape[0]
            raise InputError(f"{folder} steps {count} streams at a time; export with --batch 1")
        runtime = manifest.runtime
        self._step = open_session(folder, "step", entry, runtime, provider)
        self._gate: Session | None = None
        if "gate" in manifest.artefacts or self.gate.tau > 0:
            its = manifest.entry(folder, "gate")
            self._gate = open_session(folder, "gate", its, runtime, provider)
        self._shape = tubelet.sized(1)[1:]
        self.width = embedding.sized(1)[1]
        self.tubelet_size = self._shape[0]
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._cache: Arrays = {
            name: np.zeros(port.sized(1), port.dtype) for name, port in self._rings.items()
        }
        self._time = 0
        self._waiting: list[NDArray[np.uint8]] = []
        self._embeddings: deque[NDArray[np.float32]] = deque(maxlen=self.window)
        self._reference: NDArray[np.float32] | None = None
        self._output = np.full(self.width, np.nan, np.float32)
        self._held = self._settling = 0

    def step(self, frame: NDArray[np.uint8]) -> Frame:
        """Takes in one frame.

        Args:
            frame: uint8 [H, W, 3], RGB, any size; it is resized and cut as the model needs it.

        Returns:
            What it led to. Every second frame makes a tubelet whole; the others wait, and give the
            embedding so far.

        Raises:
            InputError: the frame is no picture, or of another size than the one that waits, which
                is dropped too: the next frame begins a tubelet.
        """
        if self.crop_size is None:
            height, width = self._shape[1:3]
            raise InputError(
                f"this step was exported for {height} x {width} pixels, to which frames are not "
                "cut; preprocess them and call step_pixels"
            )
        waiting, self._waiting = self._waiting, []  # a frame that is refused takes them along
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise InputError(
                f"a frame is {frame.dtype} {list(frame.shape)}; right is uint8 [H, W, 3], RGB"
            )
        if waiting and frame.shape != waiting[0].shape:
            raise InputError(
                f"a frame of {list(frame.shape)} follows one of {list(waiting[0].shape)}"
            )
        waiting.append(np.array(frame))  # a camera may reuse its buffer
        if len(waiting) < self.tubelet_size:
            self._waiting = waiting
            return Frame(self._output, False, np.nan)
        frames = np.stack(waiting)
        return self.step_pixels(preprocess(frames, Crop(self.crop_size)))

    def step_pixels(self, pixels: NDArray[np.float32]) -> Frame:
        """Takes in one tubelet.

        Args:
            pixels: float32 [2, H, W, 3], ImageNet-normalised, of the exported size.

        Returns:
            What it led to.

        Raises:
            InputError: the shape or dtype is another.
        """
        if pixels.shape != self._shape or pixels.dtype != np.float32:
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}; the step was exported for "
                f"float32 {list(self._shape)}"
            )
        finite, surprise, descriptor = self._compare(pixels[None])
        surprising = finite and surprise >= np.float32(self.gate.tau)
        is_new = not finite or surprising or self._settling > 0 or self._held >= self.gate.max_hold
        embedding = self._output
        if is_new:
            embedding = self._encode(pixels[None], commit=finite)
        commit = is_new and finite
        if commit or (finite and self.gate.reference == "previous"):
            self._reference = descriptor
        self._held = 0 if commit else self._held + 1
        self._settling = self.gate.settle if surprising else max(self._settling - finite, 0)
        return Frame(embedding, is_new, float(surprise))

    def _compare(
        self, pixels: NDArray[np.float32]
    ) -> tuple[bool, np.float32, NDArray[np.float32] | None]:
        """Whether a tubelet is finite, its surprise, and its descriptor if there is a gate."""
        if self._gate is None:
            finite = bool(np.isfinite(pixels).all())
            return finite, np.float32(np.inf if finite else np.nan), None
        tokens, width = self._shape_of_descriptor
        reference = self._reference
        if reference is None:
            reference = np.zeros((1, tokens, width), np.float32)
        out = self._gate.run({"tubelet": pixels, "reference": reference})
        descriptor = out["descriptor"]
        if not np.isfinite(descriptor).all():
            return False, np.float32(np.nan), descriptor
        ready = self._time > 0
        return True, out["surprise"][0] if ready else np.float32(np.inf), descriptor

    @property
    def _shape_of_descriptor(self) -> tuple[int, int]:
        tokens = self._rings["keys"].shape[3]
        return int(tokens), self.width

    def _encode(self, pixels: NDArray[np.float32], *, commit: bool) -> NDArray[np.float32]:
        time = np.array([self._time], np.int32)
        out = self._step.run({"tubelet": pixels, **self._cache, "time": time})
        embedding = out["embedding"][0]
        recent = [*self._embeddings, embedding][-self.window :]
        pooled = embedding if self.pool == "tubelet" else np.mean(recent, axis=0)
        if not commit:
            return pooled
        slot = self._time % self.window
        for name in self._cache:
            if self._cache_form == "graph":
                self._cache[name] = out[f"new_{name}"]
            else:
                self._cache[name][:, :, slot] = out[f"new_{name}"]
        self._time += 1
        self._embeddings.append(embedding)
        self._output = pooled
        return pooled
