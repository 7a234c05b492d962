"""Worker for jvjepa itself, with full attention ("full") or areas ("2x2": splits of rows, time)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Message
from subject import Subject, serve_subject, timed
from work import Work, split_tokens

from jvjepa import (
    Classifier,
    ClassifierConfig,
    Encoder,
    EncoderConfig,
    Predictor,
    PredictorConfig,
    gating,
    masks,
    streaming,
)
from jvjepa.gating import Gate
from jvjepa.typing import Array, DType, Params

SKIP = Gate(tau=2.0, max_hold=1_000_000)
RATE = 1e-6  # of the training step: small enough that random weights stay what they are


class Program(NamedTuple):
    """One call's work, function(state, *inputs) -> (state, output), before it is compiled.

    Args:
        function: the work; its state is donated.
        state: what the first call takes.
        inputs: what every call takes.
        settle: calls until the next one is the work that is meant.
    """

    function: Callable[..., tuple[Any, Any]]
    state: Any
    inputs: tuple[Any, ...]
    settle: int = 0


def build(work: Work, variant: str) -> Subject:
    """Compiles a piece of work.

    Args:
        work: the work.
        variant: "full", or the splits of rows and time of the areas, such as "4x2".

    Returns:
        The subject.

    Raises:
        RuntimeError: this process has another platform than the work.
    """
    if jax.default_backend() != work.platform:
        raise RuntimeError(f"JAX runs on {jax.default_backend()} here, not on {work.platform}")
    program = PROGRAMS[work.kind](work, _config(work, variant))
    state, inputs = jax.device_put((program.state, program.inputs))
    lowered = jax.jit(program.function, donate_argnums=0)
    compiled, seconds = timed(lambda: lowered.lower(state, *inputs).compile())
    output: Any = None
    del program

    def run() -> None:
        nonlocal state, output
        state, output = jax.block_until_ready(compiled(state, *inputs))

    def check() -> None:
        for leaf in jax.tree.leaves(output):
            if not jnp.all(jnp.isfinite(leaf)):
                raise RuntimeError(f"the result of {work} is not finite")
        if work.kind == "skip" and bool(output["is_new"][0]):
            raise RuntimeError("the gate encoded what it should have skipped")

    multiply: list[Callable[[], object]] = []

    def multiply_once() -> None:
        if not multiply:  # only now, so that the peak of the work does not count it
            multiply.append(_matmuls(work))
        multiply[0]()

    device = jax.devices()[0]
    on_gpu = work.platform == "gpu"
    return Subject(
        run=run,
        check=check,
        multiply=multiply_once,
        compile_seconds=seconds,
        settle=1 if work.kind == "skip" else 0,
        peak=(lambda: device.memory_stats()["peak_bytes_in_use"]) if on_gpu else None,
    )


def about(_: Message) -> Message:
    """Answers `about`: the platform, the device and its memory, if it is not the system's."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {"platform": jax.default_backend(), "device": device.device_kind, "memory": memory}


def _config(work: Work, variant: str) -> EncoderConfig:
    areas: dict[str, Any] = {}
    if variant != "full":
        spatial, temporal = map(int, variant.split("x"))
        areas = {"area_layers": (0, work.area_layers)}
        areas |= {"area_temporal_splits": temporal, "area_spatial_splits": spatial}
    return EncoderConfig(
        hidden_size=work.hidden,
        num_layers=work.layers,
        num_heads=work.heads,
        mlp_dim=work.mlp,
        crop_size=work.resolution,
        frames_per_clip=work.frames,
        patch_size=work.patch,
        tubelet_size=work.tubelet,
        **areas,
    )


def _normal(work: Work, *shape: int) -> Array:
    values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    return jnp.asarray(values, work.dtype)


def _random_params(init: Callable[..., Any], *inputs: Any) -> Params:
    """Parameters of about the size that trained ones have, made without compiling anything."""
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        value = rng.standard_normal(leaf.shape, dtype=np.float32) * np.float32(0.02)
        value += np.float32(path[-1].key == "scale")
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _encoder(
    work: Work, config: EncoderConfig, param_dtype: DType | None = None
) -> tuple[Encoder, Params]:
    param_dtype = work.dtype if param_dtype is None else param_dtype
    encoder = Encoder(config, work.dtype, param_dtype, scan=not work.unrolled)
    whole = encoder.clone(config=dataclasses.replace(config, area_layers=(0, 0)))
    return encoder, _random_params(whole.init, _tubelet(work)[:1])  # areas have no parameters


def _clip(work: Work) -> Array:
    return _normal(work, work.batch, work.frames, work.resolution, work.resolution, 3)


def _tubelet(work: Work) -> Array:
    return _normal(work, work.batch, work.tubelet, work.resolution, work.resolution, 3)


def _visible(work: Work) -> tuple[Array | None, Array | None]:
    """The ids of visible tokens [B, M] and which are no padding, drawn as for pretraining."""
    if work.seen == work.tokens:
        return None, None
    drawn = masks.sample(
        jax.random.key(0),
        masks.VIDEO_MASKS[0],
        work.grid,
        work.batch,
        num_context=work.seen,
        num_targets=work.tokens,
    )
    return drawn.context_ids, drawn.context_valid


def _clip_program(work: Work, config: EncoderConfig) -> Program:
    encoder, params = _encoder(work, config)

    def forward(
        state: tuple[()], params: Params, clip: Array, keep: Array | None, valid: Array | None
    ) -> tuple[tuple[()], Array]:
        return state, encoder.apply({"params": params}, clip, keep, valid)

    return Program(forward, (), (params, _clip(work), *_visible(work)))


def _train_program(work: Work, config: EncoderConfig) -> Program:
    encoder, params = _encoder(work, config, jnp.float32)

    def loss(params: Params, clip: Array, keep: Array | None, valid: Array | None) -> Array:
        tokens = encoder.apply({"params": params}, clip, keep, valid).astype(jnp.float32)
        if valid is not None:
            tokens = jnp.where(valid[..., None], tokens, 0.0)
        return jnp.mean(jnp.square(tokens))

    def step(params: Params, *inputs: Any) -> tuple[Params, Array]:
        value, gradients = jax.value_and_grad(loss)(params, *inputs)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value

    return Program(step, params, (_clip(work), *_visible(work)))


def _step_program(work: Work, config: EncoderConfig) -> Program:
    encoder, params = _encoder(work, config)
    state = streaming.init_state(encoder, work.batch, work.window)
    state = state._replace(time=state.time + work.window)  # of a full window; zeros cost the same

    def step(state: Any, params: Params, tubelet: Array) -> tuple[Any, Array]:
        state, out = streaming.step(encoder, params, state, tubelet)
        return state, out.embedding

    return Program(step, state, (params, _tubelet(work)))


def _skip_program(work: Work, config: EncoderConfig) -> Program:
    encoder, params = _encoder(work, config)

    def step(state: Any, params: Params, tubelet: Array) -> tuple[Any, Any]:
        state, out = gating.step(encoder, params, state, tubelet, SKIP)
        return state, {"embedding": out.embedding, "is_new": out.is_new}

    state = gating.init_state(encoder, work.batch, work.window)
    return Program(step, state, (params, _tubelet(work)), settle=1)


def _predictor_program(work: Work, config: EncoderConfig) -> Program:
    width = work.predictor_width
    heads = PredictorConfig(
        hidden_size=width,
        num_layers=work.layers,
        num_heads=work.predictor_heads,
        mlp_dim=4 * width,
    )
    predictor = Predictor(heads, config, work.dtype, work.dtype, scan=not work.unrolled)
    seen, hidden = (jnp.asarray(ids)[None] for ids in split_tokens(work))
    context = _normal(work, 1, work.seen, work.hidden)
    init = lambda key, *inputs: predictor.init(key, *inputs, work.grid)  # noqa: E731
    params = _random_params(init, context, seen, hidden)

    def forward(state: tuple[()], params: Params, *inputs: Array) -> tuple[tuple[()], Array]:
        return state, predictor.apply({"params": params}, *inputs, work.grid).targets

    return Program(forward, (), (params, context, seen, hidden))


def _classifier_program(work: Work, config: EncoderConfig) -> Program:
    labels = tuple(f"LABEL_{i}" for i in range(work.labels))
    pooler = ClassifierConfig(labels=labels, num_layers=work.layers, num_heads=work.heads)
    classifier = Classifier(pooler, config, work.dtype, work.dtype, scan=not work.unrolled)
    tokens = _normal(work, work.batch, work.tokens, work.hidden)
    params = _random_params(classifier.init, tokens)

    def forward(state: tuple[()], params: Params, tokens: Array) -> tuple[tuple[()], Array]:
        return state, classifier.apply({"params": params}, tokens)

    return Program(forward, (), (params, tokens))


def _matmuls(work: Work) -> Callable[[], object]:
    """The MLP's two products, one after the other, several times: how fast it can be at best."""
    factors = [jnp.full(shape, 1 / shape[0], work.dtype) for shape in work.matmul_shapes]

    @jax.jit
    def multiply(x: Array, wide: Array, narrow: Array) -> Array:
        for _ in range(work.matmul_repeats):
            x = (x @ wide) @ narrow
        return x

    return lambda: multiply(*factors).block_until_ready()


PROGRAMS: dict[str, Callable[[Work, EncoderConfig], Program]] = {
    "clip": _clip_program,
    "train": _train_program,
    "step": _step_program,
    "skip": _skip_program,
    "predictor": _predictor_program,
    "classifier": _classifier_program,
}

if __name__ == "__main__":
    serve_subject(build, ["jax", "jaxlib", "flax"], about)
