"""Time from a clone to a verified bundle on a class folder of 200 images, following docs/index.md.

    python bench/newcomer.py                 # about six minutes and 6 GB of disk in a temporary folder; needs git

The page's own commands run, in order, in a fresh clone with an empty cache (except `ftkit try`,
which waits for a person).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from ftkit.cli.demo import write_elpv
from ftkit.utils import console

EACH = 100  # images in each of two classes
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print each command with its seconds, then the totals."""
    page = (ROOT / "docs" / "index.md").read_text().split("## ")[0]
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [line for line in commands if not line.startswith("ftkit try")]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_elpv(folder / "all", split=False)
        environment = {
            **os.environ,
            "FTKIT_CACHE": str(folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        rows = [("command", "seconds")]
        whole = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "ftkit")], check=True)

        for label in ("mono-ok", "mono-defect"):
            place = folder / "ftkit" / "photos" / label
            place.mkdir(parents=True)
            for path in sorted((folder / "all" / label).iterdir())[:EACH]:
                path.rename(place / path.name)

        activated = ""
        for command in commands:
            begun = time.perf_counter()
            done = subprocess.run(
                ["bash", "-ec", f"{activated}{command}"],
                cwd=folder / "ftkit",
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )

            rows.append((command, f"{time.perf_counter() - begun:.0f}"))
            activated += f"{command}\n" if "activate" in command else ""

            if done.returncode:
                print(done.stdout, done.stderr)
                raise SystemExit(f"{command}: exit {done.returncode}")
            if command.startswith("ftkit verify"):
                verified = time.perf_counter() - whole

    print(console.table(rows))
    lines = [line for line in page.splitlines() if line.strip()]
    # plus 1 for the clone
    last = next(i for i, line in enumerate(commands, start=2) if line.startswith("ftkit verify"))
    print(
        f"from clone to verified bundle: {console.clock(verified)}, {last} commands; {len(lines)} lines to read"
    )


if __name__ == "__main__":
    main()
