"""MobileNetV3-large: a new head, then the last two blocks.

    ftkit train photos --recipe mobilenet_v3_large --weights FILE

Its weights are downloaded, or read from --weights FILE. Its accuracy is unmeasured.
"""

from dataclasses import replace

from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0, name="mobilenet_v3_large", backbone="mobilenetv3_large_100", preprocess=None
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
