"""Causal LoRA for a released ViT-L at 256 pixels and a window of 8 tubelets.

Command:  jvjepa train causal-lora models/vitl videos.csv runs/causal --validation held-out.csv \
              --preset causal_lora_vitl --data.workers 16
Hardware: one GPU with 40 GB or more, or 8 with --mesh.data 8 and the batch size times 8.
Result:   nobody has run it with released weights yet. On synthetic videos and a small encoder the
          README has measurements (`benchmarks/causal.py`).
"""

from jvjepa.lora import LoraConfig
from jvjepa.train.causal_lora import CausalLoraConfig
from jvjepa.train.data import ClipConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig
from jvjepa.train.optimizer import OptimizerConfig

config = CausalLoraConfig(
    lora=LoraConfig(rank=16, alpha=32.0),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=500, weight_decay=0.0, max_norm=1.0),
    data=DataConfig(clip=ClipConfig(num_frames=16, fps=8.0, crop_size=256), batch_size=16),
    window=8,
    dtype="bfloat16",
    remat="products",
)
loop = LoopConfig(steps=10_000, save_every=500)
