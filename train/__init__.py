"""Training for jvjepa's models.

`manifest` lists clips, `data` makes batches of them (with grain, of the extra `train`), `augment`
cuts their pixels, `synthetic` makes labelled videos to try it all on.
"""
