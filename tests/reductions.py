"""Token reduction once more in plain NumPy, float64, one token at a time, to test against.

A token is what it is, and the list of the clip's tokens that it stands for; attention to it is
attention to as many copies.
"""

import dataclasses
import math

import numpy as np
from models import relative_error
from reference import _dense, _erf, _f64, _layer, _layer_norm

from jvjepa import EncoderConfig
from jvjepa.reduced import Reduced
from jvjepa.reduction import DropPredictable, Merge, MergeStatic, ReducedOutput, Step


@dataclasses.dataclass
class Token:
    value: np.ndarray  # [D]
    position: np.ndarray  # [3]
    stands_for: list[int]


def tokens_of(values: np.ndarray, positions: np.ndarray) -> list[Token]:
    pairs = zip(_f64(values), _f64(positions), strict=True)
    return [Token(value, position, [i]) for i, (value, position) in enumerate(pairs)]


def check_equal(state: Reduced | ReducedOutput, expected: list[list[Token]]) -> None:
    for clip, tokens in enumerate(expected):
        assert relative_error(state.tokens[clip], [t.value for t in tokens]) <= 1e-5
        assert relative_error(state.positions[clip], [t.position for t in tokens]) <= 1e-5
        assert state.sizes[clip].tolist() == [len(t.stands_for) for t in tokens]
        for place, token in enumerate(tokens):
            assert np.flatnonzero(state.source[clip] == place).tolist() == sorted(token.stands_for)


def mean_of(tokens: list[Token]) -> Token:
    sizes = [len(token.stands_for) for token in tokens]
    value = sum(n * token.value for n, token in zip(sizes, tokens, strict=True)) / sum(sizes)
    position = sum(n * token.position for n, token in zip(sizes, tokens, strict=True)) / sum(sizes)
    return Token(value, position, [i for token in tokens for i in token.stands_for])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def merge(tokens: list[Token], metric: np.ndarray, remove: int) -> list[Token]:
    metric = _f64(metric)
    found = []
    for a in range(0, len(tokens), 2):
        cosines = {b: cosine(metric[a], metric[b]) for b in range(1, len(tokens), 2)}
        match = max(cosines, key=cosines.__getitem__)
        found.append((-cosines[match], a, match))
    into: dict[int, list[int]] = {}
    for _, a, match in sorted(found)[:remove]:
        into.setdefault(match, []).append(a)
    going = {a for group in into.values() for a in group}
    kept = [i for i in range(len(tokens)) if i not in going]
    return [mean_of([tokens[i], *(tokens[a] for a in into.get(i, []))]) for i in kept]


def merge_static(
    tokens: list[Token], grid: tuple[int, int, int], columns: int, segment: int
) -> list[Token]:
    tubelets, patches = grid[0], grid[1] * grid[2]
    found = []
    for first in range(0, tubelets, segment):
        for patch in range(patches):
            ids = [(first + i) * patches + patch for i in range(segment)]
            pairs = [(i, j) for i in ids for j in ids if i < j]
            score = np.mean([cosine(tokens[i].value, tokens[j].value) for i, j in pairs])
            found.append((-score, ids))
    merged = {ids[0]: ids for _, ids in sorted(found)[:columns]}
    going = {i for ids in merged.values() for i in ids[1:]}
    kept = [i for i in range(len(tokens)) if i not in going]
    return [mean_of([tokens[j] for j in merged.get(i, [i])]) for i in kept]


def novelty(values: np.ndarray, neighbours: int, causal: bool) -> list[float]:
    scores = []
    for i, value in enumerate(values):
        others = [j for j in range(len(values)) if (j < i if causal else j != i)]
        near = sorted(others, key=lambda j: -cosine(value, values[j]))[:neighbours]
        weights = np.array([max(cosine(value, values[j]), 0.0) for j in near])
        weights = weights / (weights.sum() + 1e-6)
        predicted = sum(w * values[j] for w, j in zip(weights, near, strict=True))
        scores.append(float(np.mean((value - predicted) ** 2)) if others else math.inf)
    return scores


def drop_predictable(
    tokens: list[Token], remove: int, neighbours: int, causal: bool
) -> list[Token]:
    scores = novelty(np.stack([token.value for token in tokens]), neighbours, causal)
    going = sorted(range(len(tokens)), key=lambda i: scores[i])[:remove]
    kept = {i: dataclasses.replace(t) for i, t in enumerate(tokens) if i not in going}
    for i in going:
        nearest = max(kept, key=lambda j: cosine(tokens[i].value, tokens[j].value))
        kept[nearest].stands_for = kept[nearest].stands_for + tokens[i].stands_for
    return list(kept.values())


def encode(
    config: EncoderConfig,
    params: dict,
    patches: np.ndarray,
    grid: tuple[int, int, int],
    plan: tuple[Step, ...],
) -> tuple[list[Token], np.ndarray]:
    """Takes one clip's patch tokens [N, D] to the tokens that are left, and their embedding."""
    scales = [1.0, 1.0, 1.0]
    if config.interpolate:
        scales[1:] = [15 / (side - 1) for side in grid[1:]]
    places = [np.array(scales) * place for place in np.ndindex(*grid)]
    tokens = tokens_of(patches, np.stack(places))
    for layer in range(config.num_layers):
        for step in (step for step in plan if step.layer == layer):
            if isinstance(step, MergeStatic):
                tokens = merge_static(tokens, grid, step.columns, step.segment)
            if isinstance(step, DropPredictable):
                tokens = drop_predictable(tokens, step.remove, step.neighbours, step.causal)
        p = {name: _layer(leaf, layer) for name, leaf in params["blocks"].items()}
        x = np.stack([token.value for token in tokens])
        y = _layer_norm(x, p["norm1"]["scale"], p["norm1"]["bias"], config)
        q, k, v = (_dense(y, p["attention"][name]) for name in ("query", "key", "value"))
        metric = k.reshape(len(k), config.num_heads, -1).mean(1)
        x = x + _dense(_attend(q, k, v, tokens, config), p["attention"]["proj"])
        tokens = [dataclasses.replace(t, value=value) for t, value in zip(tokens, x, strict=True)]
        for step in (step for step in plan if step.layer == layer and isinstance(step, Merge)):
            tokens = merge(tokens, metric, step.remove)
        x = np.stack([token.value for token in tokens])
        y = _layer_norm(x, p["norm2"]["scale"], p["norm2"]["bias"], config)
        y = _dense(y, p["mlp"]["fc1"])
        x = x + _dense(0.5 * y * (1 + _erf(y / math.sqrt(2))), p["mlp"]["fc2"])
        tokens = [dataclasses.replace(t, value=value) for t, value in zip(tokens, x, strict=True)]
    norm = params["norm"] if "norm" in params else {k: n[-1] for k, n in params["norms"].items()}
    x = _layer_norm(x, norm["scale"], norm["bias"], config)
    tokens = [dataclasses.replace(t, value=value) for t, value in zip(tokens, x, strict=True)]
    copies = [token.value for token in tokens for _ in token.stands_for]
    return tokens, np.mean(copies, axis=0)


def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, tokens: list[Token], config: EncoderConfig
) -> np.ndarray:
    copies = [i for i, token in enumerate(tokens) for _ in token.stands_for]
    out = np.zeros_like(q)
    for h in range(config.num_heads):
        part = slice(h * config.head_width, (h + 1) * config.head_width)
        queries, keys = (
            np.stack(
                [_rotate(x[i, part], token.position, config) for i, token in enumerate(tokens)]
            )
            for x in (q, k)
        )
        scores = queries @ keys[copies].T / math.sqrt(config.head_width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, part] = weights / weights.sum(-1, keepdims=True) @ v[copies][:, part]
    return out


def _rotate(x: np.ndarray, position: np.ndarray, config: EncoderConfig) -> np.ndarray:
    axis = 2 * ((len(x) // 3) // 2)
    out = x.copy()
    for which, place in enumerate(position):
        for i in range(axis):
            turn = i % (axis // 2) if config.rope == "tiled" else i // 2
            angle = place * 10000.0 ** (-turn / (axis / 2))
            here = which * axis + i
            partner = -x[here + 1] if i % 2 == 0 else x[here - 1]
            out[here] = x[here] * math.cos(angle) + partner * math.sin(angle)
    return out
