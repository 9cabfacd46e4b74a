"""Install bundles on a device, and run the classifier from whichever is current. Needs numpy, onnxruntime and Pillow
only; to check signatures also the package cryptography, or OpenSSL 3.

python update.py NEW.zip --into DIR --key PUB.pem    check NEW, switch DIR/current to it
python update.py --rollback --into DIR               back to the bundle before
python update.py --run --into DIR -- ARGUMENT...     run DIR/current's classify.py with these arguments, the
                                                     new one after an update; one that fails within its
                                                     first frames is rolled back

Exit codes: 0 done; 2 refused, and what ran before still runs.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # the bundle is sealed: no file may be added

from ftkit_export.bundle.update import (  # noqa: E402
    SLOWER,
    answered,
    current,
    probation,
    rollback,
    update,
)
from ftkit_export.runtime.errors import FtkitError  # noqa: E402

FEW = 10  # images: so many are counted one by one, then every tenth
LOOK_SECONDS = 0.2
AGAIN_SECONDS = 2.0  # before a classifier that ended with an error is started again


class Runner:
    """Keeps the current bundle's classifier running; what it prints goes through."""

    def __init__(self, into: Path, arguments: list[str]):
        self.into = into
        self.arguments = arguments
        self.stopped = False
        self.frames = 0
        self.alarmed = False
        self.ended = False  # by this program

    def run(self) -> int:
        """Until the classifier ends well, or a signal ends it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while True:
            bundle = current(self.into)
            if bundle is None:
                raise FtkitError(f"{self.into}: expected a bundle, found none. Install one first")
            code, switched = self._once(bundle)
            if self.stopped:
                return 0
            if switched:
                continue
            if probation(self.into) and (code or self.alarmed):
                why = "drift at once" if self.alarmed else f"exit code {code}"
                # Exit code 2 may be the arguments' or the disk's fault: it may be tried again
                now = rollback(self.into, bad=self.alarmed or code != 2, of=bundle)
                print(
                    f"update: {bundle.name} failed after {self.frames} images ({why}); now {now.name}",
                    file=sys.stderr,
                    flush=True,
                )
                continue
            if self.ended:
                continue
            if not code:
                return 0
            time.sleep(AGAIN_SECONDS)

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _once(self, bundle: Path) -> tuple[int, bool]:
        """Run a bundle's classifier; returns its exit code, and whether another bundle is current."""
        found = probation(self.into)
        self.frames = found["frames"] if found else 0
        self.alarmed = self.ended = False
        command = [sys.executable, "-u", "-B", str(bundle / "device" / "classify.py")]
        with subprocess.Popen(
            [*command, *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as child:
            passing = [
                threading.Thread(
                    target=self._pass, args=(child.stdout, sys.stdout, bundle.name if found else "")
                ),
                threading.Thread(target=self._pass, args=(child.stderr, sys.stderr, "")),
            ]
            for thread in passing:
                thread.start()

            while child.poll() is None:
                failed = self.alarmed and probation(self.into) is not None
                if self.stopped or failed or current(self.into) != bundle:
                    child.terminate()
                    self.ended = True
                    break
                time.sleep(LOOK_SECONDS)
            code = child.wait()
            for thread in passing:
                thread.join()
        return code, current(self.into) != bundle

    def _pass(self, source: Any, target: Any, counted: str) -> None:
        """counted: the version on probation, whose frames are counted; "" for none."""
        for line in source:
            if line.startswith("drift: "):
                self.alarmed = True
            # Whatever fails, the classifier's output must be read, or it would wait for ever
            with contextlib.suppress(OSError, ValueError):
                print(line, end="", file=target, flush=True)
            if counted:
                self.frames += 1
                # Written through to the disk, so not for every image
                if self.frames <= FEW or self.frames % FEW == 0:
                    with contextlib.suppress(OSError):
                        answered(self.into, counted, self.frames)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, metavar="NEW.zip")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR")
    parser.add_argument("--key", type=Path, metavar="PUB.pem", help="must have signed the bundle")
    parser.add_argument("--unsigned", action="store_true", help="take a bundle without a signature")
    parser.add_argument("--allow-downgrade", action="store_true", help="take an older one")
    parser.add_argument(
        "--slower", type=float, default=SLOWER, help=f"share of time it may take longer ({SLOWER})"
    )
    parser.add_argument("--threads", type=int, default=1, help="to compare the time on (1)")
    parser.add_argument("--rollback", action="store_true")
    parser.add_argument("--run", action="store_true")
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:place])
    if sum((options.run, options.rollback, options.bundle is not None)) != 1:
        parser.error("give one of NEW.zip, --rollback and --run")

    try:
        if options.run:
            return Runner(options.into, words[place + 1 :]).run()
        if options.rollback:
            print(f"back to {rollback(options.into).name}")
            return 0
        if options.key is None and not options.unsigned:
            raise FtkitError(
                f"{options.bundle}: expected --key, whose signature it must have, found none. Try --unsigned if you "
                "trust where it comes from"
            )
        done = update(
            options.bundle,
            options.into,
            key=options.key,
            allow_downgrade=options.allow_downgrade,
            slower=options.slower,
            threads=options.threads,
        )
        print(f"{done.folder.name} is current")
        if done.ratio:
            middle, low, high = done.ratio
            print(f"time: {middle:.2f} [{low:.2f}, {high:.2f}] of the bundle before")
    except (FtkitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
