"""BERT sentence encoders, such as BGE: a text in, one vector of length 1 out.

Reference: `BertModel` of Hugging Face's `modeling_bert.py`, and what the library
sentence-transformers makes of its tokens; the papers are arXiv:1810.04805 and arXiv:2309.07597.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.attention import Backend, check_backend
from jvjepa.config import BlockConfig
from jvjepa.dense import kernel_init
from jvjepa.errors import InputError
from jvjepa.layers import MLP, LayerNorm, SelfAttention
from jvjepa.text_config import TextConfig
from jvjepa.typing import Array, DType


class PostNormBlock(nn.Module):
    """BERT's transformer block: each norm comes after the sum, not before the layer."""

    config: BlockConfig
    dtype: DType
    param_dtype: DType
    backend: Backend

    def setup(self) -> None:
        """Declares the parts."""
        dtypes = (self.dtype, self.param_dtype)
        self.attention = SelfAttention(self.config, *dtypes, self.backend)
        self.norm1 = LayerNorm(self.config.layer_norm_eps, *dtypes)
        self.mlp = MLP(self.config, *dtypes)
        self.norm2 = LayerNorm(self.config.layer_norm_eps, *dtypes)

    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        """One layer over [B, M, D], in the form that a scan over layers takes."""
        x = self.norm1(x + self.attention(x, None, mask, None, None))
        return self.norm2(x + self.mlp(x)), None


class TextEncoder(nn.Module):
    """Turns token ids into tokens, and into one vector for each text.

    Its parameters hold all blocks stacked, or each of its own, as the video encoder's do.

    Args:
        config: the architecture.
        dtype: of the computation, float32 or bfloat16; norms' statistics, softmax, and pooling are
            float32 in any case.
        param_dtype: of the parameters.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: run stacked blocks as one loop, see `jvjepa.Encoder`.
    """

    config: TextConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        self.word_embed = self._table("word_embed", config.vocab_size)
        self.position_embed = self._table("position_embed", config.max_positions)
        self.segment_embed = self._table("segment_embed", config.type_vocab_size)
        self.embed_norm = LayerNorm(config.layer_norm_eps, *dtypes)
        part = (config.block, *dtypes, self.attention)
        if not self.scan:
            self.blocks = [PostNormBlock(*part) for _ in range(config.num_layers)]
            return
        self.blocks = nn.scan(
            PostNormBlock,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(*part)

    def _table(self, name: str, rows: int) -> Array:
        return self.param(name, kernel_init, (rows, self.config.hidden_size), self.param_dtype)

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Encodes texts.

        Args:
            ids: int [B, M], token ids, [CLS] and [SEP] included; M is at most `max_positions`. Ids
                outside the vocabulary raise; where they are traced, they give NaN.
            mask: bool [B, M], False where an id is only padding; the first token of a text is none.

        Returns:
            [B, M, D]; what it says of padding means nothing.

        Raises:
            InputError: the shape, dtype or value of an argument cannot be right.
        """
        _check(ids, mask, self.config)
        ids = jnp.where(ids < 0, self.config.vocab_size, ids)  # negative: counted from the end
        words = jnp.take(self.word_embed, ids, axis=0, mode="fill", fill_value=jnp.nan)
        # Hugging Face's order of the two sums.
        x = words + self.segment_embed[:1][None] + self.position_embed[: ids.shape[1]][None]
        x = self.embed_norm(x.astype(self.dtype))
        seen = jnp.asarray(mask)[:, None, None]
        if self.scan:
            return self.blocks(x, seen)[0]
        for block in self.blocks:
            x, _ = block(x, seen)
        return x

    def embed(self, ids: Array, mask: Array) -> Array:
        """Embeds texts as sentence-transformers' `encode(.., normalize_embeddings=True)` does.

        Args:
            ids: as in a call.
            mask: as in a call.

        Returns:
            float32 [B, D] of length 1: the first token, or the mean of all that are not padding, as
            `config.pooling` says.

        Raises:
            InputError: as a call.
        """
        tokens = self(ids, mask).astype(jnp.float32)
        if self.config.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            weight = jnp.asarray(mask, jnp.float32)[..., None]  # [B, M, 1]
            kept = jnp.where(weight > 0, tokens, 0.0)
            pooled = jnp.sum(kept, axis=1) / jnp.sum(weight, axis=1)
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _check(ids: Array, mask: Array, config: TextConfig) -> None:
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(f"ids are {ids.dtype} {list(ids.shape)}; they must be int [B, M]")
    if ids.shape[1] > config.max_positions:
        raise InputError(
            f"a text has {ids.shape[1]} tokens; the encoder has positions for "
            f"{config.max_positions}"
        )
    if mask.shape != ids.shape or mask.dtype != jnp.bool_:
        right = f"bool {list(ids.shape)}, as the ids"
        raise InputError(f"mask is {mask.dtype} {list(mask.shape)}; it must be {right}")
    if not isinstance(ids, jax.core.Tracer):
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= config.vocab_size:
            right = f"0 to {config.vocab_size - 1}"
            raise InputError(f"ids go from {low} to {high}; the vocabulary has {right}")
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(mask)[:, 0].all():
        raise InputError("mask is False at the first token of a text; padding comes at the end")
