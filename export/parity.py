"""Whether an exported artefact gives what the library's own model gives."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa import gating, streaming
from jvjepa.convert.comparison import relative_error
from jvjepa.errors import InputError
from jvjepa.export.artefact import Artefact
from jvjepa.export.manifest import BATCH, Arrays
from jvjepa.export.options import Options
from jvjepa.weights import Model

Run = Callable[[Arrays], Arrays]
_OPEN_BATCH = 2  # what an open batch is checked with


@dataclasses.dataclass
class Parity:
    """How far an output is from the library's.

    Args:
        relative_error: max |difference| / max |value|, the highest of what was compared at a time;
            max |difference| where every value is 0.
        cosine: the lowest between what was compared at a time; 1 where both are 0.
    """

    relative_error: float = 0.0
    cosine: float = 1.0

    def add(self, found: NDArray[np.floating], right: NDArray[np.floating]) -> None:
        """Takes in one more output."""
        found, right = (np.asarray(x, np.float64).ravel() for x in (found, right))
        error = relative_error(found, right)
        norms = np.linalg.norm(found) * np.linalg.norm(right)
        cosine = float(error == 0) if norms == 0 else found @ right / norms
        # Unlike Python's, these keep a NaN.
        self.relative_error = float(np.maximum(self.relative_error, error))
        self.cosine = float(np.minimum(self.cosine, cosine))


def check(artefact: Artefact, model: Model, run: Run, options: Options) -> dict[str, Parity]:
    """Runs an artefact beside the library's model, on random input.

    Steps are chained past the end of the ring, each side with its own cache; of several streams the
    last one is restarted on the way, so that their times differ.

    Args:
        artefact: what is checked.
        model: the model, computing in float32.
        run: maps inputs by name to outputs by name, in the artefact's own runtime.
        options: sizes, tolerance and seed.

    Returns:
        The parity of each output.

    Raises:
        InputError: an output is further away than the tolerance.
    """
    rng = np.random.default_rng(options.seed)
    batch = _OPEN_BATCH if artefact.inputs[0].shape[0] == BATCH else options.batch
    pairs = {"clip": _clip, "classifier": _classifier, "gate": _gate, "step": _steps}
    found: dict[str, Parity] = {}
    with jax.default_matmul_precision("highest"):
        for outputs, right in pairs[artefact.what](artefact, model, run, rng, batch, options):
            for name, value in right.items():
                found.setdefault(name, Parity()).add(outputs[name], value)
    worst = max(found, key=lambda name: np.nan_to_num(found[name].relative_error, nan=np.inf))
    if not found[worst].relative_error <= options.largest_error:
        raise InputError(
            f"{artefact.what}: {worst} has a relative error of {found[worst].relative_error:.1e} "
            f"against the library's model, and {options.largest_error:.0e} is allowed; nothing "
            "was kept"
        )
    return found


_Pairs = Iterator[tuple[Arrays, Arrays]]


def _video(artefact: Artefact, rng: np.random.Generator, batch: int) -> NDArray[np.float32]:
    return rng.standard_normal(artefact.inputs[0].sized(batch), np.float32)


def _clip(
    artefact: Artefact, model: Model, run: Run, rng: np.random.Generator, batch: int, _: Options
) -> _Pairs:
    video = _video(artefact, rng, batch)
    apply = jax.jit(model.encoder.apply)
    tokens = np.asarray(apply({"params": model.params["encoder"]}, video))
    yield run({"video": video}), {"tokens": tokens, "embedding": tokens.mean(axis=1)}


def _classifier(
    artefact: Artefact, model: Model, run: Run, rng: np.random.Generator, batch: int, _: Options
) -> _Pairs:
    video, layers = _video(artefact, rng, batch), model.config.classifier.layers

    @jax.jit
    def classify(params: dict, video: jax.Array) -> jax.Array:
        variables = {"params": params["encoder"]}
        if layers:
            levels = model.encoder.apply(variables, video, method="levels", layers=layers)
            tokens = jnp.concatenate(list(levels), axis=1)
        else:
            tokens = model.encoder.apply(variables, video)
        return model.classifier.apply({"params": params["classifier"]}, tokens)

    yield run({"video": video}), {"logits": np.asarray(classify(model.params, video))}


def _gate(
    artefact: Artefact, model: Model, run: Run, rng: np.random.Generator, batch: int, _: Options
) -> _Pairs:
    first, second = (_video(artefact, rng, batch) for _ in range(2))

    @jax.jit
    def describe(params: dict, video: jax.Array) -> jax.Array:
        patches = model.encoder.apply({"params": params}, video, method="embed_patches")
        return patches.astype(jnp.float32)

    of_first, of_second = (describe(model.params["encoder"], x) for x in (first, second))
    right = {"surprise": gating.distance(of_second, of_first), "descriptor": of_second}
    feed = {"tubelet": second, "reference": np.asarray(of_first)}
    yield run(feed), jax.device_get(right)


def _steps(
    artefact: Artefact,
    model: Model,
    run: Run,
    rng: np.random.Generator,
    batch: int,
    options: Options,
) -> _Pairs:
    window, params = options.window, model.params["encoder"]
    *_, height, width, _ = artefact.inputs[0].shape
    state = streaming.init_state(model.encoder, batch, window, height=height, width=width)
    cache = {port.name: np.zeros(port.sized(batch), port.dtype) for port in artefact.inputs[1:]}
    streams = np.arange(batch)
    for index in range(window + 2):
        if index == 2 and batch > 1:
            state = streaming.reset(state, streams == batch - 1)
            for ring in (cache["keys"], cache["values"]):
                ring[:, -1] = 0
            cache["time"][-1] = 0
        tubelet = _video(artefact, rng, batch)
        outputs = run({"tubelet": tubelet, **cache})
        state, right = streaming.step(
            model.encoder, params, state, tubelet, positions=options.positions
        )
        slot = cache["time"] % window
        for name in ("keys", "values"):
            new = outputs[f"new_{name}"]
            if options.cache == "graph":
                cache[name] = np.array(new)  # the runtime may own it
            else:
                cache[name][:, streams, slot] = new
        cache["time"] = cache["time"] + 1
        # The rings themselves are compared too, with those of the library after its step.
        rings = {f"new_{name}": cache[name] for name in ("keys", "values")}
        found = {name: outputs[name] for name in ("embedding", "tokens")} | rings
        values = {"embedding": right.embedding, "tokens": right.tokens}
        values |= {"new_keys": state.cache.keys, "new_values": state.cache.values}
        yield found, jax.device_get(values)
