"""EfficientNet-Lite0 for numbers: a quantity in its unit, with an interval.

    ftkit train photos.csv --recipe lite0_regression        # path,value; or path,width [mm],height [mm]

The stages are lite0's, without label smoothing, which numbers do not have.
"""

from dataclasses import replace

from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0,
    name="lite0_regression",
    task="regression",
    stages=tuple(replace(stage, label_smoothing=0.0) for stage in lite0.stages),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
