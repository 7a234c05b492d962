"""Meta's attentive probe for Something-Something v2: 20 heads, 20 epochs, 16 frames, 2 clips.

Command:  jvjepa train probe models/vitl ssv2-train.csv runs/ssv2 --validation ssv2-val.csv \
              --preset probe_ssv2 --clip.clips 2 --clip.fps 4 --stored bfloat16 --workers 16
Hardware: one GPU of 80 GB; the features of 169,000 videos of 2 x 2,048 tokens take 1.4 TB in
          bfloat16, so that --pool tubelet, or a part of the videos, is what most can afford.
Result:   nobody has run it with released weights. Meta's has random augmentation anew in every
          epoch, which a cache cannot have.
"""

from jvjepa.train.probe import ProbeConfig

config = ProbeConfig(kind="attentive", epochs=20, batch_size=128)
