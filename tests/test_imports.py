import subprocess
import sys


def _run(script: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_import_takes_no_device_and_no_foreign_framework() -> None:
    _run("""
import sys
import jvjepa, jvjepa.cli, jvjepa.commands, jvjepa.convert, jvjepa.export, jvjepa.train
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
foreign = {"torch", "transformers", "tensorflow", "optax", "matplotlib", "onnx"} & set(sys.modules)
assert not foreign, foreign
""")


def test_the_public_face_is_there() -> None:
    _run("""
import inspect, jvjepa
for name in ("load", "save", "Model", "Encoder", "EncoderConfig", "ModelConfig", "InputError"):
    assert hasattr(jvjepa, name), name
for part, names in {
    "streaming": ("init_state", "step", "scan", "reset"),
    "gating": ("Gate", "init_state", "step", "scan", "reset", "statistics"),
    "video": ("read", "preprocess", "stream", "tubelets"),
    "registry": ("get", "RELEASES"),
}.items():
    for name in names:
        assert inspect.getdoc(getattr(getattr(jvjepa, part), name)), (part, name)
""")
