"""EfficientNet-Lite0 for numbers: a quantity in its unit, with an interval.

    ftkit train photos.csv --recipe lite0_regression

photos.csv: path,value; or path,width [mm],height [mm].

The stages are lite0's, without label smoothing, which numbers do not have.
On ELPV's defect probability, by module: mean absolute error 0.18 [0.03, 0.33] on 420 cells
(bench/README.md).
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
