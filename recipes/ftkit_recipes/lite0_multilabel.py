"""EfficientNet-Lite0 for several labels an image, each of which applies or not.

    ftkit train photos.csv --recipe lite0_multilabel

photos.csv: path,labels with a|b; or a column of 0 and 1 a label.

The stages are those of lite0, without label smoothing.
On ELPV's two attributes, by module: macro-AP 0.981 [0.93, 1.00] on 420 cells (bench/README.md).
"""

from dataclasses import replace

from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0,
    name="lite0_multilabel",
    task="multi-label",
    stages=tuple(replace(stage, label_smoothing=0.0) for stage in lite0.stages),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
