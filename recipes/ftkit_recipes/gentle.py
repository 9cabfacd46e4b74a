"""Learning-rate fine-tuning: frozen base, new head, Adam 1e-4.

    ftkit train photos --recipe gentle

Why such a low rate: the input features are already good, and the head starts from what one solve
makes of them. Large steps follow the noise of the first batches; small ones adapt to the new classes without
drifting and, in later stages that train the features, without forgetting what the backbone has
learned. Results: bench/README.md.
"""

from ftkit.recipe import Recipe, Stage

recipe = Recipe(
    name="gentle",
    backbone="efficientnet_lite0",
    folds=0,  # a val split is cut, so that every epoch of the plan is run and printed
    stages=(Stage(train="head", epochs=5, lr=1e-4, optimizer="adam", schedule="constant"),),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
