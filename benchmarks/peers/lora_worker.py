"""Worker for a step of LoRA training: jvjepa's, or that of peft on transformers.

Both sides draw weights, adapters and clip by transformers' names, and so train the same. Adapters
begin as if they had been trained for a while: new ones change nothing, and where the student is
its teacher there is no loss. Each side imports its libraries where it needs them, so that no
process has those of the other.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import process
from numpy.typing import NDArray
from protocol import Message, serve, time_calls, versions
from subject import KEPT, timed
from work import Work

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from jvjepa import EncoderConfig
    from jvjepa.train.task import Loss, Task

RANK, ALPHA = 16, 32.0
LEARNING_RATE, MAX_NORM = 2e-4, 1.0
TARGETS = ("query", "key", "value", "proj")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation


class Training(NamedTuple):
    """What a side has set up.

    Args:
        step: makes an update; returns the loss and the norm of the gradient before it.
        compile_seconds: what came before the first step.
        base_bytes: memory of the process before it had any weights.
        peak: the most bytes used on the device so far; None for a CPU, whose memory is the
            process's.
        packages: whose versions count.
    """

    step: Callable[[], tuple[float, float]]
    compile_seconds: float
    base_bytes: int | None
    peak: Callable[[], int] | None
    packages: Sequence[str]


def draw(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Draws a tensor of the size that trained ones have, the same wherever it is drawn.

    Args:
        name: in transformers or peft, "encoder.layer.0.attention.query.weight".
        shape: as it is there.

    Returns:
        The values.
    """
    value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    *_, layer, kind = name.split(".")
    if "norm" in layer:
        return np.float32(0.1) * value + np.float32(kind == "weight")
    if kind == "weight":
        return value * np.float32(0.5 / math.sqrt(math.prod(shape[1:])))
    return np.float32(0.1) * value


def clip(work: Work) -> NDArray[np.uint8]:
    """Draws the batch: [B, T, H, W, 3]."""
    shape = (work.batch, work.frames, work.resolution, work.resolution, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


# --- jvjepa -------------------------------------------------------------------------------------


def jvjepa_task(work: Work, *, causal: bool, remat: str) -> "Task":
    """Sets up jvjepa's own training.

    Args:
        work: the sizes; `window` is that of a causal student.
        causal: whether the student sees the past alone, as it does in jvjepa; peft's sees all.
        remat: "none" or "block".

    Returns:
        The task.
    """
    from jvjepa import Encoder
    from jvjepa.config import ModelConfig
    from jvjepa.lora import LoraConfig
    from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task
    from jvjepa.train.data import ClipConfig
    from jvjepa.train.feeding import DataConfig
    from jvjepa.train.manifest import Manifest
    from jvjepa.train.optimizer import OptimizerConfig
    from jvjepa.weights import DTYPES, Model

    config, dtype = _encoder_config(work), DTYPES[work.dtype]
    encoder = Encoder(config, dtype, dtype, scan=not work.unrolled)
    params, factors = _draw_for_jvjepa(work, config)
    model = Model(config=ModelConfig(encoder=config), encoder=encoder, params=params, source=None)
    options = CausalLoraConfig(
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", weight_decay=0.0, max_norm=MAX_NORM
        ),
        data=DataConfig(
            clip=ClipConfig(num_frames=work.frames, crop_size=work.resolution),
            batch_size=work.batch,
        ),
        window=work.window,
        dtype=work.dtype,
        remat=remat,
    )
    zero, label = np.zeros(1), np.zeros(1, np.int32)
    unread = Manifest(source="clips", paths=("clip.mp4",), starts=zero, ends=zero + 1, labels=label)
    task = causal_lora_task(model, options, unread, steps=1)
    task = dataclasses.replace(task, trained=factors)
    if causal:
        return task
    student = dataclasses.replace(encoder, remat=remat)
    return dataclasses.replace(task, loss=_loss_of_seeing_all(student, options.loss))


def _encoder_config(work: Work) -> "EncoderConfig":
    from jvjepa import EncoderConfig

    return EncoderConfig(
        hidden_size=work.hidden,
        num_layers=work.layers,
        num_heads=work.heads,
        mlp_dim=work.mlp,
        crop_size=work.resolution,
        frames_per_clip=work.frames,
        patch_size=work.patch,
        tubelet_size=work.tubelet,
    )


def _draw_for_jvjepa(work: Work, config: "EncoderConfig") -> tuple[Any, Any]:
    """The parameters, in the dtype of the work, and the factors of the adapters."""
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import unflatten_dict

    from jvjepa.config import ModelConfig
    from jvjepa.convert.huggingface import hf_entries
    from jvjepa.parameters import parameter_shapes, unstack_layers

    model = ModelConfig(encoder=config)
    params = {name: np.empty(x, np.float32) for name, x in parameter_shapes(model).items()}
    factors: dict[str, list[NDArray[np.float32]]] = {}
    for entry in hf_entries(model):
        place = ... if entry.layer is None else entry.layer
        params[entry.ours][place] = entry.take(draw(entry.theirs, entry.their_shape))
        *_, part, layer, kind = entry.ours.split("/")
        if part == "attention" and layer in TARGETS and kind == "kernel":
            theirs, ours = entry.theirs.removesuffix(".weight"), entry.ours.removesuffix("/kernel")
            outputs, inputs = entry.their_shape
            for factor, shape in (("a", (RANK, inputs)), ("b", (outputs, RANK))):
                value = draw(f"{theirs}.lora_{factor.upper()}.weight", shape)
                factors.setdefault(f"{ours}/{factor}", []).append(value.T)
    stacked = {name: np.stack(layers) for name, layers in factors.items()}

    def place_on_device(flat: Mapping[str, NDArray[np.float32]], dtype: str) -> Any:
        tree = unflatten_dict(dict(flat), sep="/")
        tree = unstack_layers(tree) if work.unrolled else tree
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    return place_on_device(params, work.dtype), place_on_device(stacked, "float32")


def _loss_of_seeing_all(encoder: Any, config: Any) -> "Loss":
    """The loss of `jvjepa.train.causal_lora` but for its mask, which transformers does not have."""
    import jax

    from jvjepa.lora import join, variables
    from jvjepa.train.data import normalise
    from jvjepa.train.regression import regression_loss

    def loss(trained: Any, carried: Any, frozen: Any, batch: Any, step: Any, key: Any) -> Any:
        video = normalise(batch.video, encoder.dtype)
        base, lora = frozen["base"]["encoder"], join(trained, frozen["constants"])["encoder"]
        teacher = jax.lax.stop_gradient(encoder.apply({"params": base}, video))
        student = encoder.apply(variables(base, lora), video)
        tubelets = video.shape[1] // encoder.config.tubelet_size
        return regression_loss(config, student, teacher, tubelets)

    return loss


def jvjepa_training(work: Work, *, causal: bool, remat: str) -> Training:
    """Compiles the update that `jvjepa.train.loop.train` makes; its state is donated.

    Args:
        work: the sizes.
        causal: see `jvjepa_task`.
        remat: see `jvjepa_task`.

    Returns:
        The training.

    Raises:
        RuntimeError: this process has another platform than the work.
    """
    import jax

    from jvjepa.train.data import Batch
    from jvjepa.train.loop import begin, make_step

    if jax.default_backend() != work.platform:
        raise RuntimeError(f"JAX runs on {jax.default_backend()} here, not on {work.platform}")
    on_gpu, device = work.platform == "gpu", jax.devices()[0]
    base = 0 if on_gpu else process.resident()
    task = jvjepa_task(work, causal=causal, remat=remat)
    numbers = np.zeros(work.batch, np.int32)
    inputs = jax.device_put((task.frozen, Batch(clip(work), numbers, numbers), jax.random.key(0)))
    state = jax.device_put(begin(task))
    update = jax.jit(make_step(task), donate_argnums=0)
    del task
    compiled, seconds = timed(lambda: update.lower(state, *inputs).compile())

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, *inputs))
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    return Training(
        step=step,
        compile_seconds=seconds,
        base_bytes=base,
        peak=(lambda: device.memory_stats()["peak_bytes_in_use"]) if on_gpu else None,
        packages=("jax", "jaxlib", "flax", "optax"),
    )


# --- peft ---------------------------------------------------------------------------------------


def peft_student(work: Work, *, remat: str) -> "PeftModel":
    """Builds transformers' model, frozen and of the work's dtype, with float32 adapters.

    Args:
        work: the sizes.
        remat: "none", or "block" for gradient checkpointing.

    Returns:
        The student; with its adapters disabled it is the teacher.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import VJEPA2Model
    from transformers_worker import device_of, model_config

    device = device_of(work)
    model = VJEPA2Model(model_config(work, "sdpa", work.layers, 0))
    if remat == "block":
        model.gradient_checkpointing_enable()
    _fill(torch, model.named_parameters())
    model = model.to(device, getattr(torch, work.dtype))
    targets = rf"encoder\.layer\.\d+\.attention\.({'|'.join(TARGETS)})"
    student = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
    )
    _fill(torch, adapters(student).items())
    return student.train()  # there is no dropout; without it nothing would be computed anew


def adapters(student: "PeftModel") -> dict[str, "torch.Tensor"]:
    """What is trained, by the names that `draw` takes: "..query.lora_A.weight"."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    }


def _fill(torch: Any, parameters: Any) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(torch.from_numpy(draw(name, parameter.shape)))


def peft_loss(student: "PeftModel", video: "torch.Tensor", work: Work) -> "torch.Tensor":
    """Computes the loss of `jvjepa.train.regression` with PyTorch's own functions.

    Args:
        student: from `peft_student`.
        video: uint8 [B, T, H, W, 3].
        work: the same as for the student.

    Returns:
        float32 [].
    """
    import torch
    from torch.nn import functional

    mean, std = (255 * torch.tensor(values, device=video.device) for values in IMAGENET)
    dtype = getattr(torch, work.dtype)
    pixels = ((video.float() - mean) / std).to(dtype).permute(0, 1, 4, 2, 3)
    with torch.autocast(video.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad(), student.disable_adapter():
            teacher = student(pixels, skip_predictor=True).last_hidden_state
        tokens = student(pixels, skip_predictor=True).last_hidden_state

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = (functional.layer_norm(z, z.shape[-1:], eps=1e-5) for z in (x, y))
        cosine = functional.cosine_similarity(x, y, dim=-1)
        return functional.smooth_l1_loss(x, y) + (1 - cosine).mean()

    tokens, teacher = tokens.float(), teacher.float()
    pooled = (z.unflatten(1, (work.grid[0], -1)).mean(2) for z in (tokens, teacher))
    return distance(tokens, teacher) + distance(*pooled)


def peft_training(work: Work, *, causal: bool, remat: str) -> Training:
    """Sets up the usual loop of PyTorch: mixed precision if in bfloat16, and a fused AdamW.

    Args:
        work: the sizes.
        causal: must be False.
        remat: see `peft_student`.

    Returns:
        The training.

    Raises:
        RuntimeError: there is no such device, or no such training.
    """
    import torch
    from transformers_worker import device_of, peak_of, synchronize

    if causal:
        raise RuntimeError("transformers has no causal V-JEPA 2")
    device = device_of(work)
    torch.backends.cudnn.allow_tf32 = False  # of the patches in float32
    base = process.resident() if device.type == "cpu" else 0
    student = peft_student(work, remat=remat)
    trained = list(adapters(student).values())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    video = torch.from_numpy(clip(work)).to(device)

    def step() -> tuple[float, float]:
        loss = peft_loss(student, video, work)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return loss.item(), norm.item()

    packages = ("torch", "transformers", "peft")
    return Training(step, 0.0, base, peak_of(device), packages)


# --- The worker ---------------------------------------------------------------------------------

SIDES: dict[str, Callable[..., Training]] = {"jvjepa": jvjepa_training, "peft": peft_training}


def main() -> None:
    """Answers `setup` (work, side, causal, remat), `time` and `quit`."""
    current: list[Training] = []

    def setup(message: Message) -> Message:
        options = {name: message[name] for name in ("causal", "remat")}
        training = SIDES[message["side"]](Work(**message["work"]), **options)
        current.append(training)
        process.reset_peak()
        loss, norm = training.step()
        (next_loss, _), seconds = timed(training.step)
        peak = process.peak() if training.peak is None else training.peak()
        process.give_back(KEPT)
        return {
            "versions": versions(training.packages),
            "compile_seconds": training.compile_seconds,
            "call_seconds": seconds,
            "base_bytes": training.base_bytes,
            "peak_bytes": peak,
            "start": {"loss": loss, "gradient norm": norm, "loss of the next step": next_loss},
        }

    def time_it(message: Message) -> Message:
        (training,) = current
        losses: list[float] = []
        seconds = time_calls(lambda: losses.append(training.step()[0]), message["repeats"])
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(f"the losses are {losses}")
        process.give_back(KEPT)
        return {"seconds": seconds}

    serve({"setup": setup, "time": time_it})


if __name__ == "__main__":
    main()
