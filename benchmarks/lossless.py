"""Speed of lossless speculation: starts `benchmarks.speed.lossless` from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
    from benchmarks.speed.lossless import main

    sys.exit(main(sys.argv[1:]))
