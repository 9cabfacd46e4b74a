"""Put the reference of the drift test into a bundle.

write_reference(folder, run, canvases, sightings, "rgb")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ftkit.data.canvas import Canvases
from ftkit.training.run import OUT_OF_FOLD, Run
from ftkit.utils import console
from ftkit_export.proof.drift_reference import Seen, make_reference
from ftkit_export.runtime.arrays import spread_evenly
from ftkit_export.runtime.collect import Sighting
from ftkit_export.runtime.drift import frame_statistics
from ftkit_export.runtime.predict import REFERENCE
from ftkit_export.runtime.preprocess import parse_frame, to_frame
from ftkit_export.runtime.readout import softmax

MORE_FRAMES = 500  # beside the test images'
PIXELS = 1_000_000_000  # of them together: half a minute of decoding


def write_reference(
    folder: Path,
    run: Run,
    canvases: Canvases,
    sightings: Sequence[Sighting],
    input_format: str,
) -> None:
    """Write drift.json into the bundle in `folder`.

    sightings: of the test images, by the file itself. Scores, confidence and classes are those of
    the folds' models on the images each has not seen, which are many more; without folds, and for
    the embedding, whose directions are the shipped model's own, those of the test images. Frames do
    not depend on the model: those of some other images follow those of the test images.
    """
    test = canvases.rows("test")
    test_groups = canvases.groups(test)
    width, height = parse_frame(run.data["audit"]["frame"])
    others = np.setdiff1d(np.arange(len(canvases.labels)), test)
    others = spread_evenly(others, min(MORE_FRAMES, PIXELS // (width * height)))
    frames = [sighting.frame for sighting in sightings]
    with console.bar("frames of the drift reference") as progress:
        for number, row in enumerate(others, start=1):
            image = run.preprocess.decode(canvases.images.images[row].path)
            frames.append(frame_statistics(to_frame(image, input_format), input_format))
            progress(number, len(others))
    classes = list(run.classes)
    seen = Seen(
        scores=np.array([sighting.score for sighting in sightings]),
        probabilities=np.array([sighting.probability for sighting in sightings]),
        answers=np.array([classes.index(sighting.label) for sighting in sightings]),
        groups=test_groups,
        coordinates=np.stack([sighting.coordinates for sighting in sightings]),
        test_groups=test_groups,
        frames=np.stack(frames),
        frame_groups=[*test_groups, *canvases.groups(others)],
    )
    path = run.folder / OUT_OF_FOLD
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            if "foreign" in stored.files:  # not in older runs
                probabilities = softmax(stored["logits"].astype(np.float64) / run.temperature)
                seen = replace(
                    seen,
                    scores=stored["foreign"].astype(np.float64),
                    probabilities=probabilities.max(1),
                    answers=probabilities.argmax(1),
                    groups=canvases.groups(stored["rows"]),
                )
    (folder / REFERENCE).write_text(make_reference(seen, classes).to_json(), encoding="utf-8")
