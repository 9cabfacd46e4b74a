"""EfficientNet-B0: a new head, then the last two blocks.

    ftkit train photos --recipe efficientnet_b0 --weights FILE

Its weights are downloaded, or read from --weights FILE. Its accuracy is unmeasured.
"""

from dataclasses import replace

from ftkit_recipes.lite0 import recipe as lite0

recipe = replace(lite0, name="efficientnet_b0", backbone="efficientnet_b0", preprocess=None)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
