"""Which rows a file of results holds, and which script makes it; which results a picture shows."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from benchmarks.lib import rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Source:
    """One kind of CSV in benchmarks/results."""

    files: str  # a pattern of their names
    kind: type[DataclassInstance]  # of their rows
    script: str  # what makes them, as Python is called


#: the first that fits counts
SOURCES = (
    Source("decode_*.csv", rows.Measurement, "benchmarks/decode.py"),
    Source("lossless_*.csv", rows.Drafted, "benchmarks/lossless.py"),
    Source("acceptance_*.csv", rows.Acceptance, "benchmarks/acceptance.py"),
    Source("generate_*.csv", rows.Generation, "benchmarks/generate.py"),
    Source("serve_*.csv", rows.Serving, "benchmarks/serve.py"),
    Source("profile_steps_*.csv", rows.StepProfile, "-m benchmarks.speed.profile_steps"),
    Source("kernels_*.csv", rows.KernelTime, "benchmarks/kernels.py"),
    Source("accuracy_lm_eval_*.csv", rows.TaskAccuracy, "benchmarks/accuracy.py lm-eval"),
    Source("accuracy_*.csv", rows.Accuracy, "benchmarks/accuracy.py"),
    Source("real_text_*.csv", rows.TextLoss, "benchmarks/real_text.py"),
    Source("compare_*.csv", rows.Comparison, "benchmarks/compare.py"),
    Source("train_*.csv", rows.TrainingStep, "-m reasoner.train"),
)

#: Pictures in docs: the module that draws them, and the results that they show. Only calibration_reasoner.svg
#: is not here: ``vllm-delta calibrate --picture`` drew it, from what it measured.
PICTURES = {
    "decode_cpu.svg": ("benchmarks.speed.plot_decode", ["decode_cpu.csv"]),
    "decode_cuda.svg": ("benchmarks.speed.plot_decode", ["decode_cuda.csv"]),
    "generate_cuda.svg": ("benchmarks.speed.plot_generate", ["generate_cuda.csv"]),
    "serve_cuda.svg": ("benchmarks.speed.plot_serve", ["serve_cuda.csv"]),
    "accuracy_rivals.svg": ("benchmarks.accuracy.plot_accuracy", ["accuracy_rivals_cuda.csv"]),
    "real_text_cpu.svg": ("benchmarks.accuracy.plot_real_text", ["real_text_cpu.csv"]),
    "training_reasoner.svg": (
        "benchmarks.accuracy.plot_training",
        ["train_reasoner_4k.csv", "train_reasoner_16k.csv"],
    ),
}


def source_of(name: str) -> Source:
    """The kind of the file of that name; raises LookupError if no script makes such files."""
    for source in SOURCES:
        if fnmatch(name, source.files):
            return source
    raise LookupError(f"no script here makes {name}")
