"""Checkpoints in and out of jvjepa's format, and proof that they mean the same."""

from jvjepa.convert.conversion import Report as Report
from jvjepa.convert.conversion import convert as convert
from jvjepa.convert.exporting import export_hf as export_hf
from jvjepa.convert.huggingface import from_hf_config as from_hf_config
from jvjepa.convert.huggingface import to_hf_config as to_hf_config
from jvjepa.convert.verification import PartCheck as PartCheck
from jvjepa.convert.verification import verify as verify
