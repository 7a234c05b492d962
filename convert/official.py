"""Meta's V-JEPA 2, 2.1, 2-AC and probes in plain PyTorch, to hold converted weights against.

It runs on the tensors as Meta names and lays them out, and shares no code with this library's own
modules, so that a mistake of one does not hide behind the same mistake of the other. Importing this
imports torch.

Reference: `src/models` (`vision_transformer.py`, `predictor.py`, `ac_predictor.py`,
`attentive_pooler.py`, `utils/modules.py`) and `app/vjepa_2_1/models` of facebookresearch/vjepa2.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from jvjepa.config import (
    ActionPredictorConfig,
    AnticipatorConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
    Rope,
    RopeGrid,
)
from jvjepa.errors import CheckpointError, InputError

Floats = NDArray[np.float32]
Ids = NDArray[np.integer[Any]]
_Probe = ClassifierConfig | AnticipatorConfig
_WithBlocks = EncoderConfig | PredictorConfig | ActionPredictorConfig | _Probe
_Rotation = tuple[Tensor, Tensor]  # cosines and sines, [B or 1, 1, N, rotated channels]
_T = TypeVar("_T")

_ROUNDINGS = ("float32", "bfloat16")
_MODALITIES = {"video": "video_mod_embed", "image": "img_mod_embed"}
_PRETRAINED_PIXELS = 256  # to whose grid `interpolate` scales positions
_CONDITIONS = 2  # tokens before those of a frame in 2-AC: its action and its state


class Official:
    """Meta's models, from and to NumPy, in float32 on the CPU.

    Its methods raise InputError where the model has no such part or an argument does not fit it,
    and CheckpointError where a weight is missing.

    Args:
        config: the architecture: attention heads, layers, and how tokens are placed. Other sizes
            are those of the tensors.
        weights: Meta's state dicts by part ("encoder", "predictor", "classifier", "anticipator",
            "action_predictor"), without "module." and "backbone." in the names. Tensors may be
            mapped from a file: each is converted when it is used, and not kept.
        rounding: "bfloat16" rounds every weight to bfloat16 first; the computation stays float32.

    Raises:
        InputError: the rounding is unknown.
    """

    name = "a PyTorch port of Meta's code"

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Mapping[str, Tensor]], *, rounding: str
    ) -> None:
        """Reads no tensor yet."""
        if rounding not in _ROUNDINGS:
            raise InputError(f"rounding = {rounding!r}; it must be one of {_ROUNDINGS}")
        self._config, self._weights, self._rounding = config, weights, rounding

    @property
    def rope_grid(self) -> RopeGrid:
        """Where the encoder takes positions from, as its configuration says."""
        return self._config.encoder.rope_grid

    @torch.inference_mode()
    def tokens(self, video: Floats) -> Floats:
        """Encodes float32 [B, T, H, W, 3] to [B, N, D], after the (last) norm."""
        return self._levels(video, None)[-1].numpy()

    @torch.inference_mode()
    def masked(self, video: Floats, keep: Ids) -> Floats:
        """Encodes only the tokens `keep`, int [B, M], dropping the rest before the first block.

        Args:
            video: as for `tokens`.
            keep: ids within [0, N).

        Returns:
            float32 [B, M, D], after the (last) norm, in the order of `keep`.
        """
        return self._levels(video, keep)[-1].numpy()

    @torch.inference_mode()
    def layers(self, video: Floats) -> Floats:
        """Encodes video to [L+1, B, N, D]: patch tokens, then what each block gives, un-normed.

        The patch tokens hold the embedding of the modality.
        """
        outputs = _encode(self._part("encoder"), self._config.encoder, video, None)
        return torch.stack(list(outputs)).numpy()

    @torch.inference_mode()
    def levels(self, video: Floats, keep: Ids | None = None) -> Floats:
        """Encodes video to [n, B, N, D]: what each of the levels' layers gives, after its norm.

        Args:
            video: as for `tokens`.
            keep: as for `masked`; None keeps all tokens.

        Returns:
            float32 [n, B, N or M, D]; n = 1 for V-JEPA 2, whose one norm is after the last layer.
        """
        return torch.stack(self._levels(video, keep)).numpy()

    @torch.inference_mode()
    def predict(
        self,
        context: Floats,
        context_ids: Ids,
        target_ids: Ids,
        grid: tuple[int, int, int],
        mask_index: int = 1,
        modality: str = "video",
    ) -> tuple[Floats, Floats | None]:
        """Predicts hidden tokens from seen ones.

        Args:
            context: float32 [B, M, n·D], the encoder's tokens, levels one after the other in the
                channels.
            context_ids: int [B, M], their ids within [0, t·h·w).
            target_ids: int [B, K], the ids to predict.
            grid: (t, h, w), the tubelets, rows and columns of the clip's tokens.
            mask_index: which mask token stands in for what is hidden.
            modality: "video" or "image"; V-JEPA 2 makes no difference.

        Returns:
            targets: float32 [B, K, O].
            context: float32 [B, M, O], the seen tokens through a projection of their own; None
                where there is none.
        """
        config = _given(self._config.predictor, "predictor")
        weights, encoder = self._part("predictor"), self._config.encoder
        if modality not in _MODALITIES:
            raise InputError(f"modality = {modality!r}; it must be one of {tuple(_MODALITIES)}")
        seen = _floats("context", context, None, None, config.num_levels * encoder.hidden_size)
        batch, num_seen = seen.shape[:2]
        tubelets, rows, columns = grid
        num_tokens = tubelets * rows * columns
        seen_ids = _ids("context_ids", context_ids, num_tokens, batch, num_seen)
        hidden_ids = _ids("target_ids", target_ids, num_tokens, batch, None)
        hidden = weights[f"mask_tokens.{mask_index}"].expand(*hidden_ids.shape, -1)
        x = torch.cat([_embed_context(weights, config, seen), hidden], dim=1)
        if config.modality_embeddings:
            x = x + weights[_MODALITIES[modality]]
        # Theirs sorts the tokens by id and back, which changes nothing: each sees all others.
        places = _places(torch.cat([seen_ids, hidden_ids], dim=1), rows, columns, encoder, config)
        rotation = _rotation(places, config.block.head_width, config.rope)
        for i in range(config.num_layers):
            x = _block(weights, f"predictor_blocks.{i}", x, config, rotation)
        x = _norm(weights, "predictor_norm", x, config.layer_norm_eps)
        targets = _linear(weights, "predictor_proj", x[:, num_seen:]).numpy()
        if not config.context_projection:
            return targets, None
        return targets, _linear(weights, "predictor_proj_context", x[:, :num_seen]).numpy()

    @torch.inference_mode()
    def classify(self, tokens: Floats) -> Floats:
        """Maps tokens, float32 [B, N, D], to logits [B, classes] by the attentive probe.

        A probe that sees several clips or layers takes their tokens one after the other.
        """
        config = _given(self._config.classifier, "classifier")
        x = _floats("tokens", tokens, None, None, self._config.encoder.hidden_size)
        weights = self._part("classifier")
        return _linear(weights, "linear", _pool(weights, config, x)[:, 0]).numpy()

    @torch.inference_mode()
    def action_logits(self, tokens: Floats) -> dict[str, Floats]:
        """Maps tokens, float32 [B, N, D], to the logits of each head of an anticipation probe.

        Returns:
            float32 [B, classes] by kind: verbs, nouns and actions, or actions alone.
        """
        config = _given(self._config.anticipator, "anticipator")
        x = _floats("tokens", tokens, None, None, self._config.encoder.hidden_size)
        weights = self._part("anticipator")
        pooled = _pool(weights, config, x).unbind(1)  # a query for each kind
        kinds = ("verbs", "nouns", "actions") if config.verbs else ("actions",)
        return {
            kind: _linear(weights, f"{kind.removesuffix('s')}_classifier", each).numpy()
            for kind, each in zip(kinds, pooled, strict=True)
        }

    @torch.inference_mode()
    def anticipate(
        self, video: Floats, seconds: NDArray[np.floating[Any]], num_steps: int = 1
    ) -> dict[str, Floats]:
        """Says what happens some time after a clip, by Meta's `AnticipativeWrapper` and probe.

        Args:
            video: as for `tokens`.
            seconds: float [B], how long after each clip.
            num_steps: how often the predictor runs; its output replaces the oldest tokens.

        Returns:
            As `action_logits`.
        """
        config = _given(self._config.anticipator, "anticipator")
        predictor, encoder = _given(self._config.predictor, "predictor"), self._config.encoder
        x = np.concatenate(self.levels(video)[-predictor.num_levels :], axis=-1)
        batch, count, _ = x.shape
        rows, columns = (side // encoder.patch_size for side in video.shape[2:4])
        size = rows * columns
        rate = config.frames_per_second
        skipped = (torch.from_numpy(seconds) * rate / encoder.tubelet_size).to(torch.int64)
        output_frames = max(config.output_frames, encoder.tubelet_size)
        num_hidden = size * (output_frames // encoder.tubelet_size)
        seen_ids = np.tile(np.arange(count), (batch, 1))
        hidden_ids = count + size * skipped[:, None].numpy() + np.arange(num_hidden)
        grid = (int(hidden_ids.max()) // size + 1, rows, columns)
        found = [x]
        for _ in range(num_steps):
            mask_index = 1 % predictor.num_mask_tokens
            hidden, _ = self.predict(x, seen_ids, hidden_ids, grid, mask_index)
            found.append(hidden)
            x = np.concatenate([x[:, num_hidden:], hidden], axis=1)
        return self.action_logits(np.concatenate(found, axis=1)[..., -encoder.hidden_size :])

    @torch.inference_mode()
    def next_tokens(
        self, tokens: Floats, actions: Floats, states: Floats, grid: tuple[int, int]
    ) -> Floats:
        """Predicts, for each of t frames, the tokens of the frame after it, as V-JEPA 2-AC does.

        Args:
            tokens: float32 [B, t·S, D], the frames' normalised tokens.
            actions: float32 [B, t, 7].
            states: float32 [B, t, 7].
            grid: (rows, columns) of a frame's tokens, S = rows·columns.

        Returns:
            float32 [B, t·S, D].
        """
        config = _given(self._config.action_predictor, "action_predictor")
        weights, encoder = self._part("action_predictor"), self._config.encoder
        action = _floats("actions", actions, None, None, config.action_dim)
        batch, frames, numbers = action.shape
        state = _floats("states", states, batch, frames, numbers)
        size = grid[0] * grid[1]
        x = _floats("tokens", tokens, batch, frames * size, encoder.hidden_size)
        sequence = [
            _linear(weights, "action_encoder", action).unsqueeze(2),
            _linear(weights, "state_encoder", state).unsqueeze(2),
            _linear(weights, "predictor_embed", x).unflatten(1, (frames, size)),
        ]
        x = torch.cat(sequence, dim=2).flatten(1, 2)  # [B, t·(2+S), P]
        places = _frame_places(frames, grid, encoder.config_grid)
        rotation = _rotation(places, config.block.head_width, "tiled")
        frame = torch.arange(frames).repeat_interleave(_CONDITIONS + size)
        sees = frame[:, None] >= frame
        for i in range(config.num_layers):
            x = _block(weights, f"predictor_blocks.{i}", x, config, rotation, sees)
        x = x.unflatten(1, (frames, -1))[:, :, _CONDITIONS:].flatten(1, 2)
        x = _norm(weights, "predictor_norm", x, config.layer_norm_eps)
        return _linear(weights, "predictor_proj", x).numpy()

    def _part(self, name: str) -> "_StateDict":
        return _StateDict(name, self._weights.get(name, {}), self._rounding)

    def _levels(self, video: Floats, keep: Ids | None) -> list[Tensor]:
        weights, config = self._part("encoder"), self._config.encoder
        norms = {layer: f"norms_block.{i}" for i, layer in enumerate(config.levels)}
        norms = norms or {config.num_layers - 1: "norm"}
        return [
            _norm(weights, norms[layer], x, config.layer_norm_eps)
            for layer, x in enumerate(_encode(weights, config, video, keep), start=-1)
            if layer in norms
        ]


class _StateDict:
    """Meta's tensors of one part, each made float32 when it is asked for.

    Args:
        part: what the part is called.
        tensors: by Meta's name.
        rounding: as in `Official`.
    """

    def __init__(self, part: str, tensors: Mapping[str, Tensor], rounding: str) -> None:
        self._part, self._tensors, self._rounding = part, tensors, rounding

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor = self._tensors[name]
        except KeyError:
            message = f"the original's {self._part} has no weight {name!r}"
            raise CheckpointError(message) from None
        if self._rounding == "bfloat16":
            tensor = tensor.to(torch.bfloat16)
        return tensor.to(torch.float32)


def _encode(
    weights: _StateDict, config: EncoderConfig, video: Floats, keep: Ids | None
) -> Iterator[Tensor]:
    """Yields the patch tokens, then what each block gives."""
    pixels = _floats("video", video, None, None, None, None, 3).permute(0, 4, 1, 2, 3)
    is_single = pixels.shape[2] == 1
    if is_single and not config.image_tokenizer:
        pixels = pixels.expand(-1, -1, config.tubelet_size, -1, -1)
    is_image = is_single and config.image_tokenizer
    x = _patches(weights, "patch_embed_img.proj" if is_image else "patch_embed.proj", pixels)
    rows, columns = x.shape[3:]
    x = x.flatten(2).transpose(1, 2)  # [B, N, D]
    if config.image_tokenizer:
        x = x + weights[_MODALITIES["image" if is_image else "video"]]
    ids = torch.arange(x.shape[1])[None]
    if keep is not None:
        ids = _ids("keep", keep, x.shape[1], x.shape[0], None)
        x = torch.take_along_dim(x, ids[..., None], dim=1)
    places = _places(ids, rows, columns, config, config)
    rotation = _rotation(places, config.head_width, config.rope)
    yield x
    for i in range(config.num_layers):
        x = _block(weights, f"blocks.{i}", x, config, rotation)
        yield x


def _patches(weights: _StateDict, name: str, pixels: Tensor) -> Tensor:
    """Embeds [B, 3, T, H, W] to [B, D, t, h, w]."""
    kernel = weights[f"{name}.weight"]
    steps = kernel.shape[2:]
    for axis, size, step in zip("THW", pixels.shape[2:], steps, strict=True):
        if size == 0 or size % step:  # the convolution would leave out what is over
            raise InputError(f"video has {axis} = {size}; it must be a multiple of {step}")
    return F.conv3d(pixels, kernel, weights[f"{name}.bias"], stride=tuple(steps))


def _embed_context(weights: _StateDict, config: PredictorConfig, context: Tensor) -> Tensor:
    if config.num_levels == 1:
        return _linear(weights, "predictor_embed", context)
    x = F.gelu(_linear(weights, "predictor_embed.0", context))
    return _linear(weights, "predictor_embed.2", x)


def _pool(weights: _StateDict, config: _Probe, x: Tensor) -> Tensor:
    """Pools [B, N, D] to [B, n, D]. Queries are not normed, what they see is not projected."""
    for i in range(config.num_layers):
        x = _block(weights, f"pooler.blocks.{i}", x, config)
    name, eps = "pooler.cross_attention_block", config.layer_norm_eps
    query = weights["pooler.query_tokens"].expand(x.shape[0], -1, -1)
    q = _linear(weights, f"{name}.xattn.q", query)
    x = _norm(weights, f"{name}.norm1", x, eps)
    k, v = _linear(weights, f"{name}.xattn.kv", x).chunk(2, dim=-1)
    pooled = query + _attend(*(_heads(part, config.num_heads) for part in (q, k, v)))
    return pooled + _mlp(weights, f"{name}.mlp", _norm(weights, f"{name}.norm2", pooled, eps))


def _block(
    weights: _StateDict,
    name: str,
    x: Tensor,
    config: _WithBlocks,
    rotation: _Rotation | None = None,
    sees: Tensor | None = None,
) -> Tensor:
    y = _norm(weights, f"{name}.norm1", x, config.layer_norm_eps)
    q, k, v = _linear(weights, f"{name}.attn.qkv", y).chunk(3, dim=-1)
    q, k, v = (_heads(part, config.num_heads) for part in (q, k, v))
    if rotation is not None:
        q, k = _rotate(q, rotation), _rotate(k, rotation)
    x = x + _linear(weights, f"{name}.attn.proj", _attend(q, k, v, sees))
    y = _norm(weights, f"{name}.norm2", x, config.layer_norm_eps)
    return x + _mlp(weights, f"{name}.mlp", y)


def _mlp(weights: _StateDict, name: str, x: Tensor) -> Tensor:
    return _linear(weights, f"{name}.fc2", F.gelu(_linear(weights, f"{name}.fc1", x)))


def _linear(weights: _StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: _StateDict, name: str, x: Tensor, eps: float) -> Tensor:
    scale = weights[f"{name}.weight"]
    return F.layer_norm(x, scale.shape, scale, weights[f"{name}.bias"], eps)


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, N, D] to [B, H, N, K]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None) -> Tensor:
    """[B, H, N, K] of each to [B, N, D]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)


def _places(
    ids: Tensor,
    rows: int,
    columns: int,
    encoder: EncoderConfig,
    part: EncoderConfig | PredictorConfig,
) -> Tensor:
    """The place on each axis, float [B or 1, N, 3], of the tokens of a grid as a part sees it."""
    if part.rope_grid == "config":
        rows = columns = encoder.config_grid
    frame, in_frame = ids // (rows * columns), ids % (rows * columns)
    places = torch.stack([frame, in_frame // columns, in_frame % columns], dim=-1).float()
    if part.interpolate:
        last = _PRETRAINED_PIXELS // encoder.patch_size - 1
        # The one row or column of a side of 1 is at 0, where theirs divides 0 by 0.
        ends = torch.tensor([1, max(rows - 1, 1), max(columns - 1, 1)])
        places = places * torch.tensor([1, last, last]) / ends
    return places


def _frame_places(frames: int, grid: tuple[int, int], side: int) -> Tensor:
    """The same for 2-AC, float [1, t·(2+S), 3]: a grid is stretched to a square of `side`."""
    rows, columns = grid
    patches = torch.cartesian_prod(
        torch.arange(frames).float(),
        torch.arange(rows) * side / rows,
        torch.arange(columns) * side / columns,
    ).view(frames, rows * columns, 3)
    # Conditions have a time alone, which is to be at row and column 0.
    conditions = patches[:, :1].expand(-1, _CONDITIONS, -1)
    return torch.cat([conditions, patches], dim=1).flatten(0, 1)[None]


def _rotation(places: Tensor, head_width: int, rope: Rope) -> _Rotation:
    half = head_width // 3 // 2  # a third of the channels for each axis, two for each angle
    frequencies = 1 / 10_000 ** (torch.arange(half, dtype=torch.float32) / half)
    angles = places[..., None] * frequencies  # [B or 1, N, 3, half]
    if rope == "tiled":  # no rotation, as pairs are of neighbours; V-JEPA 2 was trained with it
        angles = torch.cat([angles, angles], dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
    angles = angles.flatten(2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: _Rotation) -> Tensor:
    """Turns the first channels of every head of [B, H, N, K]; a few at the end may stay."""
    cosines, sines = rotation
    turned, rest = x.tensor_split([cosines.shape[-1]], dim=-1)
    partners = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat([turned * cosines + partners * sines, rest], dim=-1)


def _floats(name: str, array: Floats, *shape: int | None) -> Tensor:
    """A float32 tensor of that shape, None being any size."""
    if array.dtype != np.float32 or not _fits(array.shape, shape):
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}; it must be float32 {_show(shape)}"
        )
    return torch.from_numpy(np.array(array, order="C"))


def _ids(name: str, array: Ids, num_tokens: int, *shape: int | None) -> Tensor:
    """An int64 tensor of that shape, of ids within [0, num_tokens)."""
    if not np.issubdtype(array.dtype, np.integer) or not _fits(array.shape, shape):
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}; it must be int {_show(shape)}"
        )
    if array.size and not 0 <= array.min() <= array.max() < num_tokens:
        raise InputError(
            f"{name} holds ids from {array.min()} to {array.max()}; "
            f"this clip has tokens 0 to {num_tokens - 1}"
        )
    return torch.from_numpy(np.array(array, np.int64, order="C"))


def _fits(found: tuple[int, ...], right: tuple[int | None, ...]) -> bool:
    return len(found) == len(right) and all(
        wanted in (None, size) for size, wanted in zip(found, right, strict=True)
    )


def _show(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _given(part: _T | None, name: str) -> _T:
    if part is None:
        raise InputError(f"this model has no {name}, by its configuration")
    return part
