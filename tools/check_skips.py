"""Fail if a test was skipped for anything but the machine: a missing package hides what it would have shown.

``python tools/check_skips.py RESULTS.xml ...``, with JUnit files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

#: What the reasons for skipping may begin with.
OF_THE_MACHINE = (
    "needs a CUDA device",
    "needs two CUDA devices",
    "vLLM's build for this processor lacks",
    "Triton is for Linux",
)


def wrong_skips(results: Path) -> list[str]:
    """Tests of a JUnit file that were skipped for another reason, with it."""
    found = []
    for case in ElementTree.parse(results).iter("testcase"):
        for skipped in case.iter("skipped"):
            reason = skipped.get("message", "")
            if not reason.startswith(OF_THE_MACHINE):
                found.append(f"{case.get('classname')}.{case.get('name')}: {reason}")
    return found


def main(paths: list[str]) -> int:
    """Say which tests were skipped that should not be; the number of them is the exit status."""
    found = [line for path in paths for line in wrong_skips(Path(path))]
    for line in found:
        print(f"skipped for a reason that is not the machine's: {line}")
    return min(len(found), 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
