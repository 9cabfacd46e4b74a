"""The parts of a report that are about labels, or about numbers, instead of classes.

sections = target_sections(run, judged)       # figures, accuracy, outputs, confidence, words
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftkit.report import charts
from ftkit.report.pages import Table, where_judged
from ftkit.utils import console
from ftkit_export.proof.intervals import ground

Data = Mapping[str, Any]
WORST_AP = 0.5  # average precision below which a label is marked

WORDS = {
    "multi-label": {
        "outputs": "labels",
        "metric": "macro-AP",
        "by-class": "By label",
        "mistakes": "Wrong labels, the most confident first.",
        "head": ("image", "true", "predicted", "probability"),
        "readout": "a sigmoid for each label",
    },
    "regression": {
        "outputs": "quantities",
        "metric": "mean absolute error",
        "by-class": "By quantity",
        "mistakes": "The largest errors first.",
        "head": ("image", "true", "predicted", "error in standard deviations"),
        "readout": "values in their units",
    },
}


def counted(task: str, count: int) -> str:
    """How many labels or quantities, in words."""
    one = "label" if task == "multi-label" else "quantity"
    return f"{count} {one if count == 1 else WORDS[task]['outputs']}"


def task_name(run: Data) -> str:
    """The task of a run (run.json)."""
    task: str = (run.get("task") or {"name": "single-label"})["name"]  # not in older runs
    return task


def target_sections(run: Data, test: Data, judged: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    """What the report says instead of its sections about classes.

    test: metrics of the file or, before an export, of the model. judged: (who, metrics), for the table.
    """
    if task_name(run) == "multi-label":
        return _labels(run, test, judged)
    return _values(run, test, judged)


def _labels(run: Data, test: Data, judged: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    known = [label for label in test["labels"] if label["ap"] is not None]
    worst = min(known, key=lambda label: label["ap"], default=None)
    figures = [
        _figure("macro-AP on held-out images", test["macro_ap"], test, "macro_ap"),
        {
            "name": f"worst label {worst['name'] if worst else ''}",
            "value": f"{worst['ap']:.3f}" if worst else "",
            "detail": "average precision",
            "bad": bool(worst and worst["ap"] < WORST_AP),
        },
    ]
    head = (
        "model",
        "images",
        "macro-AP",
        "95 % interval",
        "groups",
        "macro F1",
        "all right",
        "loss",
    )
    rows = [
        (
            who,
            m["images"],
            m["macro_ap"],
            _range(m["macro_ap_low"], m["macro_ap_high"]),
            _groups(m),
            m["macro_f1"],
            m["subset_accuracy"],
            m["loss"],
        )
        for who, m in judged
    ]
    thresholds = run["readout"]["thresholds"]
    by_label = [
        (
            label["name"],
            label["images"],
            label["positives"],
            label["ap"],
            _range(label["ap_low"], label["ap_high"]),
            "never said" if threshold > 1 else threshold,
            label["f1"],
            label["precision"],
            label["recall"],
            label["ece"],
        )
        for label, threshold in zip(test["labels"], thresholds, strict=True)
    ]
    columns = (
        "label",
        "images",
        "with it",
        "AP",
        "95 % interval",
        "threshold",
        "F1",
        "precision",
        "recall",
        "ECE",
    )
    outputs = Table(columns, by_label)
    if precision := run.get("precision"):
        shown = f"{precision['wanted']:.0%} precision"
        labels = zip(by_label, precision["labels"], strict=True)
        outputs = Table((*columns, shown), [(*row, held) for row, held in labels])
    named = {f"{when} calibration": run["reliability"][when] for when in ("before", "after")}
    temperatures = ", ".join(f"{value:.2f}" for value in run["readout"]["temperatures"])
    return {
        "figures": figures,
        "accuracy": Table(head, rows),
        "outputs": outputs,
        "confidence": {
            "chart": charts.reliability_chart("Reliability of labels on held-out images", named),
            "text": f"Temperatures {temperatures} and thresholds were fitted {where_judged(run)}, for each label. "
            f"{_foreign(run)}",
        },
    }


def _values(run: Data, test: Data, judged: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    first = test["quantities"][0]
    covered = first["covered"]["value"]
    unit = run["task"]["units"][0] if len(run["task"]["units"]) == 1 else "standard deviations"
    figures = [
        _figure(f"mean absolute error{unit and ', '}{unit}", test["mae"], test, "mae"),
        {
            "name": f"of the true values of {first['name']} inside their intervals",
            "value": "" if covered is None else f"{covered:.1%}",
            "detail": f"{test['share']:.0%} wanted; {_between(first['covered'])} (95 %)",
            "bad": covered is not None and first["covered"]["high"] < test["share"],
        },
    ]
    head = ("model", "images", "mean absolute error", "95 % interval", "groups", "loss")
    rows = [
        (
            who,
            m["images"],
            m["mae"],
            _range(m["mae_low"], m["mae_high"]),
            _groups(m),
            m["loss"],
        )
        for who, m in judged
    ]
    by_quantity = [
        (
            f"{q['name']} [{q['unit']}]" if q["unit"] else q["name"],
            q["images"],
            *(_told(q[name]) for name in ("mae", "rmse", "r2", "rank")),
            f"+-{q['margin']:.3g}",
            _told(q["covered"]),
        )
        for q in test["quantities"]
    ]
    columns = ("quantity", "images", "MAE", "RMSE", "R2", "rank correlation", "interval", "covered")
    chart = charts.scatter(
        f"{first['name']} on held-out images",
        run["residuals"],
        f"true{first['unit'] and ', '}{first['unit']}",
        "predicted",
        first["margin"],
    )
    return {
        "figures": figures,
        "accuracy": Table(head, rows),
        "outputs": Table(columns, by_quantity),
        "confidence": {
            "chart": chart,
            "text": f"The dashed lines are the interval, fitted {where_judged(run)} to hold {test['share']:.0%} of the "
            f"true values. {_foreign(run)}",
        },
    }


def _figure(name: str, value: float | None, test: Data, key: str) -> dict[str, Any]:
    between = _range(test[f"{key}_low"], test[f"{key}_high"])
    return {
        "name": name,
        "value": "" if value is None else console.figure(value),
        "detail": f"{between or 'no interval'} (95 %; {ground(test['images'], test['clusters'])})",
        "bad": False,
    }


def _groups(metrics: Data) -> Any:
    return "none: as if independent" if metrics["clusters"] is None else metrics["clusters"]


def _told(bounds: Data) -> str:
    if bounds["value"] is None:
        return ""
    return f"{bounds['value']:.3g} [{_between(bounds)}]"


def _between(bounds: Data) -> str:
    return _range(bounds["low"], bounds["high"])


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _foreign(run: Data) -> str:
    return (
        f"{run['foreign_kept']:.1%} of the test images pass as in-distribution (95 % {where_judged(run)}); the others "
        "are marked foreign."
    )
