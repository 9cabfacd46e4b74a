"""Provider configurations emulated on a CPU: core form, low precision, capture, GPU memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ftkit

from ftkit_export.conversion.graph import tiny_model
from ftkit_export.proof.parity import measure_parity
from ftkit_export.runtime.errors import FtkitError, ProviderError
from ftkit_export.runtime.latency import Condition
from ftkit_export.runtime.measure import conditions, find
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.preprocess import decode
from ftkit_export.runtime.readout import OneClass
from ftkit_export.runtime.session import PROVIDERS, Provider, Session, offered
from ftkit_export.runtime.timing import bound_call
from ftkit_export.runtime.verify import verify

CPU = "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the CPU like a GPU: on the core form, in lower precision, captured."""
    monkeypatch.setitem(PROVIDERS, "core", Provider(name=CPU, form="core"))  # type: ignore[misc]
    monkeypatch.setitem(PROVIDERS, "rounded", Provider(name=CPU, form="core", precision="tf32"))  # type: ignore[misc]
    monkeypatch.setitem(PROVIDERS, "captured", Provider(name=CPU, form="core", captured=True))  # type: ignore[misc]


def test_every_gpu_row_runs_the_core_form_and_only_what_is_named_rounds() -> None:
    rows = {name: row for name, row in PROVIDERS.items() if row.gpu}
    assert {row.form for row in rows.values()} == {"core"}
    for name, row in rows.items():
        if row.name == "CUDAExecutionProvider":
            assert (row.options["use_tf32"], row.precision) == (
                ("1", "tf32") if name == "cuda-tf32" else ("0", "")
            )
    assert [name for name, row in rows.items() if row.captured] == ["cuda-graph"]


def test_the_core_form_gives_the_image_forms_answers(bundle: Path, photos: Path) -> None:
    image, core = Classifier(bundle), Classifier(bundle, provider="core")
    assert (image.session.input_names, core.session.input_names) == (["image"], ["pixels"])
    for path in sorted(photos.rglob("*.png"))[::17]:
        one, other = image(path), core(path)
        assert (one.label, one.foreign, one.doubtful) == (
            other.label,
            other.foreign,
            other.doubtful,
        )
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.02), (
            "Pillow's pixels, one grey level off"
        )


def test_a_bundle_verifies_on_its_core_forms_where_a_provider_runs_those(bundle: Path) -> None:
    assert {check.name for check in verify(bundle).checks} > {
        check.name for check in verify(bundle, "core").checks
    }
    for provider in ("core", "rounded"):
        found = verify(bundle, provider)
        assert found.passed
        assert all(check.name.endswith("logits") for check in found.checks)
    exact, rounded = verify(bundle, "core").checks[0], verify(bundle, "rounded").checks[0]
    assert rounded.value < exact.value / 5, (
        "TF32 rounds off much more than CUDA's float32 is allowed"
    )


def test_what_rounds_is_held_to_agreement_and_the_core_form_to_its_tolerance(
    run: Path, bundle: Path
) -> None:
    from ftkit.training.run import open_run
    from ftkit_export.proof.parity import ExportedModel, Reference

    opened, image = open_run(run), bundle / "golden" / "00.png"
    canvases = np.stack([opened.preprocess.canvas(decode(image))])
    model = ExportedModel(
        core=bundle / "variants" / "fp32-core.onnx",
        image=bundle / "model.onnx",
        preprocess=opened.preprocess,
        readout=OneClass(),
    )
    found = {
        name: measure_parity(
            Reference(opened.backbone().model), model, canvases, [decode(image)], name
        )
        for name in ("core", "rounded")
    }
    assert all(parity.passed for parity in found.values())
    names = {name: {check.name for check in parity.checks} for name, parity in found.items()}
    assert names["core"] == {"core logits", "core top-1 disagreements"}
    assert "tf32 logits" in names["rounded"]
    assert all(
        parity.placement == "every operator on CPUExecutionProvider" for parity in found.values()
    )
    assert not any(
        "pixels" in name or "probabilities" in name for each in names.values() for name in each
    )


def test_the_form_that_a_provider_runs_is_what_is_measured(bundle: Path, tmp_path: Path) -> None:
    found = find(bundle)
    assert found.shipped("cpu") == bundle / "model.onnx"
    assert found.shipped("cuda").name.endswith("-core.onnx")
    assert set(found.run_by("cuda")) == set(found.run_by("cpu"))
    plain = shutil.copy(bundle / "model.onnx", tmp_path / "plain.onnx")
    assert find(plain).shipped("cuda") == plain, "a plain file has one form"
    path = found.shipped("cuda")
    listed = [
        (item.provider, item.batch, item.copies)
        for item in conditions(path, ["cuda", "cuda-graph"], [1, 2], [8])
    ]
    assert listed == [("cuda", 8, True), ("cuda", 8, False), ("cuda-graph", 8, False)]


def test_a_captured_graph_is_run_by_binding_and_its_outputs_keep_their_place() -> None:
    session = Session(tiny_model().SerializeToString(), provider="captured")
    pixels = np.random.default_rng(0).random((4, 3, 8, 8), np.float32)
    with pytest.raises(
        ProviderError, match=r"provider captured: expected to be run with IO binding.*Try cuda"
    ):
        session.run(pixels)
    call = bound_call(session, Condition(model="", provider="captured"), [pixels])
    (first,), (second,) = call(), call()  # type: ignore[misc]
    assert first.data_ptr() == second.data_ptr()
    assert np.array_equal(second.numpy(), Session(tiny_model().SerializeToString()).run(pixels)[0])


def test_an_export_refuses_a_provider_whose_parity_cannot_be_measured(
    run: Path, tmp_path: Path
) -> None:
    result = ftkit("export", run, "--out", tmp_path / "bundle", "--providers", "captured")
    assert (result.exit_code, "expected one that parity can be measured on" in result.stderr) == (
        2,
        True,
    )


DRIVER = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
static int known(void *device) { return device == (void *)7; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)7; return index != 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) {
    strncpy(text, "NVIDIA Test", size);
    return !known(device);
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.65", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory *found) {
    found->total = 80; found->free = 50; found->used = 30;
    return !known(device);
}
"""


def test_gpu_name_driver_and_memory_come_from_the_drivers_library(tmp_path: Path) -> None:
    """A library with the NVML functions replaces the driver's."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "nvml.c").write_text(DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    code = "import json; from ftkit_export.runtime import nvidia as n; print(json.dumps([n.facts(), n.used_bytes()]))"
    for folder, expected in (
        (tmp_path, [{"gpu": "NVIDIA Test", "driver": "580.65"}, 30]),
        (Path("/"), None),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"LD_LIBRARY_PATH": str(folder), "PATH": "/usr/bin"},
        )
        if expected or not _driver_here():
            assert json.loads(done.stdout) == (expected or [{}, None])


def _driver_here() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def test_a_missing_library_is_named_with_where_it_comes_from() -> None:
    if _driver_here():
        pytest.skip("there is an NVIDIA driver")
    lines = ftkit("doctor").stdout
    assert (
        "provider cuda      does not open: libcuda.so.1 is missing: install the NVIDIA driver"
        in lines
    )
    assert "does not open: libnvinfer.so.10 is missing: install TensorRT 10" in lines
    with pytest.raises(FtkitError, match=r"libcuda\.so\.1"):
        Session(tiny_model().SerializeToString(), provider="cuda-tf32")


OPENED = """
import torch, onnxruntime, sys
from ftkit_export.conversion.graph import tiny_model
from ftkit_export.runtime.session import PROVIDERS
onnxruntime.set_default_logger_severity(4)
onnxruntime.preload_dlls()
rows = {name: dict(row.options) for name, row in PROVIDERS.items() if row.name == "CUDAExecutionProvider"}
for name, options in {**rows, "wrong name": {"tf32": "0"}, "wrong value": {"cudnn_conv_algo_search": "FAST"}}.items():
    try:
        model = tiny_model().SerializeToString()
        providers = [("CUDAExecutionProvider", options)]
        found = onnxruntime.InferenceSession(model, providers=providers, enable_fallback=0).get_providers()[0]
    except Exception as error:
        found = str(error)
    print(name, "unreadable" if "FromProviderOptions" in found else "read", "CudaCall" in found, sep=",")
"""


@pytest.mark.skipif("cuda" not in offered(), reason="needs an ONNX Runtime for CUDA")
def test_onnxruntimes_cuda_provider_reads_the_options_of_every_row(tmp_path: Path) -> None:
    """The real provider with a driver that finds no GPU.

    It parses the options first, and fails at the first call.
    """
    if _driver_here() or not shutil.which("gcc"):
        pytest.skip("needs gcc, and no NVIDIA driver")
    (tmp_path / "cuda.c").write_text(
        "int cuInit(unsigned f) { return 100; } int cuTensorMapEncodeTiled(void) { return 1; }"
    )
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, tmp_path / "cuda.c"],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", OPENED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )
    lines = [line.split(",") for line in done.stdout.splitlines()]
    assert {line[0]: line[1] for line in lines[-2:]} == {
        "wrong name": "unreadable",
        "wrong value": "unreadable",
    }
    assert len(lines) == 7
    assert all(line[1:] == ["read", "True"] for line in lines[:-2]), done.stdout
