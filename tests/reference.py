"""V-JEPA 2 written down once more in plain NumPy, float64, loops and all, to test against.

It follows the published formulas, not this library's code: rotary angles channel by channel, keys
in a list per layer, one softmax a head.
"""

import math

import numpy as np

from jvjepa import EncoderConfig

_erf = np.vectorize(math.erf)


class ReferenceStream:
    """One stream, one tubelet at a time, with a growing list cut to the window."""

    def __init__(
        self,
        config: EncoderConfig,
        params: dict,
        window: int,
        positions: str,
        final_norm: bool = True,
    ) -> None:
        self.config, self.params = config, params
        self.window, self.positions, self.final_norm = window, positions, final_norm
        self.cache: list[list[tuple[np.ndarray, np.ndarray]]] = [
            [] for _ in range(config.num_layers)
        ]
        self.time = 0

    def step(self, tubelet: np.ndarray) -> np.ndarray:
        """Takes [2, H, W, 3] to tokens [S, D]."""
        config = self.config
        rows, columns = (side // config.patch_size for side in tubelet.shape[1:3])
        x = _patches(tubelet, config) @ _f64(self.params["patch_embed"]["kernel"])
        x = x + _f64(self.params["patch_embed"]["bias"])
        for layer in range(config.num_layers):
            x = self._block(x, layer, rows, columns)
        self.time += 1
        norm = self.params["norm"]
        return _layer_norm(x, norm["scale"], norm["bias"], config) if self.final_norm else x

    def _block(self, x: np.ndarray, layer: int, rows: int, columns: int) -> np.ndarray:
        p = {name: _layer(self.params["blocks"][name], layer) for name in self.params["blocks"]}
        y = _layer_norm(x, p["norm1"]["scale"], p["norm1"]["bias"], self.config)
        q, k, v = (_dense(y, p["attention"][name]) for name in ("query", "key", "value"))
        kept = self.cache[layer]
        kept.append((k, v))
        del kept[: -self.window]
        oldest = self.time - len(kept) + 1
        first = 0 if self.positions == "window" else oldest
        keys = np.concatenate(
            [_rotate(k, first + i, rows, columns, self.config) for i, (k, _) in enumerate(kept)]
        )
        values = np.concatenate([v for _, v in kept])
        q = _rotate(q, first + len(kept) - 1, rows, columns, self.config)
        x = x + _dense(_attend(q, keys, values, self.config), p["attention"]["proj"])
        y = _layer_norm(x, p["norm2"]["scale"], p["norm2"]["bias"], self.config)
        y = _dense(y, p["mlp"]["fc1"])
        return x + _dense(0.5 * y * (1 + _erf(y / math.sqrt(2))), p["mlp"]["fc2"])


def _f64(x: object) -> np.ndarray:
    return np.asarray(x, np.float64)


def _layer(tree: dict, layer: int) -> dict:
    return {
        name: _layer(leaf, layer) if isinstance(leaf, dict) else _f64(leaf)[layer]
        for name, leaf in tree.items()
    }


def _dense(x: np.ndarray, p: dict) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def _layer_norm(x: np.ndarray, scale: object, bias: object, config: EncoderConfig) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
    return x * _f64(scale) + _f64(bias)


def _patches(tubelet: np.ndarray, config: EncoderConfig) -> np.ndarray:
    p = config.patch_size
    rows, columns = tubelet.shape[1] // p, tubelet.shape[2] // p
    return np.stack(
        [
            _f64(tubelet[:, r * p : (r + 1) * p, c * p : (c + 1) * p]).ravel()
            for r in range(rows)
            for c in range(columns)
        ]
    )


def _rotate(
    x: np.ndarray, frame: int, rows: int, columns: int, config: EncoderConfig
) -> np.ndarray:
    """Tiled rotary embedding of [S, D], channel by channel."""
    width = config.head_width
    axis = 2 * ((width // 3) // 2)
    heads = x.reshape(rows, columns, config.num_heads, width)
    out = heads.copy()
    for r in range(rows):
        for c in range(columns):
            for which, place in enumerate((frame, r, c)):
                for i in range(axis):
                    omega = 10000.0 ** (-(i % (axis // 2)) / (axis / 2))  # tiled: i, not i // 2
                    here = which * axis + i
                    partner = -heads[r, c, :, here + 1] if i % 2 == 0 else heads[r, c, :, here - 1]
                    cos, sin = math.cos(place * omega), math.sin(place * omega)
                    out[r, c, :, here] = heads[r, c, :, here] * cos + partner * sin
    return out.reshape(x.shape)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, config: EncoderConfig) -> np.ndarray:
    out = np.zeros_like(q)
    for h in range(config.num_heads):
        part = slice(h * config.head_width, (h + 1) * config.head_width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(config.head_width)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
    return out
