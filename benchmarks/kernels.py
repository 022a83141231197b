"""Time of one attention layer, DELTA's kernels beside vLLM's: runs `kernels_gpu` or `kernels_cpu`.

python benchmarks/kernels.py --help
"""

from __future__ import annotations

import sys

from environment import find_machine

if find_machine()[0] == "cuda":
    from kernels_gpu import main
else:
    from kernels_cpu import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
