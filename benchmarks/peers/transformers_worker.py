"""Worker for transformers with "eager" attention, "sdpa", or "compile", which is SDPA."""

import shutil
from collections.abc import Callable

import process
import torch
from subject import Subject, serve_subject
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model
from work import Work, split_tokens

COMPILERS = ("c++", "g++", "clang++")


def build(work: Work, variant: str) -> Subject:
    """Builds a random model.

    Args:
        work: the work, of one of the kinds in `PARTS`.
        variant: "eager", "sdpa" or "compile".

    Returns:
        The subject.

    Raises:
        RuntimeError: there is no such device, or no compiler that torch.compile needs.
    """
    compiles = variant == "compile"
    if compiles and work.platform == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise RuntimeError(f"torch.compile needs a C++ compiler, one of {COMPILERS}")
    device = device_of(work)
    part, expected = PARTS[work.kind](work, variant)
    if compiles:
        part = torch.compile(part)
    result: torch.Tensor | None = None

    @torch.inference_mode()
    def run() -> None:
        nonlocal result
        result = part()
        synchronize(device)

    def check() -> None:
        if result is None or result.shape != expected or not torch.isfinite(result).all():
            raise RuntimeError(f"{work} did not give finite values of shape {expected}")

    return Subject(
        run=run,
        check=check,
        multiply=matmuls(work),
        compile_seconds=None if compiles else 0.0,
        peak=peak_of(device),
    )


def device_of(work: Work) -> torch.device:
    """Returns the device of a piece of work, and has torch use all cores.

    Args:
        work: the work.

    Returns:
        The device.

    Raises:
        RuntimeError: torch sees no GPU.
    """
    torch.manual_seed(0)
    torch.set_num_threads(process.cores())
    if work.platform == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    return torch.device("cuda")


def synchronize(device: torch.device) -> None:
    """Waits until everything is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(device: torch.device) -> Callable[[], int] | None:
    """Returns what tells the device's peak memory; None for a CPU."""
    return torch.cuda.max_memory_allocated if device.type == "cuda" else None


def matmuls(work: Work) -> Callable[[], object]:
    """Returns the same products as jvjepa's worker times."""
    device, dtype = device_of(work), getattr(torch, work.dtype)
    factors: list[torch.Tensor] = []

    @torch.inference_mode()
    def multiply() -> None:
        if not factors:  # only now, so that the peak of the work does not count them
            for shape in work.matmul_shapes:
                factors.append(torch.full(shape, 1 / shape[0], dtype=dtype, device=device))
        x, wide, narrow = factors
        for _ in range(work.matmul_repeats):
            x = (x @ wide) @ narrow
        synchronize(device)

    return multiply


def random_model(
    work: Work, attention: str, *, encoder_layers: int = 0, predictor_layers: int = 0
) -> VJEPA2Model:
    """Builds a model with random weights; by default one whose parts have no layers.

    Args:
        work: the sizes.
        attention: "eager" or "sdpa".
        encoder_layers: layers of the encoder.
        predictor_layers: layers of the predictor.

    Returns:
        The model, frozen.
    """
    config = model_config(work, attention, encoder_layers, predictor_layers)
    return _placed(VJEPA2Model(config), work)


def model_config(
    work: Work, attention: str, encoder_layers: int, predictor_layers: int
) -> VJEPA2Config:
    """Returns the configuration of `random_model`; its pooler has the layers of the work."""
    return VJEPA2Config(
        patch_size=work.patch,
        crop_size=work.resolution,
        frames_per_clip=work.frames,
        tubelet_size=work.tubelet,
        hidden_size=work.hidden,
        num_attention_heads=work.heads,
        num_hidden_layers=encoder_layers,
        mlp_ratio=work.mlp / work.hidden,
        pred_hidden_size=work.predictor_width,
        pred_num_attention_heads=work.predictor_heads,
        pred_num_hidden_layers=predictor_layers,
        num_pooler_layers=work.layers,
        num_labels=work.labels,
        attn_implementation=attention,
    )


def _placed(model: torch.nn.Module, work: Work) -> torch.nn.Module:
    model = model.eval().requires_grad_(False)
    return model.to(device_of(work), getattr(torch, work.dtype))


def _normal(work: Work, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=getattr(torch, work.dtype), device=device_of(work))


Part = tuple[Callable[[], torch.Tensor], tuple[int, ...]]


def _attention(variant: str) -> str:
    return "eager" if variant == "eager" else "sdpa"


def _clip(work: Work, variant: str) -> Part:
    model = random_model(work, _attention(variant), encoder_layers=work.layers)
    clip = _normal(work, work.batch, work.frames, 3, work.resolution, work.resolution)

    def encode() -> torch.Tensor:
        return model(clip, skip_predictor=True).last_hidden_state

    return encode, (work.batch, work.tokens, work.hidden)


def _predictor(work: Work, variant: str) -> Part:
    predictor = random_model(work, _attention(variant), predictor_layers=work.layers).predictor
    tokens = _normal(work, 1, work.tokens, work.hidden)
    ids = [[torch.tensor([part], device=device_of(work))] for part in split_tokens(work)]

    def predict() -> torch.Tensor:
        return predictor(tokens, *ids).last_hidden_state

    return predict, (1, work.predicted, work.hidden)


def _classifier(work: Work, variant: str) -> Part:
    config = model_config(work, _attention(variant), 0, 0)
    model = _placed(VJEPA2ForVideoClassification(config), work)
    tokens = _normal(work, work.batch, work.tokens, work.hidden)

    def classify() -> torch.Tensor:
        return model.classifier(model.pooler(tokens))

    return classify, (work.batch, work.labels)


PARTS: dict[str, Callable[[Work, str], Part]] = {
    "clip": _clip,
    "predictor": _predictor,
    "classifier": _classifier,
}

if __name__ == "__main__":
    serve_subject(build, ["torch", "transformers"])
