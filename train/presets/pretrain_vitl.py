"""V-JEPA 2's pretraining of a ViT-L at 256 pixels, with the numbers of Meta's configuration.

Command:  jvjepa train pretrain vjepa2-vitl-fpc64-256 videos.csv runs/vitl --preset pretrain_vitl \
              --data.workers 8 --distributed
Hardware: Meta's 3,072 clips a step took 128 GPUs of 80 GB; see docs/scaling.md for others.
Result:   nobody has run it here.
"""

from jvjepa.train.data import ClipConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import PretrainConfig

config = PretrainConfig(
    optimizer=OptimizerConfig(
        learning_rate=5.25e-4,
        start_learning_rate=1e-4,
        final_learning_rate=5.25e-4,
        warmup_steps=12_000,
        stretch=1.25,
        weight_decay=0.04,
    ),
    data=DataConfig(clip=ClipConfig(num_frames=16, fps=4.0, crop_size=256), batch_size=3072),
    momentum=0.99925,
    dtype="bfloat16",
    remat="block",
)
loop = LoopConfig(steps=300_000, save_every=3_000)
