"""Checkpoints in and out of jvjepa's format, and proof that they mean the same."""

from jvjepa.convert.architecture import Hints as Hints
from jvjepa.convert.comparison import PartCheck as PartCheck
from jvjepa.convert.conversion import Report as Report
from jvjepa.convert.conversion import convert as convert
from jvjepa.convert.doctor import Diagnosis as Diagnosis
from jvjepa.convert.doctor import diagnose as diagnose
from jvjepa.convert.exporting import export_hf as export_hf
from jvjepa.convert.huggingface import from_hf_config as from_hf_config
from jvjepa.convert.huggingface import to_hf_config as to_hf_config
from jvjepa.convert.labels import ActionLabels as ActionLabels
from jvjepa.convert.labels import read_epic_labels as read_epic_labels
from jvjepa.convert.labels import read_labels as read_labels
from jvjepa.convert.probes import attach_probe as attach_probe
from jvjepa.convert.quality import convert_quality as convert_quality
from jvjepa.convert.quality import convert_text as convert_text
from jvjepa.convert.quality import is_text_source as is_text_source
from jvjepa.convert.verification import verify as verify
