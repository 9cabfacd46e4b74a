"""Put the reference of the drift test into a bundle.

write_reference(folder, run, canvases, sightings)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftkit.data.canvas import Canvases
from ftkit.training.run import OUT_OF_FOLD, Run
from ftkit_export.proof.drift_reference import Seen, make_reference
from ftkit_export.runtime.collect import Sighting
from ftkit_export.runtime.predict import REFERENCE, softmax


def write_reference(
    folder: Path, run: Run, canvases: Canvases, sightings: Sequence[Sighting]
) -> None:
    """Write drift.json into the bundle in `folder`.

    sightings: of the test images, by the file itself. Scores, confidence and classes are those of
    the folds' models on the images each has not seen, which are many more; without folds, and for
    the frames and the embedding, whose directions are the shipped model's own, those of the test
    images.
    """
    test_groups = canvases.groups(canvases.rows("test"))
    classes = list(run.classes)
    seen = Seen(
        scores=np.array([sighting.score for sighting in sightings]),
        probabilities=np.array([sighting.probability for sighting in sightings]),
        answers=np.array([classes.index(sighting.label) for sighting in sightings]),
        groups=test_groups,
        coordinates=np.stack([sighting.coordinates for sighting in sightings]),
        frames=np.stack([sighting.frame for sighting in sightings]),
        test_groups=test_groups,
    )
    path = run.folder / OUT_OF_FOLD
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            if "foreign" in stored.files:  # not in older runs
                probabilities = softmax(stored["logits"].astype(np.float64) / run.temperature)
                seen = Seen(
                    scores=stored["foreign"].astype(np.float64),
                    probabilities=probabilities.max(1),
                    answers=probabilities.argmax(1),
                    groups=canvases.groups(stored["rows"]),
                    coordinates=seen.coordinates,
                    frames=seen.frames,
                    test_groups=test_groups,
                )
    (folder / REFERENCE).write_text(make_reference(seen, classes).to_json(), encoding="utf-8")
