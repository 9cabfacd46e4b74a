"""Class activation maps (Zhou et al. 2016) with ONNX Runtime, without the training framework.

Of a class, a label, or a quantity: of whatever a logit stands for.

    model = with_features(core)                 # at export: variants/explain.onnx, or None where no map is exact
    explain = Explainer("bundle")               # numpy, Pillow, ONNX Runtime
    heat, label = explain(image)                # (h, w) float32: contributions to the logit
    overlay(explain.seen(image), heat).save("why.png")

The map is exact where the head is linear over averaged features: its mean, plus the head's bias, is
the logit.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ftkit_export.runtime.arrays import Array
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.preprocess import Preprocess, from_frame, to_frame
from ftkit_export.runtime.session import Session

if TYPE_CHECKING:
    import onnx


FILE = "variants/explain.onnx"
THROUGH = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")
# Colour map at equal steps, from black through red and amber to pale yellow.
HEAT = np.array(
    [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32
)


def with_features(core: onnx.ModelProto) -> onnx.ModelProto | None:
    """Add two outputs to the core form: `features` and `head`.

    features: the last feature map (N, C, h, w). head: the weights (classes, C) that turn its
    spatial averages into logits. None where there is anything else between the two.
    """
    import onnx
    from onnx import helper, shape_inference

    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    weights = {item.name: item for item in graph.initializer}
    last = makers.get("logits")
    if last is not None and last.op_type == "Add" and last.input[0] in makers:
        last = makers[last.input[0]]
    if last is None or last.op_type not in ("Gemm", "MatMul") or last.input[1] not in weights:
        return None

    pool = makers.get(last.input[0])
    while pool is not None and pool.op_type in THROUGH:
        pool = makers.get(pool.input[0])
    if pool is None or not _averages_over_space(pool, weights):
        return None

    shapes = {item.name: item for item in shape_inference.infer_shapes(model).graph.value_info}
    dims = [dim.dim_value for dim in shapes[pool.input[0]].type.tensor_type.shape.dim]
    outward = any(item.name == "transB" and item.i for item in last.attribute)
    graph.node.append(helper.make_node("Identity", [pool.input[0]], ["features"], name="features"))
    graph.node.append(
        helper.make_node(
            "Identity" if outward else "Transpose", [last.input[1]], ["head"], name="head"
        )
    )
    classes = weights[last.input[1]].dims[0 if outward else 1]
    for name, shape in (("features", ["batch", *dims[1:]]), ("head", [classes, dims[1]])):
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    return model


def _averages_over_space(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    from onnx import numpy_helper

    if node.op_type == "GlobalAveragePool":
        return True
    if node.op_type != "ReduceMean":
        return False

    axes: list[int] = [
        value for item in node.attribute if item.name == "axes" for value in item.ints
    ]
    if len(node.input) > 1 and node.input[1] in weights:
        axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
    return sorted(axis % 4 for axis in axes) == [2, 3]


class Explainer:
    """Class activation maps from a bundle's folder.

    Raises FtkitError when the bundle has no file for them: its backbone has no linear head over
    averaged features.
    """

    def __init__(self, bundle: str | Path):
        path = Path(bundle) / FILE
        if not path.is_file():
            raise FtkitError(
                f"{bundle}: expected {FILE}, found none: its backbone has no linear head over averaged features, or an "
                "older ftkit made it. Try efficientnet_lite0, resnet18 or resnet50"
            )
        self._session = Session(path)
        self._preprocess = Preprocess(**json.loads(self._session.metadata["preprocess"]))
        self._format = self._session.metadata.get("input_format", "rgb")

    def seen(self, image: Array) -> Array:
        """(H, W, 3) uint8 RGB -> the part that the network sees, (S, S, 3) uint8, resized."""
        start = (self._preprocess.resize - self._preprocess.size) // 2
        inside = slice(start, start + self._preprocess.size)
        return self._preprocess.canvas(image)[inside, inside]

    def __call__(self, image: Array, label: int | None = None) -> tuple[Array, int]:
        """(H, W, 3) uint8 RGB -> class activation map (h, w) float32, class.

        label: the class to explain, by default the most likely.
        """
        pixels = self._preprocess.pixels(self._preprocess.canvas(image)[None])
        logits, _, features, head = self._session.run(pixels)
        chosen = int(logits[0].argmax()) if label is None else label
        return np.tensordot(head[chosen], features[0], 1), chosen

    def write(
        self,
        path: Path,
        label: int,
        folder: Path,
        content: bytes | Path | None = None,
        name: str = "",
    ) -> Path:
        """Write the overlay of an image file to folder/NAME-why.png; return its path.

        The name is numbered if that file exists. content: the image, unless it is the file at
        `path`. name: of the label or quantity, where an image has several maps: NAME-why-LABEL.png.
        """
        image = self._preprocess.decode(content or path)
        image = from_frame(to_frame(image, self._format), self._format)  # as the model sees it
        stem = f"{path.stem}-why"
        if name:
            stem += "-" + re.sub(r"[^\w.-]+", "_", name)
        place = folder / f"{stem}.png"

        number = 1
        while place.exists():
            number += 1
            place = folder / f"{stem}-{number}.png"

        folder.mkdir(parents=True, exist_ok=True)
        overlay(self.seen(image), self(image, label)[0]).save(place)
        return place


def overlay(seen: Array, heat: Array) -> Image.Image:
    """Image (S, S, 3) uint8 in grey, with positive class activations in warm colours."""
    side = seen.shape[0]
    share = Image.fromarray(
        (np.maximum(heat, 0) / max(float(heat.max()), 1e-12)).astype(np.float32)
    )
    weight = np.asarray(share.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(weight, stops, HEAT[:, channel]) for channel in range(3)], -1)
    grey = np.asarray(Image.fromarray(seen).convert("L"), np.float32)[..., None]
    strength = 0.65 * weight[..., None]

    return Image.fromarray(
        (grey * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8)
    )
