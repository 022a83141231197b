"""How many drafts are accepted: starts `benchmarks.accuracy.acceptance` from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
    from benchmarks.accuracy.acceptance import main

    sys.exit(main(sys.argv[1:]))
