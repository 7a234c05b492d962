import dataclasses
import json

import pytest

from jvjepa import ClassifierConfig, EncoderConfig, ModelConfig, PredictorConfig, registry
from jvjepa.errors import ConfigError

GOOD = {"hidden_size": 48, "num_layers": 2, "num_heads": 2, "mlp_dim": 96}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, r"EncoderConfig.hidden_size = 0; it must be a whole number above 0"),
        ({"hidden_size": 48.0}, "EncoderConfig.hidden_size = 48.0"),
        ({"num_layers": True}, "EncoderConfig.num_layers = True"),
        ({"num_heads": 5}, "num_heads = 5; it must be a divisor of the width 48"),
        ({"num_heads": 16}, r"head width \(3\) is even and at least 6"),
        ({"num_heads": 12}, r"head width \(4\) is even and at least 6"),
        ({"crop_size": 250}, "crop_size = 250; it must be a multiple of patch_size = 16"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps = 0.0; it must be between 0 and 1"),
        ({"rope": "plain"}, "rope = 'plain'; it must be one of"),
        ({"rope_grid": "crop"}, "rope_grid = 'crop'; it must be one of"),
        ({"mlp_dim": -1}, "mlp_dim = -1"),
    ],
)
def test_impossible_encoders_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderConfig(**{**GOOD, **change})


def test_impossible_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"PredictorConfig.num_mask_tokens = 0"):
        PredictorConfig(num_mask_tokens=0)
    with pytest.raises(ConfigError, match="labels = "):
        ClassifierConfig(labels=(), num_heads=2)
    with pytest.raises(ConfigError, match="num_heads = 5; it must be a divisor of the encoder's"):
        ModelConfig(
            encoder=EncoderConfig(**GOOD), classifier=ClassifierConfig(labels=("a",), num_heads=5)
        )


@pytest.mark.parametrize("name", registry.RELEASES)
def test_json_keeps_everything(name: str) -> None:
    config = registry.get(name).config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_with_missing_or_unknown_fields_is_refused() -> None:
    values = ModelConfig(encoder=EncoderConfig(**GOOD)).to_json()
    with pytest.raises(ConfigError, match=r"ModelConfig has no fields \['decoder'\]"):
        ModelConfig.from_json({**values, "decoder": None})
    encoder = {**values["encoder"], "width": 3}
    del encoder["num_heads"]
    with pytest.raises(ConfigError, match=r"missing fields \['num_heads'\], unknown .*'width'"):
        ModelConfig.from_json({**values, "encoder": encoder})
    with pytest.raises(ConfigError, match="EncoderConfig must be a JSON object, not None"):
        ModelConfig.from_json({})


def test_configs_cannot_be_changed() -> None:
    config = EncoderConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
