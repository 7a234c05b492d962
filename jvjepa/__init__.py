"""V-JEPA 2 video encoders in JAX: convert, stream, adapt and export them."""

from jvjepa import anticipation as anticipation
from jvjepa import gating as gating
from jvjepa import masks as masks
from jvjepa import planning as planning
from jvjepa import poses as poses
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
