"""Encoding clips with fewer tokens from layer to layer: a plan says where how many go.

    plan = reduction.merge_schedule(40, range(24))     # ToMe: 40 tokens in each of 24 layers
    out = reduction.encode(model.encoder, model.params["encoder"], video, plan)
    out.embedding                                      # [B, D], the mean of the full grid
    reduced.unmerge(out.tokens, out.source)            # [B, N, D], the full grid

Kinds of steps can be mixed. Attention counts each token as often as it stands for one of the clip
(`jvjepa.reduced.proportional_attention`), and rotary positions are those of what it stands for.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jvjepa import rope
from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder, check_video, token_grid
from jvjepa.errors import ConfigError, InputError
from jvjepa.fields import check, check_bools, check_positive_ints
from jvjepa.layers import Block, RopeTables
from jvjepa.reduced import (
    Reduced,
    drop_predictable,
    merge,
    merge_static,
    pool,
    whole,
)
from jvjepa.typing import Array, Params

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge the most similar tokens within a layer, see `jvjepa.reduced.merge` (ToMe).

    It is done between attention and MLP. Similar are tokens with similar keys: those of the layer,
    before they are rotated, averaged over heads.

    Args:
        layer: counted from 0.
        remove: tokens that go, at most half of those that there are.

    Raises:
        ConfigError: a value is impossible.
    """

    layer: int
    remove: int

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_layer(self)
        check_positive_ints(self, "remove")

    def left(self, tokens: int, grid: Grid) -> int:
        """How many of `tokens` it leaves; raises ConfigError where it cannot be done."""
        check(self.remove <= tokens // 2, self, "remove", f"at most {tokens // 2} {_there(tokens)}")
        return tokens - self.remove


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeStatic:
    """Merge patches over time where they stay the same, see `jvjepa.reduced.merge_static`.

    It is done before a layer, and before any other step of a plan.

    Args:
        columns: how many patches of the grid are merged, counted in every segment.
        segment: tubelets that become one token, 2 or more, a divisor of the clip's.
        layer: counted from 0.

    Raises:
        ConfigError: a value is impossible.
    """

    columns: int
    segment: int
    layer: int = 0

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_layer(self)
        check_positive_ints(self, "columns", "segment")
        check(self.segment >= 2, self, "segment", "2 or more")

    def left(self, tokens: int, grid: Grid) -> int:
        """How many of `tokens` it leaves; raises ConfigError where it cannot be done."""
        check(tokens == math.prod(grid), self, "layer", "before the layers of all other steps")
        check(grid[0] % self.segment == 0, self, "segment", f"a divisor of the {grid[0]} tubelets")
        most = tokens // self.segment
        check(self.columns <= most, self, "columns", f"at most {most} {_there(tokens)}")
        return tokens - self.columns * (self.segment - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropPredictable:
    """Drop tokens that similar ones predict, see `jvjepa.reduced.drop_predictable`.

    It is done before a layer.

    Args:
        layer: counted from 0.
        remove: tokens that go.
        neighbours: the most similar tokens, which predict one.
        causal: predict from tokens before it alone.

    Raises:
        ConfigError: a value is impossible.
    """

    layer: int
    remove: int
    neighbours: int = 1
    causal: bool = True

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_layer(self)
        check_positive_ints(self, "remove", "neighbours")
        check_bools(self, "causal")

    def left(self, tokens: int, grid: Grid) -> int:
        """How many of `tokens` it leaves; raises ConfigError where it cannot be done."""
        for field in ("remove", "neighbours"):
            fits = getattr(self, field) < tokens
            check(fits, self, field, f"at most {tokens - 1} {_there(tokens)}")
        return tokens - self.remove


Step = Merge | MergeStatic | DropPredictable
Plan = tuple[Step, ...]


class ReducedOutput(NamedTuple):
    """What `encode` gives.

    Args:
        tokens: [B, M, D], after the final norm.
        sizes: float32 [B, M], of how many of the clip's N tokens each stands for.
        positions: float32 [B, M, 3], where each is: tubelet, row, column of `jvjepa.rope`.
        source: int32 [B, N], the token that stands for each of the clip's, for
            `jvjepa.reduced.unmerge`.
        embedding: float32 [B, D], the mean of the tokens weighted with their sizes, which is that
            of the full grid.
    """

    tokens: Array
    sizes: Array
    positions: Array
    source: Array
    embedding: Array


def merge_schedule(remove: int, layers: Sequence[int], trend: float = 0.0) -> Plan:
    """Spreads merging over layers as ToMe does.

    Args:
        remove: tokens that go in each layer, on average.
        layers: the layers, as `range(24)`.
        trend: 0 merges as many in each layer; -1 from twice as many in the first down to none in
            the last, the paper's decreasing schedule; 1 the other way round.

    Returns:
        The steps; layers without anything to merge have none.

    Raises:
        ConfigError: a value is impossible.
    """
    if isinstance(remove, bool) or not isinstance(remove, int) or remove < 0:
        raise ConfigError(f"remove = {remove!r}; it must be a whole number, 0 or more")
    if not -1 <= trend <= 1:
        raise ConfigError(f"trend = {trend!r}; it must be between -1 and 1")
    first = int(remove * (1 - trend))
    slope = (2 * remove - 2 * first) / max(1, len(layers) - 1)
    counts = [int(first + slope * i) for i in range(len(layers))]
    pairs = zip(layers, counts, strict=True)
    return tuple(Merge(layer=layer, remove=count) for layer, count in pairs if count)


def count_tokens(plan: Sequence[Step], config: EncoderConfig, grid: Grid) -> tuple[int, ...]:
    """Counts the tokens that leave each layer, and checks the plan.

    Args:
        plan: the steps, in the order of their layers.
        config: the encoder's.
        grid: (t, h, w) of the clip.

    Returns:
        [L] numbers.

    Raises:
        ConfigError: the plan cannot be carried out on such a clip, or not with this encoder.
    """
    for step in plan:
        if not isinstance(step, Step):
            names = "Merge, MergeStatic or DropPredictable"
            raise ConfigError(f"plan holds {step!r}; it must be a tuple of {names}")
        check(step.layer < config.num_layers, step, "layer", f"below {config.num_layers}")
    layers = [step.layer for step in plan]
    if layers != sorted(layers):
        raise ConfigError(f"plan has layers {layers}; its steps must be in the order of layers")
    if len({(step.layer, type(step)) for step in plan}) < len(plan):
        raise ConfigError(f"plan has layers {layers}; no layer can have a kind of step twice")
    if plan and config.has_areas:
        raise ConfigError(
            f"area_layers = {config.area_layers}; tokens that stand for several belong to no area, "
            "and such an encoder cannot run a plan"
        )
    tokens, counts = math.prod(grid), []
    for layer in range(config.num_layers):
        for step in sum(_steps(plan, layer), ()):
            tokens = step.left(tokens, grid)
        counts.append(tokens)
    return tuple(counts)


def encode(encoder: Encoder, params: Params, video: Array, plan: Sequence[Step]) -> ReducedOutput:
    """Encodes a clip while carrying out a plan; compiled once for a plan and a shape.

    All tokens see each other: masks, windows and streaming, which need the tokens of the grid, are
    not for reduced ones. With an empty plan the tokens are the encoder's.

    Layers run one after the other, since each may have another number of tokens. Parameters of an
    encoder with `scan=False` are used where they are; those of a stack are cut out of it in each
    call, which on a CPU costs time.

    Args:
        encoder: the encoder, without areas.
        params: its parameters, `model.params["encoder"]`.
        video: float [B, T, H, W, 3], as `Encoder` takes it.
        plan: the steps, in the order of their layers.

    Returns:
        The output, with the last of `count_tokens` tokens.

    Raises:
        InputError: the video cannot be right.
        ConfigError: the plan cannot be carried out on it, or not with this encoder.
    """
    plan, config = tuple(plan), encoder.config
    check_video(video, config)
    tubelets = max(1, video.shape[1] // config.tubelet_size)
    count_tokens(plan, config, (tubelets, *token_grid(video, config)))
    if encoder.remat != "none":
        raise ConfigError(f"remat = {encoder.remat!r}; with a plan it must be 'none'")
    return _encode(encoder, params, video, plan)


@functools.partial(jax.jit, static_argnames=("encoder", "plan"))
def _encode(encoder: Encoder, params: Params, video: Array, plan: Plan) -> ReducedOutput:
    config = encoder.config
    patches = encoder.apply({"params": params}, video, method="embed_patches")
    rows, columns = token_grid(video, config)
    grid = (patches.shape[1] // (rows * columns), rows, columns)
    places = rope.positions(jnp.arange(patches.shape[1])[None], rope.layout(config, rows, columns))
    state = whole(patches, places)
    block = Block(config.block, encoder.dtype, encoder.param_dtype, encoder.attention)
    for layer in range(config.num_layers):
        own = {"params": _layer_params(encoder, params, layer)}
        before, within = _steps(plan, layer)
        for step in before:
            state = _before(step, state, grid)
        tables = RopeTables(*rope.tables(state.positions, config.head_width, config.rope))
        sizes = None if state.tokens.shape == patches.shape else state.sizes
        x, keys = block.apply(own, state.tokens, tables, sizes, method="attend")
        state = state._replace(tokens=x)
        for step in within:
            state = merge(state, keys, step.remove)
        state = state._replace(tokens=block.apply(own, state.tokens, method="feed"))
    tokens = encoder.apply({"params": params}, state.tokens, method="_last_norm")
    return ReducedOutput(tokens, *state[1:], pool(tokens, state.sizes))


def _before(step: MergeStatic | DropPredictable, state: Reduced, grid: Grid) -> Reduced:
    if isinstance(step, MergeStatic):
        return merge_static(state, grid, step.columns, step.segment)
    return drop_predictable(state, step.remove, step.neighbours, causal=step.causal)


def _steps(plan: Sequence[Step], layer: int) -> tuple[Plan, Plan]:
    """The steps before a layer, and those within it."""
    here = [step for step in plan if step.layer == layer]
    before = tuple(step for step in here if not isinstance(step, Merge))
    return before, tuple(step for step in here if isinstance(step, Merge))


def _layer_params(encoder: Encoder, params: Params, layer: int) -> Mapping[str, Any]:
    name = "blocks" if encoder.scan else f"blocks_{layer}"
    if name not in params:
        raise InputError(
            f"params have no {name!r}, which an encoder with scan = {encoder.scan} has; see "
            "stack_layers and unstack_layers of jvjepa.parameters"
        )
    if encoder.scan:
        return jax.tree.map(lambda stack: stack[layer], params[name])
    return params[name]


def _check_layer(step: Step) -> None:
    whole = isinstance(step.layer, int) and not isinstance(step.layer, bool)
    check(whole and step.layer >= 0, step, "layer", "a whole number, 0 or more")


def _there(tokens: int) -> str:
    return f"where there are {tokens} tokens"
