"""Time of whole generations: starts `benchmarks.speed.generate` from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
    from benchmarks.speed.generate import main

    sys.exit(main(sys.argv[1:]))
