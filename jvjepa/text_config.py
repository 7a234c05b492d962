"""What a sentence encoder of the BERT family is."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jvjepa.config import BlockConfig
from jvjepa.fields import Config, build, check, check_choices, check_eps, check_positive_ints

Pooling = Literal["cls", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """A BERT encoder, and how one vector is made of its tokens.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width D of the tokens and of the embedding.
        num_layers: transformer blocks L.
        num_heads: attention heads H, a divisor of `hidden_size`.
        mlp_dim: width of the MLP's hidden layer.
        max_positions: learned positions, the most tokens that a text can have.
        type_vocab_size: kinds of segments; a sentence is all of the first kind.
        layer_norm_eps: epsilon of every LayerNorm.
        pooling: "cls" embeds a text by its first token, "mean" by the mean of its tokens.

    Raises:
        ConfigError: a value is impossible.
    """

    vocab_size: int = 30522
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pooling: Pooling = "cls"

    def __post_init__(self) -> None:
        """Checks every field."""
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")
        check_positive_ints(self, *sizes, "max_positions", "type_vocab_size")
        fits = self.hidden_size % self.num_heads == 0
        check(fits, self, "num_heads", f"a divisor of the width {self.hidden_size}")
        check_eps(self)
        check_choices(self, pooling=get_args(Pooling))

    @property
    def block(self) -> BlockConfig:
        """What its transformer blocks are."""
        return BlockConfig.of(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TextConfig":
        """Builds the configuration from what `to_json` returned.

        Args:
            values: the JSON object.

        Returns:
            The configuration, checked.

        Raises:
            ConfigError: a field is missing, unknown or impossible.
        """
        return build(cls, values)
