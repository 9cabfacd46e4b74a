"""Write benchmark tables into bench/README.md and bench/gpu.md.

Tables stand between <!-- NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

from ftkit_export.runtime.latency import machine

README, GPU = (Path(__file__).parent / name for name in ("README.md", "gpu.md"))


def write(name: str, table: str, file: Path = README) -> None:
    """Replace the text between NAME's marks with machine, today's date and the table; print it."""
    facts = machine()
    where = f"{facts['cores']} cores of {facts['cpu']}, ONNX Runtime {facts['onnxruntime']}, {date.today()}."

    if "gpu" in facts:
        where = f"{facts['gpu']}, driver {facts['driver']}, PyTorch {version('torch')}; {where}"

    text, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{where}\n\n{table}\n{found[2]}",
        file.read_text(),
        flags=re.DOTALL,
    )

    assert count == 1, f"{file}: expected one mark for {name}, found {count}"
    file.write_text(text)
    print(f"\n{where}\n{table}")
