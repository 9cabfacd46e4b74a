"""Keep in a bundle what `ftkit enroll` judges a new class on.

write_kept_sample(folder, on_test, labels, groups)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from ftkit.exporting.evidence import OnTest
from ftkit_export.proof.intervals import PROVEN_SHARE, design
from ftkit_export.runtime.arrays import Array, spread_evenly
from ftkit_export.runtime.enroll import FILE, LEVEL, MOST_KEPT, KeptSample
from ftkit_export.runtime.out_of_distribution import unit_length


def write_kept_sample(folder: Path, on_test: OnTest, labels: Array, groups: Sequence[str]) -> None:
    """Write enroll.npz into the bundle in `folder`: test images as the file sees them.

    labels (M,), groups (M,): of the test images. Images of one group say less than independent ones;
    how much less is taken from how the file's mistakes cluster. Nothing is written where the file
    gave no numbers.
    """
    rows = spread_evenly(np.arange(len(labels)), MOST_KEPT)
    embedding = np.stack([on_test.sightings[row].embedding for row in rows])
    if not np.isfinite(embedding).all():
        return

    probabilities = on_test.probabilities[rows]
    wrong = probabilities.argmax(1) != labels[rows]
    sample = design(wrong, [groups[row] for row in rows], PROVEN_SHARE)
    narrowing = (float(stats.norm.ppf(LEVEL)) / sample.quantile(LEVEL)) ** 2 if sample.df > 0 else 0
    kept = KeptSample(
        embedding=unit_length(embedding).astype(np.float32),
        labels=labels[rows],
        probabilities=probabilities,
        right=~wrong,
        exported=len(rows),
        independent=min(len(rows), len(rows) / sample.effect * narrowing),
        clusters=sample.clusters,
    )
    (folder / FILE).write_bytes(kept.as_bytes())
