"""MobileNetV4-small: a new head, then the last two blocks.

    ftkit train photos --recipe mobilenet_v4_small --weights FILE

Its weights are downloaded, or read from --weights FILE. Its accuracy is unmeasured.
"""

from dataclasses import replace

from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(
    lite0, name="mobilenet_v4_small", backbone="mobilenetv4_conv_small", preprocess=None
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
