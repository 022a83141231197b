"""Serving: throughput and latency at several request rates, measured by vLLM's own client.

    python benchmarks/serve.py
    python benchmarks/serve.py --rates 1,inf --prompts 64 --input 32768 --output 1024
    python benchmarks/serve.py --shape tiny4 --input 64 --output 16 --prompts 4 --rates inf

Starts `vllm serve` once per backend, one after another, and runs `vllm bench serve` (dataset random, end of
text ignored) against it at each rate. The model has a real architecture, random weights, and a tokenizer
that turns "t17 t4" into the tokens 17 and 4, so that prompts have exactly the length that was asked for.
Prefix caching is off, since the same prompts come again at every rate. Options that are not known here go to
`vllm serve`, of all backends.

Rows are appended to a CSV as soon as a rate has been measured. DELTA's counters have to show that its sparse
layers were at work, or the benchmark stops with an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from server import Server, ServerError, tail, vllm_command
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.lib.activity import check_activity
from benchmarks.lib.base import DELTA, BenchmarkError, Json, arm_names
from benchmarks.lib.csv_rows import append_csv
from benchmarks.lib.models import POSITIONS, SPARE_POSITIONS, read_config, write_model
from benchmarks.lib.options import add_arguments, complete_arguments, describe_arm, describe_run
from benchmarks.lib.processes import checkout_first, run_benchmark
from benchmarks.lib.rows import Serving
from benchmarks.lib.text import align
from vllm_delta.method.counters import difference

#: requests before the timed ones
WARM_UPS = 2
#: the word of token 0
UNKNOWN = "unknown-word"
LATENCIES = tuple(
    f"{statistic}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl")
    for statistic in ("mean", "median", "p99")
)
#: columns that are taken from the client as they are
MEASURED = ("duration", "request_throughput", "output_throughput", *LATENCIES)
TABLE_HEAD = ("req/s", "backend", "answered/s", "tok/s", *(name.removesuffix("_ms") for name in LATENCIES))
LEFT_ALIGNED = ("backend",)

DEFAULTS = {  # by platform
    "cpu": {"backends": "CPU_ATTN,DELTA", "shape": "tiny28"},
    "cuda": {"backends": "FLASH_ATTN,DELTA", "shape": "qwen2.5-7b"},
}


def write_tokenizer(folder: Path, vocab: int) -> Path:
    """A folder with a tokenizer of one word per token, "t" and its number, without any special token.

    It is not the model's folder, where transformers would take the model's own kind of tokenizer. Token 0 is
    a longer word: vLLM refuses texts with more characters per token than the longest word has, and the space
    behind a word counts.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {UNKNOWN: 0} | {f"t{token}": token for token in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = folder / "tokenizer"
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=POSITIONS, clean_up_tokenization_spaces=False
    ).save_pretrained(path)
    return path


def benchmark(args: argparse.Namespace, folder: Path, rows: list[Serving]) -> None:
    """One server per backend, all rates; every row is in the CSV, and in `rows`, as soon as it is there."""
    model = args.model or write_model(args.shape, folder)
    tokenizer = write_tokenizer(folder, read_config(model)["vocab_size"])
    shared = describe_run(args, "benchmarks/serve.py")
    arms = arm_names(args.backends)
    with tqdm(total=len(arms) * len(args.rates), unit="rate", dynamic_ncols=True) as progress:
        for arm in arms:
            progress.set_description(arm)
            options, log = server_arguments(args, arm, tokenizer), folder / f"{arm}.log"
            try:
                with Server(model, options, env=checkout_first(), log_path=log) as server:
                    for rate in args.rates:
                        row = measure(server, rate, args, tokenizer, shared | describe_arm(args, arm))
                        append_csv(args.csv, row)
                        rows.append(row)
                        progress.update()
                        progress.set_postfix_str(f"{rate:g} req/s: TPOT {row.median_tpot_ms:.2f} ms")
            except ServerError as error:
                raise BenchmarkError(f"{arm}: {error}") from error


def server_arguments(args: argparse.Namespace, arm: str, tokenizer: Path) -> list[str]:
    """Options of ``vllm serve``."""
    backend = arm.partition("#")[0]
    arguments = ["--load-format", "dummy", "--dtype", args.dtype, "--attention-backend", backend]
    arguments += ["--max-model-len", str(args.input + args.output + SPARE_POSITIONS)]
    arguments += ["--no-enable-prefix-caching", "--tokenizer", str(tokenizer)]
    if backend == DELTA and args.delta:
        arguments += ["--additional-config", json.dumps({"delta": args.delta})]
    return [*arguments, *args.server]


def measure(server: Server, rate: float, args: argparse.Namespace, tokenizer: Path, shared: Json) -> Serving:
    """The CSV row of one rate; raises BenchmarkError if requests failed or DELTA was not at work."""
    is_delta = shared["backend"].partition("#")[0] == DELTA
    before = server.counters() if is_delta else {}
    result = run_client(server, rate, args, tokenizer)
    if result["failed"] or result["completed"] != args.prompts:
        reasons = ", ".join(sorted({error for error in result["errors"] if error})) or "no reason given"
        raise BenchmarkError(
            f"{result['failed']} of {args.prompts} requests failed: {reasons}; log: {server.log_path}"
        )
    if result["total_input_tokens"] != args.prompts * args.input:
        raise BenchmarkError(
            f"{result['total_input_tokens']} tokens of input, not {args.prompts} x {args.input}"
        )
    counts = difference(server.counters(), before) if is_delta else {}
    tokens = check_activity(f"{rate:g} req/s", counts, args.input + args.output, args.budget_tokens)
    return Serving(
        request_rate=rate,
        prompts=args.prompts,
        input=args.input,
        output=args.output,
        attended_tokens=tokens["attended_tokens"],
        context_tokens=tokens["context_tokens"],
        **{name: round(result[name], 4) for name in MEASURED},
        **shared,
    )


def run_client(server: Server, rate: float, args: argparse.Namespace, tokenizer: Path) -> Json:
    """What ``vllm bench serve`` saves."""
    folder = server.log_path.parent
    result, log = folder / "result.json", folder / "client.log"
    command = [vllm_command(), "bench", "serve", "--base-url", server.base_url, "--model", server.model]
    command += ["--tokenizer", str(tokenizer)]
    command += ["--dataset-name", "random", "--input-len", str(args.input), "--output-len", str(args.output)]
    command += ["--num-prompts", str(args.prompts), "--request-rate", str(rate), "--ignore-eos"]
    command += ["--num-warmups", str(WARM_UPS), "--metric-percentiles", "99", "--disable-tqdm"]
    command += [
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(folder),
        "--result-filename",
        result.name,
    ]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=server.env, check=False)
    if status.returncode:
        raise BenchmarkError(f"{tail(log)}\n\nvllm bench serve failed; above is the end of {log}")
    saved: Json = json.loads(result.read_text())
    return saved


def table(rows: Sequence[Serving]) -> str:
    """The run as aligned text, with the backends of a rate one below the other."""
    lines = [TABLE_HEAD]
    for row in sorted(rows, key=lambda row: row.request_rate):
        latencies = [f"{getattr(row, name):.2f}" for name in LATENCIES]
        throughput = (f"{row.request_throughput:.3f}", f"{row.output_throughput:.1f}")
        lines.append((f"{row.request_rate:g}", row.arm, *throughput, *latencies))
    return f"{align(lines, LEFT_ALIGNED)}\nLatencies in ms; tok/s: generated tokens."


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Throughput and latency of a server, with DELTA and a dense backend.",
        epilog="The module's docstring says what is measured and why so. Other options go to vllm serve.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("--rates", default="0.5,1,2,4,inf", help="requests per second (0.5,1,2,4,inf)")
    parser.add_argument("--prompts", type=int, default=32, help="requests per rate (32)")
    parser.add_argument("--input", type=int, default=16384, help="tokens of a prompt (16384)")
    parser.add_argument("--output", type=int, default=512, help="tokens of an answer (512)")
    args, server = parser.parse_known_args(argv)
    args.server = server
    complete_arguments(parser, args, Serving, "serve", DEFAULTS)
    try:
        args.rates = [float(text) for text in args.rates.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if min(args.prompts, args.input, args.output - 1, *args.rates) <= 0:
        parser.error("needs answers of at least two tokens, and more than zero of everything else")
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table; returns the exit status."""
    args = parse_arguments(argv)
    rows: list[Serving] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows), "serve")
    if rows:
        run = rows[0]
        print(
            f"\n{run.shape}, {run.dtype}, {args.input} tokens in, {args.output} out, {args.prompts} requests"
        )
        print(f"vLLM {run.vllm}, {run.machine}, {run.cores} cores")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
