"""Accuracy of real checkpoints, dense and under DELTA's settings, by lm-evaluation-harness.

    python benchmarks/accuracy.py lm-eval --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --chat \
        --tasks aime24,aime25 --budgets 1024,2048 --max-tokens 32768 --max-model-len 40960
    python benchmarks/accuracy.py lm-eval --model build/reasoner --include-path build/tasks \
        --tasks reasoner_chase_4096                     # tasks by lm_eval_reasoner.py

Settings, servers and options are those of `accuracy.py`. For each setting a server is started, and lm-eval
asks it one task after another, through the OpenAI API, so that the counters belong to one task each. Only
tasks that generate text (``output_type: generate_until``) have anything to do with DELTA: scores of given
answers are prefill. lm-eval loads no tokenizer; it sends text, or chats, which the server tokenizes.

A CSV row per metric is written when its task is done. With `--keep`, lm-eval's results, its samples and the
answers stay, and a later run of the same setting does not ask for them again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from server import Server, ServerError, tail
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.accuracy.jobs import Records, raise_errors, run_jobs
from benchmarks.accuracy.options import add_arguments, complete_arguments
from benchmarks.accuracy.servers import activity, explain, open_server, read_counters, server_jobs
from benchmarks.accuracy.settings import Setting
from benchmarks.lib.base import BenchmarkError, Json
from benchmarks.lib.csv_rows import append_csv
from benchmarks.lib.options import describe_run
from benchmarks.lib.processes import end_group, run_benchmark
from benchmarks.lib.provenance import version
from benchmarks.lib.rows import TaskAccuracy
from benchmarks.lib.text import align
from vllm_delta.cli.options import json_object
from vllm_delta.method.counters import difference

TABLE_HEAD = ("task", "metric", "filter", "setting", "value", "stderr", "samples", "attended", "tokens", "s")
LEFT_ALIGNED = ("task", "metric", "filter", "setting")


# --- the work on one setting ---------------------------------------------------------------------


def evaluate_all(job: Json) -> Records:
    """One record per task, as tasks are done; or a record with "error"."""
    setting = Setting(**job["setting"])
    try:
        with open_server(job) as server:
            for task in job["tasks"]:
                yield evaluate(server, setting, task, job)
    except (ServerError, BenchmarkError) as error:
        yield {"error": explain(error, job)}


def evaluate(server: Server, setting: Setting, task: str, job: Json) -> Json:
    """What lm-eval says of one task, with counters and generated tokens; raises BenchmarkError."""
    counts, generated = read_counters(server, setting), generated_tokens(server)
    start = time.perf_counter()
    results = run_lm_eval(server, task, job)
    seconds = time.perf_counter() - start
    after = generated_tokens(server)
    return {
        "task": task,
        "results": results["results"],
        "versions": results.get("versions", {}),
        "fewshot": results.get("n-shot", {}),
        "samples": {name: count["effective"] for name, count in results["n-samples"].items()},
        "seconds": round(seconds, 1),
        "counts": difference(read_counters(server, setting), counts) if counts else {},
        "generated_tokens": None if after is None or generated is None else after - generated,
    }


def generated_tokens(server: Server) -> int | None:
    """Tokens that a vLLM server generated since its start; None of another server."""
    try:
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=60) as response:
            text = response.read().decode()
    except OSError:
        return None
    values = re.findall(r"^vllm:generation_tokens_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return sum(int(float(value)) for value in values) if values else None


def lm_eval_config(server: Server, task: str, job: Json) -> Json:
    """``lm_eval run --config``, without where results go."""
    chat = job["chat"]
    model = {
        "model": server.model,
        "base_url": f"{server.base_url}/v1/{'chat/' if chat else ''}completions",
        "tokenizer_backend": None,
        "tokenized_requests": False,
        "num_concurrent": job["concurrency"],
        "timeout": int(job["timeout"]),
        "max_retries": 1,
        "seed": job["seed"],
    }
    if job["think_end"]:
        model["think_end_token"] = job["think_end"]
    return {
        "model": f"local-{'chat-' if chat else ''}completions",
        "model_args": model | job["model_args"],
        "tasks": [task],
        "num_fewshot": job["fewshot"],
        "limit": job["limit"],
        "gen_kwargs": job["sampling"],
        "system_instruction": job["system"],
        "apply_chat_template": chat,
        "include_path": job["include_path"],
    }


def run_lm_eval(server: Server, task: str, job: Json) -> Json:
    """The results of ``lm_eval``, in a process group that never outlives this call."""
    config, keep = lm_eval_config(server, task, job), job["keep"]
    name = re.sub(r"[^\w.-]+", "_", f"{job['setting']['name']}-{task}")
    folder = Path(keep or Path(job["log"]).parent) / name
    folder.mkdir(parents=True, exist_ok=True)
    if keep:
        same = config | {"model_args": {**config["model_args"], "base_url": None}, "setting": job["setting"]}
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]
        config["use_cache"] = str(folder / f"answers-{digest}")
    config |= {"output_path": str(folder), "log_samples": True}
    path, log = folder / "config.yaml", folder / "lm_eval.log"
    path.write_text(json.dumps(config, indent=1))  # which is YAML
    before = set(folder.rglob("results_*.json"))
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lm_eval", "run", "--config", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env={"OPENAI_API_KEY": "unused", **os.environ},
            start_new_session=True,
        )
    try:
        status = process.wait()
    finally:
        end_group(process)
    written = sorted(set(folder.rglob("results_*.json")) - before)
    if status or not written:
        raise BenchmarkError(f"{tail(log)}\n\nlm_eval failed with {task}; above is the end of {log}")
    results: Json = json.loads(written[-1].read_text())
    return results


# --- rows, table ---------------------------------------------------------------------------------


def rows_of(record: Json, setting: Setting, args: argparse.Namespace, shared: Json) -> list[TaskAccuracy]:
    """One row per metric and filter of a task, or of every member of a group of tasks."""
    counts, generated = record["counts"], record["generated_tokens"]
    columns: Json = {
        "seed": args.seed,
        "sampling": json.dumps(args.sampling | ({"limit": args.limit} if args.limit else {}), sort_keys=True),
        "generated_tokens": generated,
        "seconds": record["seconds"],
        "lm_eval": version("lm-eval"),
        # Kept answers are not generated again.
        **activity(record["task"], setting, counts, 0 if generated == 0 else mean_context(counts)),
        **(shared | setting.columns),
    }
    rows = []
    for task, results in record["results"].items():
        for key, value in results.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = results.get(f"{metric}_stderr,{how}")
            rows.append(
                TaskAccuracy(
                    task=task,
                    task_version=str(record["versions"].get(task, "")),
                    fewshot=record["fewshot"].get(task),
                    metric=metric,
                    filter=how,
                    value=round(value, 6),
                    stderr=round(stderr, 6) if isinstance(stderr, float) else None,
                    samples=record["samples"].get(task, sum(record["samples"].values())),
                    **columns,
                )
            )
    return rows


def mean_context(counts: Json) -> int:
    """Mean context of the counted rows, in tokens, rounded up: the longest is at least as long."""
    layers = counts["layers"].values() if counts else ()
    rows = sum(layer["rows"] for layer in layers)
    return math.ceil(sum(layer["context_tokens"] for layer in layers) / rows) if rows else 1


def table(rows: Sequence[TaskAccuracy]) -> str:
    """The run as aligned text, with the settings of a metric one below the other."""
    lines: list[tuple[str, ...]] = [TABLE_HEAD]
    order = list(dict.fromkeys((row.task, row.metric, row.filter) for row in rows))
    for row in sorted(rows, key=lambda row: order.index((row.task, row.metric, row.filter))):
        lines.append(
            (
                *(row.task, row.metric, row.filter, row.setting, f"{row.value:.4f}"),
                "-" if row.stderr is None else f"{row.stderr:.4f}",
                str(row.samples),
                "-" if row.attended_share is None else f"{row.attended_share:.1%}",
                "-" if row.generated_tokens is None else str(row.generated_tokens),
                f"{row.seconds:.0f}",
            )
        )
    return align(lines, LEFT_ALIGNED)


def benchmark(args: argparse.Namespace, folder: Path, rows: list[TaskAccuracy]) -> None:
    """Every task under every setting; rows are in the CSV, and in `rows`, as soon as a task is done."""
    shared = describe_run(args, "benchmarks/accuracy.py")
    own = ("tasks", "chat", "think_end", "model_args", "fewshot", "limit", "sampling", "system", "seed")
    more: Json = {name: getattr(args, name) for name in own}
    more |= {
        name: str(path.resolve()) if (path := getattr(args, name)) else None
        for name in ("include_path", "keep")
    }
    jobs = [job | more for job in server_jobs(args, folder, ["--dtype", args.dtype])]
    with tqdm(total=len(jobs) * len(args.tasks), unit="task", dynamic_ncols=True) as progress:

        def take(number: int, record: Json) -> None:
            for row in rows_of(record, args.expanded[number], args, shared):
                append_csv(args.csv, row)
                rows.append(row)
            progress.update()
            progress.set_postfix_str(f"{args.expanded[number].name}, {record['task']}")

        errors = run_jobs(args, evaluate_all, jobs, take)
    raise_errors(errors)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked, with the platform's defaults; exits with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="accuracy.py lm-eval",
        description="Accuracy by lm-evaluation-harness, dense and under DELTA's settings.",
        epilog="The module's docstring says what is measured and why so. Other options go to vllm serve.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="of lm-eval: python -m lm_eval ls tasks"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="with more tasks")
    parser.add_argument("--chat", action="store_true", help="ask by chat completions: the server's template")
    parser.add_argument("--system", metavar="TEXT", help="system message, or text before the prompt")
    parser.add_argument(
        "--think-end", metavar="TEXT", help="what ends the part of a chat answer to leave out"
    )
    parser.add_argument("--fewshot", type=int, help="examples in a prompt; tasks that say 0 keep it")
    parser.add_argument("--limit", type=int, help="ask only the first questions of each task")
    parser.add_argument("--max-tokens", type=int, help="of an answer")
    parser.add_argument(
        "--sampling",
        metavar="JSON",
        type=json_object,
        default={},
        help="changes to tasks' generation_kwargs",
    )
    parser.add_argument(
        "--model-args",
        metavar="JSON",
        type=json_object,
        default={},
        help="more arguments of lm-eval's model",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for lm-eval's files and the answers")
    args, server = parser.parse_known_args(argv)
    args.server = server
    complete_arguments(parser, args, TaskAccuracy, "accuracy_lm_eval")
    if version("lm-eval") == "none":
        parser.error('lm-eval is not installed: pip install "lm-eval[api,math]"')
    if args.think_end and not args.chat:
        parser.error("--think-end needs --chat")
    args.tasks = args.tasks.split(",")
    if args.max_tokens:
        args.sampling = args.sampling | {"max_gen_toks": args.max_tokens}
    return args


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print the table; returns the exit status."""
    args = parse_arguments(argv)
    rows: list[TaskAccuracy] = []
    status = run_benchmark(lambda folder: benchmark(args, folder, rows), "accuracy")
    if rows:
        run = rows[0]
        print(f"\n{run.shape}, {run.dtype}, vLLM {run.vllm}, {run.machine}, {run.cores} cores")
        print(table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
