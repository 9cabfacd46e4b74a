"""Staged strategy: ResNet50, a new head, then two blocks at 1e-4.

    ftkit train photos --recipe staged_resnet50 --weights resnet50.safetensors
    ftkit train photos --recipe staged_resnet50 --set backbone=efficientnet_lite0      (the same plan, offline)

Its accuracy with ResNet50 is unmeasured: the weights need a download. That with EfficientNet-Lite0
is in bench/README.md.
"""

from ftkit.recipe import Recipe, Stage

recipe = Recipe(
    name="staged_resnet50",
    backbone="resnet50",
    folds=0,  # a val split is cut, so that every epoch of the plan is run and printed
    stages=(
        Stage(train="head", epochs=5, lr=1e-3, optimizer="adam", schedule="constant"),
        Stage(train="last:2", epochs=10, lr=1e-4, optimizer="adam", schedule="constant"),
    ),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
