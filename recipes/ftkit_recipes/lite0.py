"""The default: EfficientNet-Lite0, a new head, then the last two block groups.

    ftkit train photos            (or: python -m ftkit_recipes.lite0 photos)

Measured on ELPV, four classes, stratified random 70/30 split, with --set augment.vflip=true --folds 0,
on a 2-core machine without a GPU: test accuracy 0.899 (mean of three seeds), 74 to 134 s with an empty
cache. With folds, split by module: 0.851, 3:24. bench/README.md has more.
"""

from ftkit.recipe import Augment, Recipe, Stage
from ftkit_export.runtime.preprocess import Preprocess

recipe = Recipe(
    name="lite0",
    backbone="efficientnet_lite0",
    # The whole centre square, not its inner 7/8: all that an inspection camera frames may matter.
    preprocess=Preprocess(
        size=224, resize=224, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)
    ),
    augment=Augment(hflip=True),
    stages=(
        Stage(train="head", epochs=15, lr=3e-3, weight_decay=0.05, label_smoothing=0.1, views=4),
        Stage(
            train="last:2",
            epochs=6,
            lr=5e-4,
            warmup=0.2,
            weight_decay=0.05,
            label_smoothing=0.1,
            ema=0.98,
            views=4,
            # The pretrained statistics stay: a batch's own, at first, cost what the head has learned.
            batchnorm=False,
        ),
    ),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
