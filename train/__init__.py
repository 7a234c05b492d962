"""Training for jvjepa's models; needs the extra `train`.

`loop` trains a `task`: `causal_lora`, `distill`, `finetune`, `mos`, `pretrain` and `probe` make
some, and `commands` runs them. `manifest` lists clips, `data` makes batches of them, `augment` cuts
their pixels, `synthetic` makes labelled videos to try it all on, and `degradations` rated ones.
`mesh` and `distributed` are for several devices and processes, `checkpoint`, `watch` and `metrics`
for what a run leaves behind. The files of `mos` read ratings (`mos_data`), keep what frozen parts
give (`mos_features`, `mos_layers`), score (`mos_scorer`), and measure (`mos_loss`, `mos_metrics`,
`mos_report`).
"""
