"""Learning-rate fine-tuning: frozen base, new head, Adam 1e-4.

    ftkit train photos --recipe gentle

Why so small a rate: the head starts from chance while the features it reads are already good. A
large step follows the first batches' noise; a small one adapts to the new classes without wandering
off, and in later stages, where the features themselves move, without forgetting what the backbone
knows. Measured: bench/README.md.
"""

from ftkit.recipe import Recipe, Stage

recipe = Recipe(
    name="gentle",
    backbone="efficientnet_lite0",
    stages=(Stage(train="head", epochs=5, lr=1e-4, optimizer="adam", schedule="constant"),),
)

if __name__ == "__main__":
    from ftkit.cli.main import run_recipe

    run_recipe(recipe)
