"""V-JEPA 2.1's second phase for a ViT-g: 64 frames, a falling learning rate.

Command:  jvjepa train pretrain vjepa2_1_vit_giant_384 videos.csv runs/cooldown \
              --cooldown runs/first --pictures videos.csv --pictures-batch 9216 \
              --preset cooldown_2_1_vitg --distributed
Hardware: Meta's has 256 GPUs; see docs/scaling.md for others.
Result:   nobody has run it here. Adam's averages begin anew, where Meta's go on. As in Meta's
          configuration the schedule is made for 15,000 steps, of which 12,000 are run.
"""

from jvjepa.train.data import ClipConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import PretrainConfig

config = PretrainConfig(
    optimizer=OptimizerConfig(
        learning_rate=6e-4,
        final_learning_rate=1e-6,
        schedule="linear",
        stretch=1.25,
        weight_decay=0.04,
    ),
    data=DataConfig(clip=ClipConfig(num_frames=64, fps=4.0, crop_size=256), batch_size=3072),
    context_ramp=None,
    distance_weighting=False,
    momentum=0.99925,
    dtype="bfloat16",
    remat="block",
)
loop = LoopConfig(steps=12_000, save_every=300)
