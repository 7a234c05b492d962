"""V-JEPA 2 video encoders in JAX: convert, stream, adapt and export them.

Names are imported when they are first used: `jvjepa.export.runtime` must do without JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jvjepa import anticipation as anticipation
    from jvjepa import gating as gating
    from jvjepa import masks as masks
    from jvjepa import planning as planning
    from jvjepa import poses as poses
    from jvjepa import quality as quality
    from jvjepa import reduction as reduction
    from jvjepa import registry as registry
    from jvjepa import streaming as streaming
    from jvjepa import video as video
    from jvjepa.action import ActionPredictor as ActionPredictor
    from jvjepa.anticipation import Anticipator as Anticipator
    from jvjepa.config import ActionPredictorConfig as ActionPredictorConfig
    from jvjepa.config import AnticipatorConfig as AnticipatorConfig
    from jvjepa.config import ClassifierConfig as ClassifierConfig
    from jvjepa.config import EncoderConfig as EncoderConfig
    from jvjepa.config import ModelConfig as ModelConfig
    from jvjepa.config import PredictorConfig as PredictorConfig
    from jvjepa.encoder import Encoder as Encoder
    from jvjepa.errors import InputError as InputError
    from jvjepa.heads import Classifier as Classifier
    from jvjepa.predictor import Predictor as Predictor
    from jvjepa.version import __version__ as __version__
    from jvjepa.weights import Model as Model
    from jvjepa.weights import load as load
    from jvjepa.weights import save as save

_MODULES = (
    "anticipation",
    "gating",
    "masks",
    "planning",
    "poses",
    "quality",
    "reduction",
    "registry",
    "streaming",
    "video",
)
_NAMES = {
    "ActionPredictor": "action",
    "Anticipator": "anticipation",
    "ActionPredictorConfig": "config",
    "AnticipatorConfig": "config",
    "ClassifierConfig": "config",
    "EncoderConfig": "config",
    "ModelConfig": "config",
    "PredictorConfig": "config",
    "Encoder": "encoder",
    "InputError": "errors",
    "Classifier": "heads",
    "Predictor": "predictor",
    "__version__": "version",
    "Model": "weights",
    "load": "weights",
    "save": "weights",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"jvjepa.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"jvjepa.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jvjepa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*_MODULES, *_NAMES))
