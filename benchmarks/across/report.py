"""Writes the tables of the documentation from the committed results.

    python benchmarks/report.py                # rewrites what stands between the markers
    python benchmarks/report.py --check        # changes nothing; exit status 1 if a file would differ

A table stands between ``<!-- table: decode_cuda qwen2.5-7b -->`` and ``<!-- end -->``; `query.py` says what
the first one may ask for. The latest run of the shape is shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.across import accuracy_tables, draft_tables, kernel_tables, speed_tables
from benchmarks.across.query import Query, ReportError

#: documents with tables
DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/benchmarks-diary.md",
    "docs/choosing.md",
    "docs/lossless.md",
)

TABLES: dict[str, Callable[[Query], list[str]]] = {
    "decode_cpu": speed_tables.decode,
    "decode_cuda": speed_tables.decode,
    "generate_cuda": speed_tables.generate,
    "serve_cuda": speed_tables.serve,
    "lossless_cuda": draft_tables.speed,
    "acceptance_cpu": draft_tables.acceptance,
    "kernels_cpu": kernel_tables.kernels_cpu,
    "kernels_gpu": kernel_tables.kernels_gpu,
    "limits_cuda": kernel_tables.limits,
    "accuracy_cuda": accuracy_tables.budgets,
    "accuracy_layers_cpu": accuracy_tables.layers,
    "calibration_12_layers_seed": accuracy_tables.divergences,
    "real_text_cpu": accuracy_tables.real_texts,
}
MARKED = re.compile(r"(<!-- table: ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = "<!-- table:"


def table(marker: str) -> str:
    """The lines that a marker asks for; raises ReportError."""
    query = Query.parse(marker)
    if query.name not in TABLES:
        raise ReportError(f"no table is called {query.name}; there are {', '.join(TABLES)}")
    return "".join(f"{line}\n" for line in TABLES[query.name](query))


def rewritten(text: str) -> str:
    """The document with all its tables as the results have them; raises ReportError."""
    if len(MARKED.findall(text)) != text.count(OPENING):
        raise ReportError("every <!-- table: ... --> needs a line of its own, and an <!-- end -->")
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", text)


def main(argv: Sequence[str]) -> int:
    """Write the tables, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tables of the documentation, from the committed results.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a file would differ")
    parser.add_argument("documents", nargs="*", type=Path, help=f"({' '.join(DOCUMENTS)})")
    args = parser.parse_args(argv)
    differ = 0
    for path in args.documents or [ROOT / name for name in DOCUMENTS]:
        try:
            before = path.read_text()
            after = rewritten(before)
        except (OSError, ReportError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        if after != before:
            differ += 1
            what = "differs from the results; run benchmarks/report.py" if args.check else "rewritten"
            print(f"{path}: {what}")
            if not args.check:
                path.write_text(after)
    return int(args.check and differ > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
