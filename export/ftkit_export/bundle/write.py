"""Put the runners into a bundle: what it takes to classify with it and to verify it on a device.

add_runners(folder)
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ftkit_export

PACKAGE = Path(ftkit_export.__file__).parent


def runtime_files() -> list[str]:
    """Files that run on a device, relative to the package's folder.

    They need only numpy, Pillow and ONNX Runtime.
    """
    return [
        "__init__.py",
        *(f"runtime/{path.name}" for path in sorted((PACKAGE / "runtime").glob("*.py"))),
        *(
            f"bundle/{name}.py"
            for name in ("__init__", "archive", "enroll", "enrolled_golden", "seal", "update")
        ),
    ]


def add_runners(folder: Path) -> None:
    """Copy the runners into device/: classify.py, update.py, the part of this package that they
    import, and cpp/."""
    package = folder / "device" / "ftkit_export"
    for part in ("runtime", "bundle"):
        (package / part).mkdir(parents=True)
    for name in runtime_files():
        shutil.copyfile(PACKAGE / name, package / name)
    for name in ("classify.py", "update.py"):
        shutil.copyfile(PACKAGE / "device" / name, folder / "device" / name)
    shutil.copytree(PACKAGE / "device" / "cpp", folder / "device" / "cpp")
