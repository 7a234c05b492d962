"""The action-conditioned predictor of V-JEPA 2-AC: from frames, actions and states to next frames.

Reference: `VisionTransformerPredictorAC` of Meta's V-JEPA 2 (`src/models/ac_predictor.py`,
`src/models/utils/modules.py`) and, for the frames, `app/vjepa_droid/train.py`; the paper is
arXiv:2506.09985, section 4.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from jvjepa import rope
from jvjepa.attention import Backend, check_backend
from jvjepa.config import ActionPredictorConfig, EncoderConfig
from jvjepa.dense import Dense
from jvjepa.encoder import Encoder, banded_causal_mask
from jvjepa.errors import InputError
from jvjepa.layers import LayerNorm, RopeTables, make_blocks, normalize, run_blocks
from jvjepa.typing import Array, DType, Params

_CONDITIONS = 2  # tokens before those of a frame: its action, and its state
_FRAME_EPSILON = 1e-5


class ActionPredictor(nn.Module):
    """Predicts, for each frame of a clip, the tokens of the frame after its action.

    A frame is a sequence of its action, its state and its S patches. A token sees those of its own
    frame and of all before.

    Args:
        config: the architecture.
        encoder: that of the encoder whose tokens it takes.
        dtype: as the encoder's.
        param_dtype: as the encoder's.
        attention: as the encoder's.
        scan: as the encoder's.
    """

    config: ActionPredictorConfig
    encoder: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.embed = Dense(config.hidden_size, *dtypes)
        self.action = Dense(config.hidden_size, *dtypes)
        self.state = Dense(config.hidden_size, *dtypes)
        self.blocks = make_blocks(
            config.block, config.num_layers, dtypes, self.attention, scan=self.scan
        )
        self.norm = LayerNorm(config.layer_norm_eps, *dtypes)
        self.proj = Dense(self.encoder.hidden_size, *dtypes)

    def __call__(
        self, tokens: Array, actions: Array, states: Array, grid: tuple[int, int]
    ) -> Array:
        """Predicts the frame after each of t frames.

        Args:
            tokens: float [B, t·S, D], the frames, from `encode_frames` or an earlier prediction
                through `layers.normalize`. t may be any number; Meta's code takes up to 32.
            actions: float [B, t, 7], what is done in each frame: Δposition in metres, Δrotation as
                Euler angles "xyz", Δclosedness of the gripper.
            states: float [B, t, 7], the robot's hand in each frame: position in metres, rotation as
                Euler angles "xyz", closedness of the gripper.
            grid: (rows, columns) of a frame's tokens, S = rows·columns. Positions are scaled to the
                encoder's grid, a row by `config_grid`/rows and a column by `config_grid`/columns.

        Returns:
            [B, t·S, D]. The S tokens of frame i are those of frame i+1; unlike the input they are
            not normalised.

        Raises:
            InputError: the shape or dtype of an argument cannot be right.
        """
        self._check(tokens, actions, states, grid)
        frames = actions.shape[1]
        conditions = jnp.stack([self.action(actions), self.state(states)], axis=2)
        patches = rearrange(self.embed(tokens), "b (t s) d -> b t s d", t=frames)
        x = jnp.concatenate([conditions, patches], axis=2)  # [B, t, 2+S, P]
        # Compared inside of jit: as a constant, the mask of 32 frames of 256 tokens would put 68 MB
        # into the program.
        frame = jnp.arange(frames * x.shape[2])[None] // x.shape[2]
        mask = banded_causal_mask(frame, window=frames)
        x = rearrange(x, "b t s d -> b (t s) d")
        x = run_blocks(self.blocks, x, self._tables(frames, grid), mask)
        x = rearrange(x, "b (t s) d -> b t s d", t=frames)[:, :, _CONDITIONS:]
        return self.proj(self.norm(rearrange(x, "b t s d -> b (t s) d")))

    def _tables(self, frames: int, grid: tuple[int, int]) -> RopeTables:
        rows, columns = grid
        scales = (self.encoder.config_grid / side for side in grid)
        ids = jnp.arange(frames * rows * columns)
        places = rope.positions(ids, rope.Layout(rows, columns, *scales))
        # The conditions are where the first patch of their frame is, at row and column 0.
        places = places.reshape(1, frames, rows * columns, 3)
        places = jnp.pad(places, ((0, 0), (0, 0), (_CONDITIONS, 0), (0, 0)), mode="edge")
        width, variant = self.config.block.head_width, self.encoder.rope
        return RopeTables(*rope.tables(places.reshape(1, -1, 3), width, variant))

    def _check(self, tokens: Array, actions: Array, states: Array, grid: tuple[int, int]) -> None:
        if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
            raise InputError(f"grid = {grid}; it must be (rows, columns), whole numbers above 0")
        given = {"tokens": tokens, "actions": actions, "states": states}
        for name, x in given.items():
            if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
                right = "[B, t·S, D]" if name == "tokens" else f"[B, t, {self.config.action_dim}]"
                raise InputError(f"{name} is {x.dtype} {list(x.shape)}; it must be float {right}")
        batch, length, width = tokens.shape
        if width != self.encoder.hidden_size:
            raise InputError(
                f"tokens has {width} channels; this predictor takes {self.encoder.hidden_size}, "
                "its encoder's width (mixed parts?)"
            )
        unit = grid[0] * grid[1]
        if length == 0 or length % unit:
            right = f"a multiple of {unit}, what a frame of {grid[0]} by {grid[1]} has"
            raise InputError(f"tokens has {length} tokens a clip; it must be {right}")
        shape = (batch, length // unit, self.config.action_dim)
        for name in ("actions", "states"):
            if given[name].shape != shape:
                right = f"{list(shape)}: {shape[2]} numbers for each frame of tokens"
                raise InputError(f"{name} is {list(given[name].shape)}; it must be {right}")


def encode_frames(encoder: Encoder, params: Params, frames: Array) -> Array:
    """Encodes every frame on its own, as V-JEPA 2-AC takes them.

    Each is encoded as a clip of one frame (which V-JEPA 2 uses twice), and its tokens are
    normalised once more, without parameters.

    Args:
        encoder: the encoder.
        params: its parameters, `model.params["encoder"]`.
        frames: float [B, t, H, W, 3], ImageNet-normalised.

    Returns:
        float32 [B, t·S, D].

    Raises:
        InputError: the encoder cannot take such frames.
    """
    if frames.ndim != 5:
        shape = list(frames.shape)
        raise InputError(f"frames has shape {shape}; it must be [B, t, H, W, 3]")
    clips = frames.reshape(-1, 1, *frames.shape[2:])
    tokens = normalize(encoder.apply({"params": params}, clips), _FRAME_EPSILON)
    return tokens.reshape(frames.shape[0], -1, tokens.shape[-1])
