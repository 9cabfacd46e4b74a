"""Class activation maps (Zhou et al. 2016) with ONNX Runtime, without the training framework.

Of a class, a label, or a quantity: of whatever a logit stands for.

    model = with_features(core)                 # at export: variants/explain.onnx, or None where no map is exact
    explain = Explainer("bundle")               # numpy, Pillow, ONNX Runtime
    heat, label = explain(image)                # (h, w) float32: contributions to the logit
    overlay(explain.seen(image), heat).save("why.png")

The map is exact where the head is linear over features that are averaged over space, or of which the
largest is taken (pooling mean+max, also of several depths): its mean, plus the head's bias, is the
logit. What a maximum adds is put where it is.
"""

from __future__ import annotations

import itertools
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
POOLS = {
    "GlobalAveragePool": "mean",
    "ReduceMean": "mean",
    "GlobalMaxPool": "max",
    "ReduceMax": "max",
}
THROUGH = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout")
# Colour map at equal steps, from black through red and amber to pale yellow.
HEAT = np.array(
    [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32
)


def with_features(core: onnx.ModelProto) -> onnx.ModelProto | None:
    """Add outputs to the core form: feature maps (N, C, h, w), and `head`.

    The maps are named by how they are pooled: `features` where a single one is averaged, else
    `mean/of/0`, `max/of/1`, ... head: the weights (classes, sum of C) that turn what is pooled into
    logits, in that order. None where there is anything else between maps and logits.
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

    pools = _pooled(last.input[0], makers, weights)
    if not pools:
        return None

    shapes = {item.name: item for item in shape_inference.infer_shapes(model).graph.value_info}
    outward = any(item.name == "transB" and item.i for item in last.attribute)
    outputs = []
    for number, (kind, value) in enumerate(pools):
        name = f"{kind}/of/{number}" if len(pools) > 1 else "features"
        dims = [dim.dim_value for dim in shapes[value].type.tensor_type.shape.dim]
        graph.node.append(helper.make_node("Identity", [value], [name], name=name))
        outputs.append((name, ["batch", *dims[1:]]))
    graph.node.append(
        helper.make_node(
            "Identity" if outward else "Transpose", [last.input[1]], ["head"], name="head"
        )
    )
    shape = list(weights[last.input[1]].dims)
    outputs.append(("head", shape if outward else shape[::-1]))
    for name, dims in outputs:
        graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))

    return model


def _pooled(
    value: str, makers: dict[str, onnx.NodeProto], weights: dict[str, onnx.TensorProto]
) -> list[tuple[str, str]]:
    """("mean" or "max", feature map) of each part of a head's input, in order; none for anything else."""
    node = makers.get(value)
    while node is not None and node.op_type in THROUGH:
        node = makers.get(node.input[0])
    if node is None:
        return []
    if node.op_type == "Concat":
        axis = next(item.i for item in node.attribute if item.name == "axis")
        parts = [_pooled(each, makers, weights) for each in node.input]
        return list(itertools.chain(*parts)) if axis in (1, -1) and all(parts) else []
    kind = POOLS.get(node.op_type)
    whole = node.op_type.startswith("Global") or _is_over_space(node, weights)
    return [(kind, node.input[0])] if kind and whole else []


def _is_over_space(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    from onnx import numpy_helper

    axes: list[int] = [
        value for item in node.attribute if item.name == "axes" for value in item.ints
    ]
    if len(node.input) > 1 and node.input[1] in weights:
        axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
    return sorted(axis % 4 for axis in axes) == [2, 3]


class Explainer:
    """Class activation maps from a bundle's folder.

    Raises FtkitError when the bundle has no file for them: its backbone has no linear head over pooled
    features.
    """

    def __init__(self, bundle: str | Path):
        path = Path(bundle) / FILE
        if not path.is_file():
            raise FtkitError(
                f"{bundle}: expected {FILE}, found none: its backbone has no linear head over pooled features, or an "
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
        logits, _, *maps, head = self._session.run(pixels)
        chosen = int(logits[0].argmax()) if label is None else label
        names = self._session.output_names[2:-1]
        ends = np.cumsum([value.shape[1] for value in maps])[:-1]
        parts = [
            _contribution(name, value[0], own)
            for name, value, own in zip(names, maps, np.split(head[chosen], ends), strict=True)
        ]
        finest = max((part.shape for part in parts), key=lambda shape: shape[0] * shape[1])
        heat: Array = np.sum([_enlarged(part, finest) for part in parts], axis=0)
        return heat, chosen

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


def _contribution(name: str, value: Array, own: Array) -> Array:
    """What a feature map (C, h, w) adds to a logit, (h, w): its mean is that. own: weights (C,)."""
    if not name.startswith("max"):
        added: Array = np.tensordot(own, value, 1)
        return added
    flat = value.reshape(len(value), -1)
    places = flat.argmax(1)
    heat = np.zeros(flat.shape[1], np.float32)
    np.add.at(heat, places, own * flat[np.arange(len(flat)), places] * flat.shape[1])
    spread: Array = heat.reshape(value.shape[1:])
    return spread


def _enlarged(heat: Array, shape: tuple[int, ...]) -> Array:
    """A map at the size of a finer one, with the same mean."""
    if heat.shape == shape:
        return heat
    size = shape[1], shape[0]
    image = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    found: Array = np.asarray(image)
    shifted: Array = found + (heat.mean() - found.mean())
    return shifted


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
