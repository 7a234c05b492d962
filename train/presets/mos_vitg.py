"""QualiVision's training for video quality: a ViT-g of 64 frames of 384 pixels, its last 6 blocks.

Command:  jvjepa train mos models/vitg labels.csv runs/quality --text models/bge --videos videos \
              --preset mos_vitg --features features
Hardware: one GPU of 40 GB or more. What block 34 takes of a video has 52 MB in bfloat16: 207 GB of
          disk for the 4,000 videos of TaobaoVD-GC. With --video-rate 0, which trains the head
          alone, it is 3 kB.
Result:   nobody has run it with released weights. QualiVision's notebook prints a final score of
          0.63 on 800 videos of that set after 5 epochs, at learning rates that its schedule moves
          up and down every 10 updates. Here they are what its configuration names, 4e-4 for the
          head and 1e-4 for the video encoder. Its text encoder is meant to have 2e-5, but gets no
          gradient there, and is frozen here.
"""

from jvjepa.train.loop import LoopConfig
from jvjepa.train.mos import MosConfig
from jvjepa.train.optimizer import OptimizerConfig

config = MosConfig(
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.01, max_norm=1.0),
    freeze=0.85,
    head_rate=2.0,
    video_rate=0.5,
    text_rate=0.0,
    batch_size=192,
    dtype="bfloat16",
    remat="block",
    stored="bfloat16",
)
loop = LoopConfig(steps=160, accumulate=32, save_every=16, log_every=1)
