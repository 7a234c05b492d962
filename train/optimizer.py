"""AdamW with the schedules of V-JEPA 2's training, for parameters in groups.

    config = OptimizerConfig(learning_rate=1e-4, warmup_steps=500)
    optimizer = make_optimizer(config, params, steps=10_000)
    state = optimizer.transform.init(params)

Reference: `src/utils/schedulers.py` and `app/vjepa_2_1/utils.py` of Meta's V-JEPA 2.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa.errors import ConfigError
from jvjepa.train.task import Optimizer
from jvjepa.typing import Array, Params

Schedule = Literal["cosine", "linear", "constant"]
Trace = Callable[[Array], Array]

_EMBEDDING = "encoder/(patch_embed|patch_embed_image|image_embed|video_embed)(/.*)?"
_WITHOUT_DECAY = ("bias", "scale")
_NAMED = 5  # parameters that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that change alike.

    Args:
        pattern: a regular expression that matches all of a parameter's name. Every block has names
            of its own, whether or not blocks are stacked: "encoder/blocks_3/mlp/fc1/kernel".
        learning_rate: the learning rate is multiplied with it, 0 or more. With 0 the parameters
            are frozen: they keep every bit.
        weight_decay: the weight decay is multiplied with it, 0 or more.

    Raises:
        ConfigError: a value is impossible.
    """

    pattern: str
    learning_rate: float = 1.0
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        """Checks every field."""
        _check(isinstance(self.pattern, str), self, "pattern", "a regular expression")
        try:
            re.compile(self.pattern)
        except re.error as error:
            name = f"ParameterGroup.pattern = {self.pattern!r}"
            raise ConfigError(f"{name}; it is wrong: {error}") from None
        _check_numbers(self, "learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedules.

    The learning rate rises linearly from `start_learning_rate` to `learning_rate` over
    `warmup_steps`, and then goes to `final_learning_rate`, as a half cosine or linearly. Update n,
    counted from 1, is made with the values at n: the last one with those of the schedule's end.
    Biases and the scales of norms do not decay.

    Args:
        learning_rate: the highest, above 0.
        start_learning_rate: where the warm-up begins.
        final_learning_rate: at the schedule's end; a constant schedule has none.
        warmup_steps: updates until the highest.
        schedule: how the learning rate falls after the warm-up: "cosine", "linear", or "constant".
        stretch: the schedules of learning rate and weight decay are made for this many times the
            steps of the run, 1 or more, which then ends before they do. Meta's training has 1.25.
        weight_decay: what is taken off a parameter per update is this times the learning rate.
        final_weight_decay: at the schedule's end, reached as a half cosine; None keeps it as it is.
        betas: of Adam's two averages, 0 to below 1.
        epsilon: added to Adam's denominator, above 0.
        max_norm: where the norm of all gradients together is larger, they are scaled down to it;
            None for no limit.
        groups: parameters with factors of their own; the first group that matches a parameter
            counts, and one must. () means that all are alike.

    Raises:
        ConfigError: a value is impossible.
    """

    learning_rate: float
    start_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    stretch: float = 1.0
    weight_decay: float = 0.04
    final_weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_norm: float | None = None
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_numbers(self, "start_learning_rate", "final_learning_rate", "weight_decay")
        for name in ("learning_rate", "epsilon"):
            _check(_is_number(getattr(self, name), above=0), self, name, "a number above 0")
        whole = type(self.warmup_steps) is int and self.warmup_steps >= 0
        _check(whole, self, "warmup_steps", "a whole number, 0 or more")
        choices = get_args(Schedule)
        _check(self.schedule in choices, self, "schedule", f"one of {choices}")
        fits = _is_number(self.stretch) and self.stretch >= 1
        _check(fits, self, "stretch", "a number, 1 or more")
        if self.final_weight_decay is not None:
            _check_numbers(self, "final_weight_decay")
        fits = isinstance(self.betas, tuple) and len(self.betas) == 2
        fits = fits and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        _check(fits, self, "betas", "a tuple of two numbers, each from 0 to below 1")
        fits = self.max_norm is None or _is_number(self.max_norm, above=0)
        _check(fits, self, "max_norm", "None or a number above 0")
        fits = isinstance(self.groups, tuple)
        fits = fits and all(isinstance(group, ParameterGroup) for group in self.groups)
        _check(fits, self, "groups", "a tuple of ParameterGroup")


def _check(ok: bool, owner: object, field: str, right: str) -> None:
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}; it must be {right}")


def _check_numbers(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        _check(_is_number(value) and value >= 0, owner, field, "a number, 0 or more")


def _is_number(value: object, above: float = -math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > above


def freeze_first(share: float, num_layers: int) -> ParameterGroup:
    """Makes the group that freezes the encoder's first layers; put it before the others.

    Args:
        share: of the blocks, 0 to 1; with any share the patch embedding is frozen too.
        num_layers: blocks of the encoder.

    Returns:
        The group; `(freeze_first(0.5, 24), ParameterGroup(pattern=".*"))` are all groups.

    Raises:
        ConfigError: the share is impossible.
    """
    if not _is_number(share) or not 0 <= share <= 1:
        raise ConfigError(f"share = {share!r}; it must be a number from 0 to 1")
    blocks = "|".join(str(layer) for layer in range(round(share * num_layers)))
    frozen = _EMBEDDING + (f"|encoder/blocks_({blocks})/.*" if blocks else "")
    return ParameterGroup(pattern=frozen, learning_rate=0.0)


def layer_decay(rate: float, num_layers: int) -> tuple[ParameterGroup, ...]:
    """Makes groups whose learning rates fall from the encoder's last block to its first.

    Args:
        rate: learning rate of a block over that of the next one, above 0, at most 1.
        num_layers: blocks of the encoder.

    Returns:
        Groups for the patch embedding, rate^(L+1), and each block, rate^(L-i); add one for the
        rest, `ParameterGroup(pattern=".*")`.

    Raises:
        ConfigError: the rate is impossible.
    """
    if not _is_number(rate, above=0) or rate > 1:
        raise ConfigError(f"rate = {rate!r}; it must be a number above 0, at most 1")
    names = [_EMBEDDING, *(f"encoder/blocks_{i}/.*" for i in range(num_layers))]
    return tuple(
        ParameterGroup(pattern=name, learning_rate=rate ** (num_layers + 1 - i))
        for i, name in enumerate(names)
    )


def make_optimizer(config: OptimizerConfig, params: Params, *, steps: int) -> Optimizer:
    """Makes the optimizer of some parameters.

    Arrays that are frozen as a whole have no averages in its state. The others have them under
    their own names.

    Args:
        config: which.
        params: what is trained, nested dictionaries, blocks stacked or each of its own; only names
            and shapes are looked at.
        steps: updates of the run, 1 or more.

    Returns:
        The optimizer; its schedules are "learning_rate" and "weight_decay", before factors.

    Raises:
        ConfigError: the warm-up is longer than the run; a group matches nothing, or nothing that
            another has not matched before; a parameter is matched by no group.
    """
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"steps = {steps!r}; it must be a whole number above 0")
    if config.warmup_steps > steps:
        right = f"at most the steps of the run, {steps}"
        raise ConfigError(
            f"OptimizerConfig.warmup_steps = {config.warmup_steps}; it must be {right}"
        )
    schedules = {
        "learning_rate": _learning_rate(config, steps),
        "weight_decay": _weight_decay(config, steps),
    }
    rates, decays = _factors(config.groups, params)
    labels = jax.tree.map(lambda rate: "trained" if rate.any() else "frozen", rates)
    clip = optax.identity()
    if config.max_norm is not None:
        clip = optax.clip_by_global_norm(config.max_norm)
    transform = optax.chain(
        _without_frozen_layers(rates),
        optax.partition(
            {"trained": optax.chain(clip, _adam(config)), "frozen": optax.set_to_zero()}, labels
        ),
        _decay_and_scale(*schedules.values(), rates, decays),
    )
    return Optimizer(transform, schedules)


def divide(config: OptimizerConfig, params: Params) -> tuple[Params, Params, OptimizerConfig]:
    """Takes apart what is trained and what is frozen as whole arrays.

    Args:
        config: its groups say it.
        params: nested dictionaries, as `make_optimizer` takes them.

    Returns:
        The trained arrays, the frozen ones (either may be {}), and the configuration for the
        trained ones alone, without the groups that only frozen arrays are in.

    Raises:
        ConfigError: as `make_optimizer`.
    """
    rates = flatten_dict(_factors(config.groups, params)[0])
    flat = flatten_dict(params)
    trained = unflatten_dict({path: flat[path] for path in flat if rates[path].any()})
    frozen = unflatten_dict({path: flat[path] for path in flat if not rates[path].any()})
    every = [name for names in _all_names(trained) for name in names]
    chosen = _choose(config.groups, [name for names in _all_names(params) for name in names])
    left = tuple(group for group in config.groups if any(chosen[n] is group for n in every))
    return trained, frozen, dataclasses.replace(config, groups=left)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's two averages; optax takes powers of them that strict type promotion refuses."""
    adam = optax.scale_by_adam(*config.betas, config.epsilon)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def _learning_rate(config: OptimizerConfig, steps: int) -> Trace:
    start, peak, final = (
        np.float32(rate)
        for rate in (config.start_learning_rate, config.learning_rate, config.final_learning_rate)
    )
    warmup = config.warmup_steps
    length = max(int(config.stretch * steps) - warmup, 1)

    def trace(step: Array) -> Array:
        number = jnp.asarray(step).astype(jnp.float32) + 1
        progress = jnp.clip((number - warmup) / length, 0, 1)
        if config.schedule == "constant":
            progress = jnp.zeros_like(progress)
        if config.schedule == "cosine":
            progress = _half_cosine(progress)
        after = peak + progress * (final - peak)
        if not warmup:
            return after
        return jnp.where(number < warmup, start + number / warmup * (peak - start), after)

    return trace


def _weight_decay(config: OptimizerConfig, steps: int) -> Trace:
    first = np.float32(config.weight_decay)
    last = first if config.final_weight_decay is None else np.float32(config.final_weight_decay)
    length = int(config.stretch * steps)

    def trace(step: Array) -> Array:
        number = jnp.asarray(step).astype(jnp.float32) + 1
        return first + _half_cosine(jnp.clip(number / length, 0, 1)) * (last - first)

    return trace


def _half_cosine(progress: Array) -> Array:
    """From 0 to 1 as `progress` goes from 0 to 1, flat at both ends."""
    return 0.5 * (1 - jnp.cos(np.float32(math.pi) * progress))


def _without_frozen_layers(rates: Params) -> optax.GradientTransformation:
    """Takes the gradients of frozen layers of a stack away; they would count in the norm."""

    def update(gradients: Params, _: Params | None) -> Params:
        def keep(gradient: Array, rate: np.ndarray) -> Array:
            if rate.all() or not rate.any():
                return gradient
            return jnp.where(rate > 0, gradient, jnp.zeros((), gradient.dtype))

        return jax.tree.map(keep, gradients, rates)

    return optax.stateless(update)


class ScheduleState(NamedTuple):
    """Where the schedules are.

    Args:
        count: int32 [], updates made.
    """

    count: Array


def _decay_and_scale(
    learning_rate: Trace, weight_decay: Trace, rates: Params, decays: Params
) -> optax.GradientTransformation:
    """The decoupled decay of AdamW and the step, each with the factors of every parameter."""

    def init(_: Params) -> ScheduleState:
        return ScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Params, state: ScheduleState, params: Params | None = None
    ) -> tuple[Params, ScheduleState]:
        step, shrink = learning_rate(state.count), weight_decay(state.count)

        def change(update: Array, param: Array, rate: np.ndarray, decay: np.ndarray) -> Array:
            result = -(step * rate) * (update + (shrink * decay) * param)
            if rate.all():
                return result
            return jnp.where(
                rate > 0, result, jnp.array(-0.0, result.dtype)
            )  # 0.0 would alter -0.0

        changes = jax.tree.map(change, updates, params, rates, decays)
        return changes, ScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _factors(groups: Sequence[ParameterGroup], params: Params) -> tuple[Params, Params]:
    """The factors of learning rate and weight decay, as the tree of the parameters.

    Each is float32 of the parameter's rank: all sides 1, or for stacked blocks [L, 1, ..].
    """
    names = jax.tree_util.tree_map_with_path(_names, params)
    every = [name for leaf in _all_names(params) for name in leaf]
    chosen = _choose(groups, every)

    def rates(names: tuple[str, ...], param: Array) -> np.ndarray:
        return _spread([chosen[name].learning_rate for name in names], param)

    def decays(names: tuple[str, ...], param: Array) -> np.ndarray:
        factors = [_decays(name) * chosen[name].weight_decay for name in names]
        return _spread(factors, param)

    return tuple(jax.tree.map(of, names, params, is_leaf=_is_names) for of in (rates, decays))


def _all_names(params: Params) -> list[tuple[str, ...]]:
    names = jax.tree_util.tree_map_with_path(_names, params)
    return jax.tree.leaves(names, is_leaf=_is_names)


def _is_names(node: object) -> bool:
    return isinstance(node, tuple)


def _names(path: tuple[jax.tree_util.DictKey, ...], param: Array) -> tuple[str, ...]:
    """What a parameter is called; of stacked blocks each layer's, as `unstack_layers` does it."""
    keys = [key.key for key in path]
    if "blocks" not in keys:
        return ("/".join(keys),)
    place = keys.index("blocks")
    return tuple(
        "/".join([*keys[:place], f"blocks_{i}", *keys[place + 1 :]]) for i in range(param.shape[0])
    )


def _decays(name: str) -> bool:
    """Meta's rule, which is: all that have not one axis, and no "bias" in the name.

    There norms' scales are the others. Here those of several levels are one array, and modality
    embeddings, which are [1, 1, D] there and decay, have one axis. So it goes by name.
    """
    return name.rpartition("/")[2] not in _WITHOUT_DECAY


def _spread(factors: Sequence[float], param: Array) -> np.ndarray:
    shape = (len(factors),) + (1,) * (len(param.shape) - 1) if param.shape else ()
    return np.asarray(factors, np.float32).reshape(shape)


def _choose(groups: Sequence[ParameterGroup], names: Sequence[str]) -> Mapping[str, ParameterGroup]:
    """The group of each name."""
    if not groups:
        return dict.fromkeys(names, ParameterGroup(pattern=".*"))
    chosen: dict[str, ParameterGroup] = {}
    for group in groups:
        matched = [name for name in names if re.fullmatch(group.pattern, name)]
        if not matched:
            near = difflib.get_close_matches(group.pattern, names, _NAMED, cutoff=0.0)
            raise ConfigError(
                f"ParameterGroup.pattern = {group.pattern!r} matches no parameter; near are "
                f"{', '.join(near)}"
            )
        new = [name for name in matched if name not in chosen]
        if not new:
            raise ConfigError(
                f"ParameterGroup.pattern = {group.pattern!r} matches only what groups before it "
                f"match: {_some(matched)}; put it before them"
            )
        chosen |= dict.fromkeys(new, group)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise ConfigError(
            f"OptimizerConfig.groups: no pattern matches {_some(missing)}; end with "
            "ParameterGroup(pattern='.*') to train them too"
        )
    return chosen


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
