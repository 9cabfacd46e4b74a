"""Latency measurement: any file and its inputs, order of runs, separate processes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ftkit_export.proof.regression import compare_latency
from ftkit_export.runtime.errors import FtkitError
from ftkit_export.runtime.latency import (
    PROCESSES,
    ROUNDS,
    Condition,
    _model_of_cpu,
    compared,
    measure,
    measure_start,
    race,
)
from ftkit_export.runtime.session import Session
from ftkit_export.runtime.timing import BINS, feeds, in_turn


def model(path: Path, **inputs: tuple[int, list[int | str]]) -> Path:
    """An ONNX file not made by ftkit that passes each input through."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    ins = [
        helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()
    ]
    outs = [
        helper.make_tensor_value_info(f"{name}_out", kind, shape)
        for name, (kind, shape) in inputs.items()
    ]
    graph = helper.make_graph(nodes, "foreign", ins, outs)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    return path


def test_inputs_are_made_from_any_signature(tmp_path: Path) -> None:
    path = model(
        tmp_path / "foreign.onnx",
        x=(TensorProto.FLOAT, ["n", 3, "h", "w"]),
        ids=(TensorProto.INT64, ["n", 7]),
        on=(TensorProto.BOOL, ["n"]),
        half=(TensorProto.FLOAT16, ["n", 2]),
        scalar=(TensorProto.DOUBLE, []),
        raw=(TensorProto.UINT8, ["n", 4, 4, 3]),
    )
    fed = feeds(Session(path), None, 2)
    assert [(array.dtype.name, array.shape) for array in fed] == [
        ("float32", (2, 3, 224, 224)),
        ("int64", (2, 7)),
        ("bool", (2,)),
        ("float16", (2, 2)),
        ("float64", ()),
        ("uint8", (2, 4, 4, 3)),
    ]
    assert len(Session(path).run(*fed)) == 6


def test_a_fixed_batch_is_kept_and_another_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "fixed.onnx", x=(TensorProto.FLOAT, [1, 3, 8, 8]))
    assert feeds(Session(path), None, 0)[0].shape == (1, 3, 8, 8)
    with pytest.raises(
        FtkitError, match=r"input x: expected batch 4, found 1 in the file. Try without --batch"
    ):
        feeds(Session(path), None, 4)


def test_a_table_of_fixed_size_does_not_need_the_batch(tmp_path: Path) -> None:
    path = model(
        tmp_path / "two.onnx", x=(TensorProto.FLOAT, [4, 8]), scale=(TensorProto.FLOAT, [1, 8])
    )
    assert [array.shape for array in feeds(Session(path), None, 4)] == [(4, 8), (1, 8)]


def test_a_frame_is_fed_to_a_file_without_an_image_and_refused_where_it_has_no_size(
    tmp_path: Path, bundle: Path
) -> None:
    """Regression: noise of 224 x 224 was compared with a baseline's frames of 1280 x 720."""
    fed = feeds(Session(bundle / "model.onnx"), None, 1, "320x240")
    assert [array.shape for array in fed] == [(1, 240, 320, 3)]
    foreign = model(tmp_path / "foreign.onnx", x=(TensorProto.FLOAT, ["n", 3, "h", "w"]))
    with pytest.raises(FtkitError, match="expected a file that ftkit exported"):
        feeds(Session(foreign), None, 1, "320x240")


def test_files_for_other_batches_are_not_compared(tmp_path: Path) -> None:
    one, eight = (
        model(tmp_path / f"{batch}.onnx", x=(TensorProto.FLOAT, [batch, 3, 8, 8]))
        for batch in (1, 8)
    )
    with pytest.raises(FtkitError, match="one batch size, found 1 and 8"):
        compare_latency(Condition(model=str(one)), Condition(model=str(eight)), seconds=5)


def test_processors_without_a_name_are_told_apart(tmp_path: Path) -> None:
    models = []
    for part in ("0xd0c", "0xd4f"):
        info = tmp_path / part
        core = f"processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: {part}\n"
        info.write_text(f"{core}\n{core}\nHardware\t: none\n")
        models.append(_model_of_cpu(info)["cpu_model"])
    assert models == ["0x41 0x3 0xd0c", "0x41 0x3 0xd4f"]


def test_what_cannot_be_made_up_is_named(tmp_path: Path) -> None:
    path = model(tmp_path / "words.onnx", words=(TensorProto.STRING, ["n"]))
    with pytest.raises(FtkitError, match=r"input words: expected numbers, found tensor\(string\)"):
        measure(Condition(model=str(path)))


def test_a_condition_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = model(tmp_path / "small.onnx", x=(TensorProto.FLOAT, ["n", 64]))
    found = measure(Condition(model=str(path), threads=1, batch=3, copies=False), quick=True)
    assert (found.threads, found.batch, found.copies, found.quick) == (1, 3, False, True)
    assert found.low_ms <= found.p50_ms <= found.p90_ms <= found.p95_ms
    assert sum(found.histogram) == found.runs >= 1000
    assert len(found.histogram) == BINS
    assert found.p99_ms is not None and found.p99_ms == pytest.approx(found.high_ms)
    assert found.size_bytes == path.stat().st_size
    start = measure_start(Condition(model=str(path), threads=1))
    assert start.cold_ms == start.import_ms + start.session_ms + start.first_run_ms
    assert 10e6 < start.peak_rss_bytes < 500e6
    assert start.p50_ms <= start.p95_ms


def test_runs_on_the_device_give_what_copied_ones_give(tmp_path: Path) -> None:
    """IO binding keeps inputs and outputs on the device; on the CPU this can be checked."""
    session = Session(model(tmp_path / "small.onnx", x=(TensorProto.FLOAT, ["n", 4])))
    ones = np.ones((2, 4), np.float32)
    assert session.bound(ones)()[0].numpy().tolist() == session.run(ones)[0].tolist()


def test_every_call_goes_first_as_often_and_follows_every_other(tmp_path: Path) -> None:
    said: list[str] = []
    times = in_turn(
        [lambda name=name: said.append(name) for name in "abc"], 12, warm_up=(0, 0), seconds=60
    )
    rounds = ["".join(said[i : i + 3]) for i in range(0, 36, 3)]
    assert times.shape == (12, 3)
    assert {name: sum(each[0] == name for each in rounds) for name in "abc"} == {
        "a": 4,
        "b": 4,
        "c": 4,
    }
    assert {each[i : i + 2] for each in rounds for i in (0, 1)} == {
        "ab",
        "ba",
        "bc",
        "cb",
        "ca",
        "ac",
    }


def test_a_slow_model_ends_on_time_though_not_before_three_rounds() -> None:
    assert in_turn([lambda: None], 40, warm_up=(0, 0), seconds=0).shape == (3, 1)


def _races(trials: int, *, faster: float = 0.0) -> int:
    """Number of simulated races in which the second file is called "faster".

    Each session has its own speed in every process (deviation 1 %), and each run its own noise.
    """
    rng, said = np.random.default_rng(5), 0
    for _ in range(trials):
        sessions = rng.normal([0, 0, -faster], 0.01, (PROCESSES, 1, 3))
        times = 5 * np.exp(sessions + 0.03 * np.abs(rng.standard_t(3, (PROCESSES, ROUNDS, 3))))
        said += compared(times.tolist())[1].ratio_high < 1
    return said


def test_a_file_is_seldom_faster_than_itself_and_a_faster_one_is_found() -> None:
    """With one process, 11 of 83 races called a file faster than itself."""
    assert _races(300) <= 300 * 0.025 + 6
    assert _races(100, faster=0.05) >= 95


def test_a_race_is_over_several_processes_and_knows_a_faster_file(
    bundle: Path, tmp_path: Path
) -> None:
    slow = onnx.load(bundle / "variants" / "fp32-core.onnx")
    extra = [helper.make_node("Identity", ["pixels"], ["waste0"])]
    extra += [
        helper.make_node("Softmax", [f"waste{i}"], [f"waste{i + 1}"], axis=1) for i in range(4)
    ]
    slow.graph.node.extend(extra)
    slow.graph.output.append(helper.make_tensor_value_info("waste4", TensorProto.FLOAT, None))
    onnx.save(slow, tmp_path / "slow.onnx")
    first, fast = race(
        [tmp_path / "slow.onnx", bundle / "variants" / "fp32-core.onnx"],
        bundle / "golden" / "00.png",
    )
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert fast.processes == first.processes == PROCESSES
    assert fast.ratio_low < fast.ratio < fast.ratio_high < 1
    assert 0 < fast.p50_ms <= fast.p95_ms
