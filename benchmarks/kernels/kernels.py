"""Time of one attention layer, DELTA's kernels beside vLLM's: runs `kernels_gpu` or `kernels_cpu`.

python benchmarks/kernels.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.lib.provenance import find_machine


def main(argv: Sequence[str]) -> int:
    """Measure on this machine; returns the exit status."""
    if find_machine()[0] == "cuda":
        from benchmarks.kernels import kernels_gpu

        return kernels_gpu.main(argv)
    from benchmarks.kernels import kernels_cpu

    return kernels_cpu.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
