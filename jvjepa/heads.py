"""The attentive pooler and the classifier on top of the encoder.

Reference: `AttentiveClassifier` of Meta's V-JEPA 2 (`src/models/attentive_pooler.py`) and
`VJEPA2ForVideoClassification` of Hugging Face's `modeling_vjepa2.py`. The two differ in the number
of heads and in the LayerNorms' epsilon; `ClassifierConfig` says both.
"""

import flax.linen as nn
import jax.numpy as jnp

from jvjepa.attention import Backend, attention, check_backend
from jvjepa.config import (
    AnticipatorConfig,
    BlockConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PoolerConfig,
)
from jvjepa.dense import Dense, kernel_init
from jvjepa.errors import InputError
from jvjepa.layers import MLP, LayerNorm, make_blocks, run_blocks
from jvjepa.typing import Array, DType


class CrossAttention(nn.Module):
    """Multi-head attention of queries over tokens, without an output projection."""

    config: BlockConfig
    dtype: DType
    param_dtype: DType
    backend: Backend

    def setup(self) -> None:
        """Declares the three projections."""
        width = self.config.hidden_size
        self.query = Dense(width, self.dtype, self.param_dtype)
        self.key = Dense(width, self.dtype, self.param_dtype)
        self.value = Dense(width, self.dtype, self.param_dtype)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_width)

    def __call__(self, queries: Array, tokens: Array) -> Array:
        """Attends from [B, n, D] over [B, N, D]: to [B, n, D]."""
        q = self._heads(self.query(queries))
        k, v = self._heads(self.key(tokens)), self._heads(self.value(tokens))
        return attention(q, k, v, backend=self.backend).reshape(queries.shape)


class CrossBlock(nn.Module):
    """The block that reads the tokens; its queries are not normed, as in both originals."""

    config: BlockConfig
    dtype: DType
    param_dtype: DType
    backend: Backend

    def setup(self) -> None:
        """Declares the parts."""
        dtypes = (self.dtype, self.param_dtype)
        self.norm1 = LayerNorm(self.config.layer_norm_eps, *dtypes)
        self.attention = CrossAttention(self.config, *dtypes, self.backend)
        self.norm2 = LayerNorm(self.config.layer_norm_eps, *dtypes)
        self.mlp = MLP(self.config, *dtypes)

    def __call__(self, queries: Array, tokens: Array) -> Array:
        """Takes queries [B, n, D] over tokens [B, N, D]: to [B, n, D]."""
        x = queries + self.attention(queries, self.norm1(tokens))
        return x + self.mlp(self.norm2(x))


class Pooler(nn.Module):
    """Self-attention blocks over the tokens, without positions, then learned queries over them.

    Args:
        config: gives its depth, heads and epsilon.
        width: D, the encoder's.
        dtype: as in `Classifier`.
        param_dtype: as in `Classifier`.
        attention: as in `Classifier`.
        scan: as in `Classifier`.
        num_queries: n.
    """

    config: ClassifierConfig | AnticipatorConfig | PoolerConfig
    width: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True
    num_queries: int = 1

    def setup(self) -> None:
        """Declares the parts."""
        check_backend(self.attention)
        dtypes = (self.dtype, self.param_dtype)
        block = BlockConfig(
            hidden_size=self.width,
            num_heads=self.config.num_heads,
            mlp_dim=4 * self.width,  # whatever the encoder's ratio is
            layer_norm_eps=self.config.layer_norm_eps,
        )
        self.query_tokens = self.param(
            "query_tokens", kernel_init, (self.num_queries, self.width), self.param_dtype
        )
        self.blocks = make_blocks(
            block, self.config.num_layers, dtypes, self.attention, scan=self.scan
        )
        self.cross_attention = CrossBlock(block, *dtypes, self.attention)

    def __call__(self, tokens: Array) -> Array:
        """Pools [B, N, D] to [B, n, D]; see `Classifier.pool`."""
        shape = tuple(tokens.shape)
        if len(shape) != 3 or 0 in shape or shape[-1] != self.width:
            raise InputError(f"tokens have shape {shape}; they must be [B, N, D = {self.width}]")
        if not jnp.issubdtype(tokens.dtype, jnp.floating):
            raise InputError(f"tokens are {tokens.dtype}; they must be float, as the encoder's are")
        tokens = run_blocks(self.blocks, jnp.asarray(tokens, self.dtype), None, None)
        queries = self.query_tokens.astype(self.dtype)[None]
        queries = jnp.broadcast_to(queries, (shape[0], *queries.shape[1:]))  # [B, n, D]
        return self.cross_attention(queries, tokens)


class Classifier(nn.Module):
    """Turns the encoder's tokens into logits.

    Its pooler gives the tokens no positions, so their order does not matter: tokens of several
    clips, or of several layers (`ClassifierConfig.layers`), are just put one after the other.

    Its parameters hold the pooler's blocks stacked or each of its own, as the encoder's do.

    Args:
        config: the classifier.
        encoder: the encoder whose tokens it takes.
        dtype: of the computation, float32 or bfloat16; norms' statistics and softmax are float32
            in any case.
        param_dtype: of the parameters.
        attention: the attention backend, see `jvjepa.attention.resolve`.
        scan: run stacked blocks as one loop, see `jvjepa.Encoder`.
    """

    config: ClassifierConfig
    encoder: EncoderConfig
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    attention: Backend = "auto"
    scan: bool = True

    def setup(self) -> None:
        """Declares the parts."""
        ModelConfig(encoder=self.encoder, classifier=self.config)  # checks that the two fit
        dtypes = (self.dtype, self.param_dtype)
        width, labels = self.encoder.hidden_size, len(self.config.labels)
        self.pooler = Pooler(self.config, width, *dtypes, self.attention, self.scan)
        self.linear = Dense(labels, *dtypes)

    def __call__(self, tokens: Array) -> Array:
        """Classifies.

        Args:
            tokens: float [B, N, D], the encoder's, after its final norm.

        Returns:
            [B, labels], logits in the order of `config.labels`.

        Raises:
            InputError: the shape or dtype of `tokens` cannot be right.
        """
        return self.linear(self.pool(tokens))

    def pool(self, tokens: Array) -> Array:
        """Pools tokens into one vector, which the linear classifier takes.

        Args:
            tokens: as in a call.

        Returns:
            [B, D].

        Raises:
            InputError: as a call.
        """
        return self.pooler(tokens)[:, 0]
