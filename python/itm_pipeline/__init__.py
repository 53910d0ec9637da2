"""Reference pipeline for fine-grained image-text matching: data, models, training, evaluation and the command `itm`.

It stands on the public names of `itm_kernels` alone. Everything here can be imported and trained without the command
line: make a `itm_pipeline.config.TrainConfig` and hand it to `itm_pipeline.train.train`.
"""
