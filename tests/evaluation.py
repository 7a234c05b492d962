"""Meta's evaluation of classifiers, written down plainly to test against: clips, views, logits.

Places of clips in exact fractions, views by torch, and the classifier in NumPy, float64.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import torch

from jvjepa.config import ClassifierConfig
from jvjepa.typing import Params

_erf = np.vectorize(math.erf)


def reference_indices(total: int, num_frames: int, clips: int, step: int) -> list[list[int]]:
    """Frame by frame, in exact fractions, what section 5 of Meta's evaluation does."""

    def spread(first: int, last: int, count: int) -> list[Fraction]:
        if count == 1:
            return [Fraction(first)]
        return [first + Fraction((last - first) * i, count - 1) for i in range(count)]

    chosen = []
    for clip in range(clips):
        if total // clips > num_frames * step:
            begin = clip * (total // clips) + (total // clips - num_frames * step) // 2
            end = begin + num_frames * step
            row = [min(math.floor(x), end - 1) for x in spread(begin, end, num_frames)]
        else:
            seen = min(num_frames * step, total)
            begin = clip * ((total - seen) // (clips - 1)) if clips > 1 else 0
            row = [math.floor(x) for x in spread(0, seen - 1, (seen - 1) // step)]
            while len(row) < num_frames:
                row.append(seen - 1)
            row = [begin + max(0, min(x, seen - 2)) for x in row]
        chosen.append(row)
    return chosen


def torch_crops(frames: np.ndarray, crop: int, views: int) -> np.ndarray:
    """Float32 [M, T, crop, crop, 3], by torch's resize; equal views are there once."""
    height, width = frames.shape[1:3]
    short = crop if views > 1 else int(crop * 256 / 224)
    size = (short, int(short * width / height))
    if width < height:
        size = (int(short * height / width), short)
    images = torch.from_numpy(frames).movedim(-1, 1)
    if images.shape[2:] != size:
        how = {"mode": "bilinear", "antialias": True, "align_corners": False}
        images = torch.nn.functional.interpolate(images, size, **how)
    corners = [((size[0] - crop) // 2, (size[1] - crop) // 2)]
    if views > 1:
        steps = [i * ((max(size) - crop) // (views - 1)) for i in range(views)]
        corners = [(at, 0) if size[0] > size[1] else (0, at) for at in sorted(set(steps))]
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    cut = [images[..., y : y + crop, x : x + crop].movedim(1, -1) for y, x in corners]
    return torch.stack([(x.float() - mean * 255.0) / (std * 255.0) for x in cut]).numpy()


def reference_logits(config: ClassifierConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Float64 [labels], of tokens [N, D]."""

    def dense(x: np.ndarray, part: Any) -> np.ndarray:
        return x @ _f64(part["kernel"]) + _f64(part["bias"])

    def norm(x: np.ndarray, part: Any) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * _f64(part["scale"]) + _f64(part["bias"])

    def attend(queries: np.ndarray, x: np.ndarray, part: Any) -> np.ndarray:
        q, k, v = (
            np.split(dense(y, part[name]), config.num_heads, axis=-1)
            for y, name in ((queries, "query"), (x, "key"), (x, "value"))
        )
        scores = [a @ b.T / math.sqrt(a.shape[-1]) for a, b in zip(q, k, strict=True)]
        weights = [np.exp(x - x.max(-1, keepdims=True)) for x in scores]
        heads = [w / w.sum(-1, keepdims=True) @ x for w, x in zip(weights, v, strict=True)]
        return np.concatenate(heads, axis=-1)

    def mlp(x: np.ndarray, part: Any) -> np.ndarray:
        x = dense(x, part["fc1"])
        return dense(0.5 * x * (1 + _erf(x / math.sqrt(2))), part["fc2"])

    x, pooler = _f64(tokens), params["pooler"]
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], pooler["blocks"])
        y = norm(x, block["norm1"])
        x = x + dense(attend(y, y, block["attention"]), block["attention"]["proj"])
        x = x + mlp(norm(x, block["norm2"]), block["mlp"])
    cross = pooler["cross_attention"]
    query = _f64(pooler["query_tokens"])
    query = query + attend(query, norm(x, cross["norm1"]), cross["attention"])
    query = query + mlp(norm(query, cross["norm2"]), cross["mlp"])
    return dense(query, params["linear"])[0]


def _f64(x: object) -> np.ndarray:
    return np.asarray(x, np.float64)
