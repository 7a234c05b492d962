"""Training for jvjepa's models; needs the extra `train`.

`loop` trains a `task`: `causal_lora`, `distill`, `finetune`, `pretrain` and `probe` make some, and
`commands` runs them. `manifest` lists clips, `data` makes batches of them, `augment` cuts their
pixels, `synthetic` makes labelled videos to try it all on. `mesh` and `distributed` are for several
devices and processes, `checkpoint`, `watch` and `metrics` for what a run leaves behind.
"""
