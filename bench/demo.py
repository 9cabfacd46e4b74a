"""Where the time of `make demo` goes: the same commands in one process, each of their parts timed.

python bench/demo.py
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from ftkit import terminal
from ftkit.cli import main as ftkit
from ftkit.demo import SETTINGS, write_elpv


def main() -> None:
    """The demo's commands from nothing cached, then a table."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTKIT_CACHE"] = f"{scratch}/cache"
        data, run, bundle = (f"{scratch}/{name}" for name in ("photos", "run", "bundle"))
        write_elpv(Path(data), split=True)
        commands = (
            ("train", data, "--out", run, *SETTINGS), ("export", run, "--out", bundle, "--quick"), ("verify", bundle),
        )  # fmt: skip
        print_rows = ["| part | seconds |", "|---|---|"]
        for command in commands:
            terminal.spent.clear()
            begun = time.perf_counter()
            try:
                ftkit(command, standalone_mode=False)
            except SystemExit as done:
                assert not done.code, command
            whole, parts = time.perf_counter() - begun, Counter[str]()
            for label, seconds in terminal.spent.items():
                parts[re.sub(r" \d+/\d+$", "", label)] += seconds  # type: ignore[assignment]
            print_rows.append(f"| **ftkit {command[0]}** | **{whole:.1f}** |")
            print_rows += [f"| {label} | {seconds:.1f} |" for label, seconds in parts.most_common()]
            print_rows.append(f"| the rest of {command[0]} | {whole - sum(parts.values()):.1f} |")
        print("\n" + "\n".join(print_rows))


if __name__ == "__main__":
    main()
