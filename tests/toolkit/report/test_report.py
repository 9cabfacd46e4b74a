"""Report and web page in a real browser; Python interface, explanations, training events."""

import http.client
import http.server
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ftkit, needs_browser, open_page, settings
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ftkit as package
from ftkit.exporting import web
from ftkit.models.backbones import build
from ftkit.report.build import load_pictures, write_report
from ftkit.training.run import open_run
from ftkit.training.tensorboard import tensorboard
from ftkit_export.conversion.class_activation import Explainer, with_features
from ftkit_export.conversion.convert import export_core, write
from ftkit_export.runtime.predict import Classifier
from ftkit_export.runtime.preprocess import decode
from ftkit_export.runtime.session import Session


@needs_browser
def test_the_report_shows_every_figure_on_a_desk_and_on_a_phone(
    bundle: Path, run: Path, browser: Any
) -> None:
    for width, scheme in ((1280, "light"), (400, "dark")):
        page, wrong = open_page(
            browser, (bundle / "report.html").as_uri(), width, color_scheme=scheme
        )
        titles = page.locator("h2").all_inner_texts()
        assert {
            "Gates",
            "Training",
            "By class",
            "How sure it is",
            "Variants",
            "Parity with the framework",
            "Data",
            "Latency, cold start, memory",
            "Worst mistakes",
            "Reproduce",
        } <= set(titles)
        drawings = page.locator("svg")
        assert drawings.count() >= 3 + 1 + 1 + 1 + 2, (
            "curves and drift, reliability, decision, parity, latencies"
        )
        for i in range(drawings.count()):
            box = drawings.nth(i).bounding_box()
            assert box["width"] > 150, page.locator("figcaption").nth(i).inner_text()
            assert box["x"] + box["width"] <= width
            assert drawings.nth(i).get_attribute("aria-label")
            outside = drawings.nth(i).evaluate(
                "(s) => { const b = s.getBoundingClientRect(); return [...s.querySelectorAll('text')].filter((t) => {"
                "const r = t.getBoundingClientRect(); return r.left < b.left - 1 || r.right > b.right + 1 ||"
                "r.top < b.top - 2 || r.bottom > b.bottom + 2 }).map((t) => t.textContent) }"
            )
            assert outside == [], page.locator("figcaption").nth(i).inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "the page itself never scrolls sideways"
        )
        assert all(
            page.evaluate(
                "[...document.images].map((i) => i.complete && i.naturalWidth > 0 && i.alt !== '')"
            )
        )
        assert page.locator("img").count() == 2 * len(open_run(run).data["mistakes"]), (
            "photograph and heat map"
        )
        assert wrong == []
    text = (bundle / "report.html").read_text()
    assert len(text) < 3_000_000
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text), "no network"
    assert str(run.parent) not in text, "no local path"
    recipe = json.loads(page.evaluate("document.querySelectorAll('details pre')[0].textContent"))
    assert recipe == open_run(run).data["recipe"]


def test_what_a_report_shows_is_escaped_and_has_no_place_of_this_machine(
    run: Path, tmp_path: Path
) -> None:
    data = json.loads((run / "run.json").read_text())
    data["recipe"]["stages"][0]["teacher"] = "/home/somebody/teacher"
    data["recipe"]["weights"] = "/home/somebody/weights.pth"
    data["data"] = "/home/somebody/photos"
    data |= {"root": "/home/somebody", "add": "/home/somebody/more.csv", "max_pixels": "7"}
    data["bad_files"] = [["/home/somebody/photos/a/cut.png", "truncated"]]
    data["classes"][0] = "<script>alert(1)"
    data["mistakes"][0]["image"] = data["mistakes"][0]["said"] = '<script>"&'
    write_report(tmp_path / "r.html", data, [], load_pictures(run / "mistakes"))
    text = (tmp_path / "r.html").read_text()
    assert "--root ROOT --add ADD --max-pixels 7" in text, (
        "another command would train another model"
    )
    assert "somebody" not in text
    assert "<script" not in text
    assert "&lt;script&gt;&#34;&amp;" in text


def test_a_report_of_a_run_is_written_again_and_a_bundles_is_only_copied(
    run: Path, bundle: Path, tmp_path: Path
) -> None:
    before = (run / "report.html").read_bytes()
    assert ftkit("report", run, "--out", tmp_path / "run.html").exit_code == 0
    assert (tmp_path / "run.html").read_bytes() == before
    assert b"trained, not exported yet" in before
    assert ftkit("report", bundle, "--out", tmp_path / "bundle.html").exit_code == 0
    assert (tmp_path / "bundle.html").read_bytes() == (bundle / "report.html").read_bytes()


@pytest.fixture(scope="module")
def site(bundle: Path) -> Iterator[str]:
    with web.serving(bundle, web.runtime()) as url:
        yield url


@needs_browser
def test_the_browser_computes_what_was_exported(
    site: str, bundle: Path, photos: Path, browser: Any
) -> None:
    """ONNX Runtime Web itself: golden vectors, then photographs, a camera, an invalid file."""
    page, wrong = open_page(browser, site)
    page.wait_for_selector("#parity.good, #parity.bad, #engine.bad", timeout=60_000)
    assert re.match(
        r"\d+ golden vectors passed, worst at \d\.\d\d of its tolerance", page.inner_text("#parity")
    )
    assert "on wasm" in page.inner_text("#engine")
    classify = Classifier(bundle)
    for folder in sorted(path for path in photos.iterdir() if path.is_dir()):
        path = sorted(folder.iterdir())[0]
        page.evaluate("delete document.getElementById('verdict').dataset.label")
        page.set_input_files("#file", path)
        page.wait_for_selector("#verdict[data-label]")
        answer, verdict = classify(path), page.locator("#verdict")
        assert verdict.get_attribute("data-label") == answer.label
        assert verdict.get_attribute("data-remark") == answer.remark
        found = dict(
            zip(
                (t.split("\n")[1] for t in page.locator("#bars li").all_inner_texts()),
                map(float, page.locator("#bars span").all_inner_texts()),
                strict=True,
            )
        )
        assert found == {
            name: pytest.approx(value, abs=2e-3) for name, value in answer.probabilities.items()
        }
    assert re.match(r"[\d.]+ ms for 300 x 300 pixels", page.inner_text("#latency"))
    page.set_input_files("#file", bundle / "labels.txt")
    page.wait_for_selector("#verdict.bad")
    assert "expected an image this browser can read" in page.inner_text("#verdict")
    page.evaluate("delete document.getElementById('verdict').dataset.label")
    page.click("#camera")
    page.wait_for_selector("#verdict[data-label]")
    page.click("#camera")
    assert page.inner_text("#camera") == "Use the camera"
    assert wrong == []


def test_the_page_is_for_this_machine_only(site: str, bundle: Path) -> None:
    port = int(site.split(":")[2].split("/")[0])

    def status(path: str, host: str = f"127.0.0.1:{port}", method: str = "GET") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(method, path, headers={"Host": host})
        return connection.getresponse().status

    assert status("/labels.txt") == 200
    assert status("/labels.txt", host="localhost") == 200
    for method in ("GET", "HEAD"):
        assert status("/manifest.json", host=f"elsewhere.example:{port}", method=method) == 403
    assert (bundle.parent / "export.txt").is_file()
    for path in (
        "/../export.txt",
        "/device/web/../../../export.txt",
        "/%2e%2e/export.txt",
        "/golden/",
        "/device/",
    ):
        assert status(path) == 404, path
    link = bundle / "link.txt"
    link.symlink_to(bundle.parent / "export.txt")
    try:
        assert status("/link.txt") == 404
    finally:
        link.unlink()
    assert not (bundle / "device" / "web").exists(), "the sealed bundle stays as it is"


def test_what_is_not_the_runtime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    (tmp_path / "other.tgz").write_bytes(b"other")
    precious = tmp_path / ".ssh"  # FTKIT_CACHE may be a folder with the user's own files
    precious.mkdir()
    os.utime(precious, (0, 0))
    refused = ftkit("try", bundle, "--runtime", tmp_path / "other.tgz")
    assert (refused.exit_code, "found other bytes" in refused.stderr) == (2, True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = ftkit("try", bundle)
    assert (missing.exit_code, "expected npm to fetch onnxruntime-web" in missing.stderr) == (
        2,
        True,
    )
    assert list((tmp_path / "web").iterdir()) == [], "nothing half unpacked is left"
    assert precious.is_dir()


def test_a_heat_map_adds_up_to_the_logit(
    bundle: Path, run: Path, photos: Path, tmp_path: Path
) -> None:
    """Class activation maps (Zhou et al.): mean of the map plus bias of the head is the logit."""
    explain, image = Explainer(bundle), decode(next((photos / "poly-ok").iterdir()))
    model = open_run(run).backbone()
    head = model.model.get_submodule(model.head)
    classify = Classifier(
        bundle / json.loads((bundle / "manifest.json").read_text())["variants"]["fp32"]["core"]
    )
    logits, _ = classify.session.run(
        classify.preprocess.pixels(classify.preprocess.canvas(image)[None])
    )
    for label in range(4):
        heat, _ = explain(image, label)
        assert heat.shape == (3, 3)
        assert heat.mean() + head.bias[label].item() == pytest.approx(logits[0, label], abs=1e-4)
    folder = tmp_path / "why"
    told = ftkit("predict", bundle, photos / "poly-ok", "--explain", "--out", folder, "--json")
    assert told.exit_code == 0, told.output
    paths = [Path(json.loads(line)["explained"]) for line in told.stdout.splitlines()]
    assert len(set(paths)) == len(list((photos / "poly-ok").iterdir()))
    again = ftkit(
        "predict",
        bundle,
        next((photos / "poly-ok").iterdir()),
        "--explain",
        "--out",
        folder,
        "--json",
    )
    assert Path(json.loads(again.stdout)["explained"]) not in paths, "nothing is written over"
    picture = np.asarray(Image.open(paths[0]), np.int16)
    assert picture.shape == (96, 96, 3)
    assert np.abs(picture[..., 0] - picture[..., 2]).max() > 40, "colour over a grey photograph"


@pytest.mark.parametrize("cut", ["blocks.2", "blocks.0+blocks.1+blocks.3"])
def test_a_heat_map_of_maxima_and_of_several_depths_adds_up_too(cut: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build("efficientnet_lite0", 3, "none", cut=cut, pooling="mean+max")
    core = export_core(backbone.model.eval(), 64).model
    explained = with_features(core)
    assert explained
    (tmp_path / "variants").mkdir()
    preprocess = backbone.preprocess.at(64)
    metadata = {"preprocess": json.dumps(asdict(preprocess))}
    write(explained, tmp_path / "variants" / "explain.onnx", metadata)
    image = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    pixels = preprocess.pixels(preprocess.canvas(image)[None])
    logits = Session(core.SerializeToString()).run(pixels)[0]
    bias = backbone.model.get_submodule(backbone.head).bias
    explain = Explainer(tmp_path)
    for label in range(3):
        heat, _ = explain(image, label)
        assert heat.mean() + bias[label].item() == pytest.approx(logits[0, label], abs=1e-4)
        assert heat.std() > 0


class Between(torch.nn.Module):
    """Like MobileNetV3: has a layer between the pooling and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.between, self.head = (
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.Linear(4, 6),
            torch.nn.Linear(6, 3),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.between(self.stem(pixels).mean((2, 3)))))


def test_a_backbone_without_a_pooled_linear_head_says_so(tmp_path: Path, bundle: Path) -> None:
    assert with_features(export_core(Between().eval(), 16).model) is None
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "variants" / "explain.onnx").unlink()
    refused = ftkit("predict", tmp_path / "b", bundle / "golden" / "00.png", "--explain")
    assert (
        refused.exit_code,
        "its backbone has no linear head over pooled" in refused.stderr,
    ) == (2, True)


def _served_anyhow(browser: Any, folder: Path) -> tuple[Any, list[str], str]:
    """Serve device/web with a static server that sets no special headers."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, wrong = open_page(browser, f"http://127.0.0.1:{server.server_port}/device/web/")
        page.wait_for_selector("#parity.good, #parity.bad, #engine.bad", timeout=60_000)
        said = page.inner_text("#parity")
        server.shutdown()
    return page, wrong, said


def test_python_does_what_the_command_line_does(
    run: Path, bundle: Path, photos: Path, tmp_path: Path, browser: Any
) -> None:
    """train (with events), export, verify, bench, load; notebook display of a run and an export."""
    changes = ["preprocess.size=64", "preprocess.resize=64", "stages.0.epochs=2"]
    trained = package.train(
        photos, out=tmp_path / "run", recipe="gentle", settings=changes, tensorboard=True
    )
    assert f"test accuracy {trained.metrics['test']['accuracy']:.3f}" in trained._repr_html_()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [item.value for item in events.Scalars("loss/train")] == pytest.approx(
        [line["loss"] for line in lines]
    )
    changes = ["export.variants=fp32", "export.golden=synthetic"]
    done = package.export(
        run, out=tmp_path / "b", settings=changes, quick=True, quiet=True, web=True
    )
    assert (done.passed, done.folder) == (True, tmp_path / "b")
    assert "all gates passed" in done._repr_html_()
    assert package.verify(done.folder).passed
    assert "data:image" not in (done.folder / "report.html").read_text(), "no photograph leaves"
    if browser:
        _, wrong, said = _served_anyhow(browser, done.folder)
        assert (wrong, "golden vectors passed" in said) == ([], True)
    assert (
        package.bench(done.folder / "model.onnx", threads=[1], quick=True)["rows"][0]["p50_ms"] > 0
    )
    zipped = bundle.with_name(bundle.name + ".zip")
    photo = next((photos / "mono-ok").iterdir())
    answer = package.load(zipped)(photo)
    assert f"  {answer.label}  {answer.probability:.3f}" in ftkit("predict", zipped, photo).stdout


def test_quiet_says_nothing_and_leakage_can_be_allowed(photos: Path, tmp_path: Path) -> None:
    for split, picks in (("train", slice(0, 12)), ("val", slice(12, 15)), ("test", slice(11, 15))):
        for label in ("mono-ok", "poly-ok"):
            (tmp_path / "d" / split / label).mkdir(parents=True)
            for path in sorted((photos / label).iterdir())[picks]:
                shutil.copy(path, tmp_path / "d" / split / label)
    small = settings("preprocess.size=64", "preprocess.resize=64", "stages.0.epochs=1")
    command = (
        "train",
        tmp_path / "d",
        "--out",
        tmp_path / "run",
        "--recipe",
        "gentle",
        *small,
        "--quiet",
    )
    assert "found 8 that they share" in ftkit(*command).stderr
    done = ftkit(*command, "--allow-leakage")
    assert (done.exit_code, done.output) == (0, "")
    assert open_run(tmp_path / "run").data["audit"]["totals"]["leaks"] == 8


def test_a_run_that_learned_nothing_still_ends(photos: Path, tmp_path: Path) -> None:
    """The loss is infinite at once: no epoch counts, the untrained head is evaluated, no curve."""
    small = settings(
        "preprocess.size=64", "preprocess.resize=64", "stages.0.optimizer=sgd", "stages.0.lr=3e38"
    )
    done = ftkit("train", photos, "--out", tmp_path / "run", "--recipe", "gentle", *small)
    assert done.exit_code == 0, done.output
    assert "the loss is no longer finite" in done.stdout
    assert not (tmp_path / "run" / "state").exists()
    assert "Worst mistakes" in (tmp_path / "run" / "report.html").read_text()


def test_events_of_an_interrupted_run_are_not_doubled(tmp_path: Path) -> None:
    line = {
        "loss": 1.0,
        "val_nll": 1.0,
        "train_accuracy": 0.5,
        "val_accuracy": 0.5,
        "lr": 0.1,
        "images_per_s": 9.0,
        "stage": 0,
    }
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the third epoch was not saved
        with tensorboard(tmp_path, done) as log:
            for step in steps:
                log(line, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [item.step for item in events.Scalars("loss/train")] == [1, 2, 3, 4]
