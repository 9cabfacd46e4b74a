"""Tables of bench/README.md that a benchmark writes itself, between <!-- NAME --> and <!-- end -->."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from ftkit_export.latency import machine

README = Path(__file__).parent / "README.md"


def write(name: str, table: str) -> None:
    """Replace what stands between NAME's marks by the table, the machine and today's date; print it."""
    facts = machine()
    where = f"{facts['cores']} cores of {facts['cpu']}, ONNX Runtime {facts['onnxruntime']}, {date.today()}."
    text, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{where}\n\n{table}\n{found[2]}",
        README.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{README}: expected one mark for {name}, found {count}"
    README.write_text(text)
    print(f"\n{where}\n{table}")
