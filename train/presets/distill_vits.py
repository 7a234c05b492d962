"""A causal ViT-S from a ViT-L, for streams with a window of 8 tubelets.

Command:  jvjepa train distill models/vitl videos.csv runs/small --validation held-out.csv \
              --preset distill_vits --data.workers 16
Hardware: one GPU of 40 GB or more.
Result:   nobody has run it with released weights yet.
"""

from jvjepa.train.data import ClipConfig
from jvjepa.train.distill import DistillConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig
from jvjepa.train.optimizer import OptimizerConfig

config = DistillConfig(
    size="vit-small",
    window=8,
    optimizer=OptimizerConfig(
        learning_rate=5e-4, warmup_steps=2_000, weight_decay=0.04, max_norm=1.0
    ),
    data=DataConfig(clip=ClipConfig(num_frames=16, fps=8.0, crop_size=256), batch_size=64),
    dtype="bfloat16",
)
loop = LoopConfig(steps=100_000, save_every=2_000)
