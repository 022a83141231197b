"""Benchmarks of speed, kernels and accuracy, their rows, and what is made of these.

Every script runs as a module from the repository's folder, such as ``python -m benchmarks.speed.decode``. The
files beside this one start the scripts that are used most from any folder: ``python benchmarks/decode.py``.

========== ===========================================================================================
folder     what it has
========== ===========================================================================================
speed      time of decoding, of whole generations and of servers, inside vLLM; their pictures
kernels    time of one attention layer
accuracy   exact answers of a model that reasons, and tasks of lm-evaluation-harness; their pictures
across     what is about all of them: the list of results, the tables of the documentation, two commits
lib        what they share; it imports none of the others
results    the rows that were measured
========== ===========================================================================================
"""

import sys
from pathlib import Path

#: the repository
ROOT = Path(__file__).resolve().parent.parent
#: where the rows are that were measured
RESULTS = ROOT / "benchmarks" / "results"

# The reasoner and the server are tools of the repository, and in no package.
sys.path.append(str(ROOT / "tools"))
