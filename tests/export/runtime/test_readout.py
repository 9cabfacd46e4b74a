"""Readouts: the file computes what they say, and their tolerances hold."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ftkit_export.conversion.graph import image_form
from ftkit_export.runtime.preprocess import Preprocess
from ftkit_export.runtime.readout import (
    KEY,
    Labels,
    OneClass,
    Readout,
    Values,
    of_metadata,
    readout_of,
)
from ftkit_export.runtime.session import Session

READOUTS = [
    OneClass(temperature=1.3),
    Labels(temperatures=(0.7, 1.0, 2.5), thresholds=(0.2, 0.5, 0.9)),
    Values(
        means=(1000.0, 0.1, -3.0),
        spreads=(2.0, 0.5, 30.0),
        units=("mm", "", "K"),
        margins=(3.0, 0.6, 50.0),
    ),
]


def _core(size: int, logits: np.ndarray) -> onnx.ModelProto:
    """A core form that puts out these logits (K,) whatever the pixels are."""
    constants = [
        numpy_helper.from_array(logits[None].astype(np.float32), "row"),
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["embedding"]),
        helper.make_node("Mul", ["embedding", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "row"], ["logits"]),
    ]
    constants += [
        numpy_helper.from_array(np.array([1], np.int64), "last"),
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
    ]
    graph = helper.make_graph(
        nodes,
        "core",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(logits)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 1]),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.task)
def test_the_file_answers_what_the_readout_says(readout: Readout) -> None:
    logits = np.array([2.0, -1.0, 0.3])
    preprocess = Preprocess(size=8, resize=8)
    form = image_form(_core(8, logits), preprocess, readout)
    session = Session(form.SerializeToString())
    assert session.outputs[0].name == readout.output
    said = session.run(np.zeros((2, 9, 9, 3), np.uint8))[0]
    expected = readout.answers(logits[None])
    assert readout.apart(said, np.repeat(expected, 2, 0)) < readout.answer_limit(0.0)


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.task)
def test_answers_stay_within_what_logits_within_a_tolerance_can_do(readout: Readout) -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 3, (500, 3))
    limit = 0.05
    moved = logits + draw.uniform(-limit, limit, logits.shape)
    assert readout.apart(readout.answers(logits), readout.answers(moved)) <= readout.answer_limit(
        limit
    )
    differ = readout.decisions(logits) != readout.decisions(moved)
    assert not (differ & readout.clear(logits, limit)).any()
    if readout.decided:
        assert differ.any(), "else the line above shows nothing"


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.task)
def test_it_comes_back_from_the_metadata(readout: Readout) -> None:
    assert of_metadata({KEY: json.dumps(readout.as_json())}) == readout


def test_labels_are_decided_where_their_probability_reaches_the_threshold() -> None:
    readout = READOUTS[1]
    assert isinstance(readout, Labels)
    logits = np.random.default_rng(1).normal(0, 3, (200, 3))
    by_probability = readout.answers(logits) >= readout.thresholds
    assert np.array_equal(readout.decisions(logits) == 1, by_probability)


@pytest.mark.parametrize(
    "data",
    [
        {"task": "sorting"},
        {"task": "single-label", "temperature": -1.0},
        {"task": "multi-label", "temperatures": [1.0], "thresholds": [0.5, 0.5]},
        {"task": "regression", "means": [0.0], "spreads": [0.0], "units": [""], "margins": [1.0]},
        {"task": "regression", "means": [0.0], "spreads": [1.0], "units": [], "margins": [1.0]},
    ],
)
def test_a_damaged_one_is_refused(data: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        readout_of(data)
