"""DELTA served over HTTP, and in the engine with what else changes how attention runs."""

import json
import random
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ONE_THREAD, PRINTABLE, in_engine_process, in_fresh_process
from demo_model import build_demo_model
from engines import start_engine
from server import Server, vllm_command

from vllm_delta.method.counters import difference

SMALL_BUDGET = {"budget_tokens": 128, "recent_tokens": 32, "sink_tokens": 16}
MAX_LENGTH = 2048


def random_prompt(length, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(*PRINTABLE) for _ in range(length)]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    """As users start it: compiled, with the prefix cache; two API processes share the engine."""
    arguments = [
        *["--attention-backend", "DELTA", "--additional-config", json.dumps({"delta": SMALL_BUDGET})],
        *["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--api-server-count", "2"],
        *["--enable-prompt-tokens-details", "--gpu-memory-utilization", "0.3"],
    ]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(tiny_model, arguments, env=ONE_THREAD, log_path=log) as running:
        yield running


def complete(server, prompt, max_tokens=24, **options):
    return server.client().completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=max_tokens,
        **{"temperature": 0.0, "extra_body": {"ignore_eos": True}, **options},
    )


def text(server, prompt, **options):
    return complete(server, prompt, **options).choices[0].text


def test_chat(server):
    document = "All work and no play makes Jack a dull boy. " * 40
    answer = server.client().chat.completions.create(
        model=server.model,
        messages=[
            {"role": "system", "content": document},
            {"role": "user", "content": "What makes Jack a dull boy?"},
        ],
        max_tokens=16,
        temperature=0.0,
    )
    assert answer.usage.prompt_tokens > 2 * SMALL_BUDGET["budget_tokens"]
    assert answer.choices[0].message.content.strip()


def test_streamed_text_is_the_same(server):
    prompt = random_prompt(700)
    pieces = [chunk.choices[0].text for chunk in complete(server, prompt, stream=True) if chunk.choices]
    assert sum(piece != "" for piece in pieces) > 4
    assert "".join(pieces) == text(server, prompt)


def test_batch_of_prompts(server):
    prompts = [random_prompt(length, seed=length) for length in (30, 900, 300)]
    together = [choice.text for choice in complete(server, prompts).choices]
    assert together == [text(server, prompt) for prompt in prompts]


def test_several_samples_of_one_prompt(server):
    """They share the prompt's cache blocks and differ behind it."""
    choices = complete(server, random_prompt(500), n=4, temperature=1.0, seed=0).choices
    assert len({choice.text for choice in choices}) == 4


def test_logprobs(server):
    (choice,) = complete(server, random_prompt(600), max_tokens=8, logprobs=3).choices
    assert len(choice.logprobs.token_logprobs) == 8
    for chosen, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0


def test_counters(server):
    """Every decode row is counted, with its context, and sparse layers keep to the budget."""
    prompt_tokens, answer_tokens = 600, 32
    before = server.counters()
    complete(server, random_prompt(prompt_tokens, seed=1), max_tokens=answer_tokens)
    counts = difference(server.counters(), before)

    rows = answer_tokens - 1  # the prefill yields the first token
    context = sum(prompt_tokens + row for row in range(1, answer_tokens))
    layers = counts["layers"]
    assert {role: layer["rows"] for role, layer in layers.items()} == {
        "full": 2 * rows,
        "selection": 3 * rows,
        "sparse": 3 * rows,
    }
    assert counts["context_tokens"] == 8 * context
    assert layers["full"]["attended_tokens"] == layers["full"]["context_tokens"] == 2 * context
    page = 16
    budget = SMALL_BUDGET["budget_tokens"]
    assert budget - page < layers["sparse"]["attended_tokens"] / (3 * rows) <= budget
    assert counts["dense_rows"]["prefill"] == 8 * prompt_tokens
    assert counts["dense_rows"]["within_budget"] == 0


def test_answer_depends_on_the_prompt_alone(server):
    """Not on the prefix cache, nor on what else is in the batch."""
    prompt = random_prompt(800, seed=2)
    alone = text(server, prompt)
    again = complete(server, prompt)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].text == alone

    others = [random_prompt(length, seed=length) for length in range(40, 1200, 100)]
    with ThreadPoolExecutor(len(others) + 1) as pool:
        answers = [pool.submit(text, server, other, max_tokens=64) for other in others]
        during = [pool.submit(text, server, prompt).result() for _ in range(3)]
        assert all(answer.result() for answer in answers)
    assert during == [alone] * 3


def status_of(server, body):
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_bad_requests_are_refused_and_serving_goes_on(server):
    good = {"model": server.model, "prompt": random_prompt(300), "max_tokens": 8, "temperature": 0}
    expected = text(server, good["prompt"], max_tokens=8)
    assert status_of(server, json.dumps(good).encode()) == 200
    for bad in (
        json.dumps(good).encode()[:-1],
        json.dumps({**good, "prompt": random_prompt(MAX_LENGTH + 1)}).encode(),
        json.dumps({**good, "model": "another"}).encode(),
        json.dumps({**good, "max_tokens": -1}).encode(),
        b"[]",
    ):
        assert 400 <= status_of(server, bad) < 500, bad[:60]
    assert text(server, good["prompt"], max_tokens=8) == expected


def test_vllm_bench_serve(server):
    before = server.counters()
    result = subprocess.run(
        [
            *[vllm_command(), "bench", "serve", "--base-url", server.base_url, "--model", server.model],
            *["--dataset-name", "random", "--random-input-len", "400", "--random-output-len", "16"],
            *["--num-prompts", "8", "--ignore-eos"],
        ],
        env=server.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = dict(line.split(":", 1) for line in result.stdout.splitlines() if line.count(":") == 1)
    assert int(report["Successful requests"]) == 8
    assert int(report["Total generated tokens"]) == 8 * 16
    counts = difference(server.counters(), before)["layers"]["sparse"]
    assert 0 < counts["attended_tokens"] < counts["context_tokens"]


PROMPTS = [random_prompt(length, seed=length) for length in (40, 900, 200, 500)]


def run_engine(model, backend, delta=None, **options):
    """Greedy answers to `PROMPTS` and what was counted meanwhile; for a process of its own."""
    with start_engine(model, backend, delta, **options) as engine:
        return SimpleNamespace(
            tokens=[answer.tokens for answer in engine.generate(PROMPTS, 48)],
            counters=None if backend == "CPU_ATTN" else engine.counters(),
            accepted=engine.metric("vllm:spec_decode_num_accepted_tokens"),
        )


def answers(model, backend, delta=None, **options):
    return in_engine_process(partial(run_engine, model, backend, delta, **options))


@pytest.fixture(scope="module")
def sliding_model(tmp_path_factory):
    return build_demo_model(
        tmp_path_factory.mktemp("models") / "sliding",
        architecture="llama",
        num_layers=8,
        hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        sliding_window=64,
    )


def test_sliding_window_layers_stay_as_they_are(sliding_model):
    """With a budget that holds the context nothing may change; the other layers still run DELTA."""
    dense = answers(sliding_model, "CPU_ATTN")
    delta = answers(sliding_model, "DELTA")
    assert delta.tokens == dense.tokens
    tokens = sum(len(prompt) + 47 for prompt in PROMPTS)
    assert delta.counters["dense_rows"]["sliding_window"] == 4 * tokens
    rows = {role: layer["rows"] / (47 * len(PROMPTS)) for role, layer in delta.counters["layers"].items()}
    assert rows == {"full": 2, "selection": 1, "sparse": 1}


def test_delta_for_full_attention_layers_only(sliding_model):
    """vLLM's option per kind of layer gives sliding-window layers to CPU_ATTN itself."""
    config = {"backend_per_kind": {"full_attention": "DELTA"}}
    per_kind = answers(sliding_model, None, SMALL_BUDGET, attention_config=config)
    everywhere = answers(sliding_model, "DELTA", SMALL_BUDGET)
    assert per_kind.tokens == everywhere.tokens
    assert per_kind.counters["layers"] == everywhere.counters["layers"]
    assert per_kind.counters["dense_rows"]["sliding_window"] == 0
    sparse = per_kind.counters["layers"]["sparse"]
    assert 0 < sparse["attended_tokens"] < sparse["context_tokens"]


def test_lossless_over_http(tiny_model, tmp_path):
    """Full attention's answers, and everything else that a request may ask for."""
    delta = {"delta": {**SMALL_BUDGET, "lossless": True, "draft_when": "always"}}
    common = ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--gpu-memory-utilization", "0.3"]
    drafting = ["--attention-backend", "DELTA", "--additional-config", json.dumps(delta)]
    prompts = [random_prompt(length, seed=length) for length in (600, 900, 40)]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    with Server(tiny_model, common, env=ONE_THREAD, log_path=tmp_path / "full.log") as server:
        expected = [text(server, prompt) for prompt in prompts]
        penalised = text(server, prompts[0], frequency_penalty=1.5)
    with Server(tiny_model, [*drafting, *common], env=ONE_THREAD, log_path=tmp_path / "log") as server:
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(partial(text, server), prompts)) == expected
        assert text(server, prompts[0]) == expected[0], "after a prefix-cache hit"
        assert text(server, prompts[0], frequency_penalty=1.5) == penalised != expected[0]
        assert text(server, prompts[1], temperature=1.0, seed=3) != expected[1]
        assert (
            len({choice.text for choice in complete(server, prompts[0], n=3, temperature=1.0).choices}) == 3
        )
        (choice,) = complete(server, prompts[1], max_tokens=12, logprobs=2).choices
        assert len(choice.logprobs.token_logprobs) == 12 and max(choice.logprobs.token_logprobs) <= 0
        stopped = complete(server, prompts[0], stop=[expected[0][-3:]]).choices[0]
        assert stopped.finish_reason == "stop"
        structured = complete(
            server, prompts[0], max_tokens=40, extra_body={"structured_outputs": {"json": schema}}
        )
        assert structured.choices[0].text.lstrip().startswith("{")
        refused = {"model": server.model, "prompt": prompts[0], "min_p": 0.5, "temperature": 1}
        assert status_of(server, json.dumps(refused).encode()) == 400
        metrics = urllib.request.urlopen(f"{server.base_url}/metrics", timeout=60).read().decode()
        assert "vllm:spec_decode_num_accepted_tokens_total" in metrics
        assert server.counters()["layers"]["sparse"]["rows"] > 0


def test_tensor_parallelism(tiny_model):
    """With a budget that holds the context, two ranks answer as one does."""
    one = answers(tiny_model, "DELTA")
    run = partial(run_engine, tiny_model, "DELTA", tensor_parallel_size=2)
    two = in_fresh_process(run, VLLM_CPU_OMP_THREADS_BIND="0|1", OMP_NUM_THREADS="1")
    assert two.tokens == one.tokens
    assert two.counters["layers"]["sparse"]["rows"] == 2 * one.counters["layers"]["sparse"]["rows"]
