"""A server that calibrates before it starts: when, with what, once; and what is left where it is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ONE_THREAD
from induction_model import RETRIEVES, build_induction_model
from server import Server

from vllm_delta.calibration import process
from vllm_delta.calibration.file import CALIBRATION_FILE
from vllm_delta.calibration.fingerprint import identity
from vllm_delta.calibration.process import run_command, signals_noted
from vllm_delta.calibration.prompts import CalibrationError
from vllm_delta.integration import auto_calibration, settings
from vllm_delta.integration.auto_calibration import calibrate_at_start, engine_arguments
from vllm_delta.method import plan
from vllm_delta.method.config import DeltaConfig, DeltaConfigError

AUTO = {"delta": {"calibrate": "auto", "budget_tokens": 256}}

#: What vLLM decides itself on a CPU.
DERIVED = {"disable_custom_all_reduce": True}

FOUND = {
    "delta": {"full_layers": 1, "selection_layers": [1, 5]},
    "calibration": {
        "chosen": "calibrated",
        "search_budget_tokens": 208,
        "compared": {"calibrated": {"full_layers": 1, "selection_layers": [1, 5], "kept": 0.995}},
    },
}

#: In the place of the command: notes how it was called, and writes what a calibration would have found.
STUB = f"""
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
with open(os.path.join(os.path.dirname(out), "calls"), "a") as calls:
    calls.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
with open(out, "w") as file:
    file.write({json.dumps(FOUND)!r})
"""


@pytest.fixture
def build(engine_config, monkeypatch, tmp_path):
    """As `engine_config`, with a tokenizer, a cache of its own, and a command that is made up."""
    from vllm import envs

    # vLLM looks at a kind of model in a process of its own, and remembers what it saw.
    seen, cache = Path(envs.VLLM_CACHE_ROOT) / "modelinfos", tmp_path / "cache"
    seen.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    (cache / "modelinfos").symlink_to(seen)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(cache))
    use_command(monkeypatch, tmp_path, STUB)
    return lambda model, additional=AUTO, **options: engine_config(
        model, **{"skip_tokenizer_init": False, "additional_config": additional, **options}
    )


def use_command(monkeypatch, folder, program):
    path = folder / "command.py"
    path.write_text(program)
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(path)))


@pytest.fixture
def log(monkeypatch):
    """What is logged."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            auto_calibration.logger, level, lambda text, *args, at=level: lines.append((at, text % args))
        )
    return lines


def calls(tmp_path):
    path = tmp_path / "cache" / "delta" / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def layers_of(config):
    delta = config.additional_config["delta"]
    return delta.get("full_layers"), delta.get("selection_layers")


def test_it_is_done_once_and_adopted(build, tiny_model, tmp_path, log, monkeypatch):
    monkeypatch.setenv("VLLM_DP_RANK", "0")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    config = build(tiny_model, hf_token="secret")
    path = config.additional_config["delta"]["calibration"]
    assert layers_of(config) == (1, [1, 5])
    assert path.startswith(f"{tmp_path}/cache/delta/") and path.endswith(".json")
    ((arguments, environment),) = calls(tmp_path)
    engine = {"dtype": "float32", "max_model_len": 4096, **DERIVED}
    delta = {"recent_tokens": 128, "sink_tokens": 16, "page_size": 16}
    assert arguments == [
        *[str(tiny_model), "--out", path, "--engine", json.dumps(engine)],
        *["--budget-tokens", "256", "--delta", json.dumps(delta), "--end-with-stdin"],
    ]
    assert not {"VLLM_DP_RANK", "PROMETHEUS_MULTIPROC_DIR"} & set(environment)
    assert environment["VLLM_LOGGING_LEVEL"] == "WARNING" and environment["HF_TOKEN"] == "secret"
    (before, after) = log
    assert f"calibrating {tiny_model} before the server starts, once" in before[1] and path in before[1]
    assert "1 full layers and selection layers 1, 5 keep 99.5% of what it looks up with" in after[1]
    log.clear()
    again = build(tiny_model)
    assert again.additional_config == config.additional_config
    assert len(calls(tmp_path)) == 1
    assert log == [("info", f"DELTA: this model was calibrated at an earlier start, {path}")]
    assert list((tmp_path / "cache" / "delta").glob("*.json")) == [tmp_path / path]


@pytest.mark.parametrize("content", ["", '{"delta": {"full_layers": 1, "selection_layers": [1, 50]}}'])
def test_a_damaged_file_is_made_again(build, tiny_model, tmp_path, log, content):
    """Also one whose layers the model does not have."""
    path = tmp_path / build(tiny_model).additional_config["delta"]["calibration"]
    path.write_text(content)
    log.clear()
    assert layers_of(build(tiny_model)) == (1, [1, 5])
    assert len(calls(tmp_path)) == 2
    (warning,) = [line for level, line in log if level == "warning"]
    assert str(path) in warning and warning.endswith("; this model is calibrated again")


@pytest.mark.parametrize(
    "delta",
    [
        {},
        {"calibrate": "never"},
        {"calibrate": "auto", "selection_layers": [2, 4]},
        {"calibrate": "auto", "policy": "oracle"},
        {"calibrate": "auto", "full_layers": 8},
    ],
    ids=str,
)
def test_nothing_is_done_where_nobody_asks_or_layers_are_known(build, tiny_model, tmp_path, delta):
    config = build(tiny_model, {"delta": delta})
    assert config.additional_config == {"delta": delta} and not calls(tmp_path)


def test_a_preset_and_a_file_beside_the_model_come_first(build, tiny_model, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    monkeypatch.setitem(plan.PRESETS, ("llama", 8, 128), (2, 5))
    assert build(model).additional_config == AUTO
    (model / CALIBRATION_FILE).write_text('{"delta": {"full_layers": 0, "selection_layers": [0]}}')
    assert layers_of(build(model)) == (0, [0])
    assert not calls(tmp_path)


def test_another_backend_calibrates_nothing(build, tiny_model, tmp_path):
    assert build(tiny_model, attention_backend="CPU_ATTN").additional_config == AUTO
    assert not calls(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "does not support --pipeline-parallel-size 2; leave it out, or name"),
        ({"skip_tokenizer_init": True}, "does not support --skip-tokenizer-init, which leaves no tokenizer"),
        ({"load_format": "dummy"}, "does not support --load-format dummy, whose weights mean nothing"),
        ({"hf_overrides": lambda config: config}, "cannot hand on hf_overrides, which JSON does not hold"),
        (
            {"additional_config": {"delta": {"calibrate": "auto", "full_layers": 1}}},
            "finds the number of full layers, too; leave delta.full_layers out",
        ),
        # What DELTA refuses anyway is refused before.
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is not supported"),
        ({"block_size": 24}, "must divide the KV block size"),
        ({"additional_config": {"delta": {"calibrate": "auto", "page_size": 8}}}, "page_size must be one of"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_before_anything_starts(build, tiny_model, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        build(tiny_model, **options)
    assert message in str(error.value)
    assert not calls(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("parallel_config", "nnodes", 2, "--nnodes 2"),
        ("parallel_config", "distributed_executor_backend", "external_launcher", "an external launcher"),
        ("parallel_config", "placement_group", object(), "a placement group of Ray's"),
        ("model_config", "quantization_config", {"linear": "fp8"}, "--quantization-config"),
    ],
)
def test_servers_that_are_refused(build, tiny_model, part, field, value, message):
    config = build(tiny_model, {"delta": {}})
    config.additional_config = AUTO
    setattr(getattr(config, part), field, value)
    with pytest.raises(DeltaConfigError, match=f'delta.calibrate "auto" does not support .*{message}'):
        calibrate_at_start(DeltaConfig(calibrate="auto"), config)


def test_the_engine_is_the_servers(build, tiny_model, tmp_path):
    """Its arguments make an engine of the same model, and nothing is named that is vLLM's default."""
    from vllm.engine.arg_utils import EngineArgs

    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_model, tokenizer)
    given = {
        "tokenizer": str(tokenizer),
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "block_size": 32,
        "trust_remote_code": True,
        "download_dir": str(tmp_path),
        "cpu_offload_gb": 1,
    }
    config = build(tiny_model, {"delta": {}}, **given)
    assert engine_arguments(config) == given | DERIVED
    assert engine_arguments(build(tiny_model, {"delta": {}}, max_model_len=-1))["max_model_len"] == -1
    model = EngineArgs(str(tiny_model), **engine_arguments(config)).create_model_config()
    assert model.compute_hash() == config.model_config.compute_hash()
    config.parallel_config.distributed_executor_backend = "ray"
    assert engine_arguments(config)["distributed_executor_backend"] == "ray"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"max_model_len": 1024},
        {"tensor_parallel_size": 2},
        {"hf_overrides": {"rms_norm_eps": 1e-4}},
        {"additional": {"delta": {**AUTO["delta"], "budget_tokens": 512}}},
        {"additional": {"delta": {**AUTO["delta"], "sink_tokens": 0}}},
    ],
    ids=str,
)
def test_what_a_calibration_depends_on_makes_another(build, tiny_model, tmp_path, change):
    build(tiny_model)
    build(tiny_model, **change)
    build(tiny_model, gpu_memory_utilization=0.5, max_num_seqs=3)
    assert len(calls(tmp_path)) == 2


def test_another_version_makes_another(build, tiny_model, tmp_path, monkeypatch):
    build(tiny_model)
    monkeypatch.setattr(auto_calibration, "__version__", "another")
    build(tiny_model)
    assert len(calls(tmp_path)) == 2


def model_folder(path, weights=bytes(1 << 20)):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("[]")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_weights_are_known_wherever_they_lie(tmp_path):
    first = model_folder(tmp_path / "first")
    known = identity(str(first))
    copy = model_folder(tmp_path / "copy")
    (copy / "README.md").write_text("of no account")
    (copy / CALIBRATION_FILE).write_text("{}")
    assert identity(str(copy)) == known
    for number, other in enumerate((bytes((1 << 20) + 1), b"\1" + bytes((1 << 20) - 1))):
        assert identity(str(model_folder(tmp_path / f"{number}", other))) != known
    for name, content in (("tokenizer.json", "{}"), ("config.json", "[]"), ("vocab.txt", "a")):
        changed = model_folder(tmp_path / f"other {name}")
        (changed / name).write_text(content)
        assert identity(str(changed)) != known
    renamed = model_folder(tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "other.safetensors")
    assert identity(str(renamed)) != known
    assert identity(str(first / "model.safetensors")) == identity(str(copy / "model.safetensors"))


def test_a_change_all_along_the_weights_is_seen(tmp_path):
    """As training changes a tensor: every thirtieth part of a file, but not every byte."""
    known = identity(str(model_folder(tmp_path / "first")))
    for part in range(30):
        weights = bytearray(1 << 20)
        begin, end = part * len(weights) // 30, (part + 1) * len(weights) // 30
        weights[begin:end:2] = b"\1" * len(weights[begin:end:2])
        folder = model_folder(tmp_path / f"{part}", bytes(weights))
        assert identity(str(folder)) != known


def test_large_weights_are_not_read_as_a_whole(tmp_path):
    folder = model_folder(tmp_path / "large")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    begin = time.monotonic()
    identity(str(folder))
    assert time.monotonic() - begin < 5


def test_a_model_on_a_hub_is_its_commit():
    assert identity("some/model", "abc") != identity("some/model", "def") != identity("some/other", "def")
    resolved = SimpleNamespace(resolved="abc")
    assert auto_calibration._commit(SimpleNamespace(hf_config_path=None, hf_config=None), resolved) == "abc"
    noted = SimpleNamespace(hf_config_path=None, hf_config=SimpleNamespace(_commit_hash="def"))
    assert auto_calibration._commit(noted, None) == "def"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "print('vllm-delta calibrate: a first try')\n"
            "sys.exit('\\nvllm-delta calibrate: full attention looks up only 3 tokens right')",
            "vllm-delta calibrate: full attention looks up only 3 tokens right",
        ),
        ("sys.exit('vllm-delta calibrate: error: --out: x is a folder')", "calibrate: --out: x is a folder"),
        ("os.kill(os.getpid(), 9)", "vllm-delta calibrate: it ended with status -9"),
    ],
    ids=["said", "usage", "killed"],
)
def test_a_calibration_that_fails_ends_the_start(
    build, tiny_model, tmp_path, monkeypatch, capsys, program, words
):
    """In the command's words, which are in the log, too. Nothing is left, and the next start tries again."""
    use_command(monkeypatch, tmp_path, f"import os, sys\n{program}")
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            build(tiny_model)
        assert f'delta.calibrate "auto" found no layers for {tiny_model}: ' in str(error.value)
        assert words in str(error.value) and "Traceback" not in str(error.value)
    assert "status" in words or words.split(": ")[-1] in capsys.readouterr().err
    assert not list((tmp_path / "cache" / "delta").glob("*.json"))


def test_a_cache_that_cannot_be_written_is_named(build, tiny_model, tmp_path):
    (tmp_path / "cache" / "delta").write_text("a file")
    with pytest.raises(
        ValueError, match=r"delta\.calibrate: .*cache.*; VLLM_CACHE_ROOT names another folder"
    ):
        build(tiny_model)


def test_of_two_servers_one_calibrates(build, tiny_model, tmp_path, monkeypatch, log):
    config = build(tiny_model, {"delta": {}})
    config.additional_config = AUTO
    configs = [config, dataclasses.replace(config, additional_config={"delta": {}})]
    configs[1].additional_config = AUTO
    monkeypatch.setenv("STUB_SECONDS", "1.5")
    threads = [
        threading.Thread(target=calibrate_at_start, args=(settings.settings_of(each), each))
        for each in configs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [layers_of(each) for each in configs] == [(1, [1, 5])] * 2
    assert len(calls(tmp_path)) == 1
    said = "\n".join(line for _, line in log)
    assert said.count("waiting for another process that calibrates this model") == 1
    assert said.count("the other process has calibrated this model") == 1


#: Waits for the command as a server does; SIGINT is only noted, as asyncio does it.
WAITING = """
import os, signal, sys
from vllm_delta.calibration import process
signal.signal(signal.SIGINT, lambda *_: None)
command, *arguments = sys.argv[1:]
process.COMMAND = (sys.executable, command)
with process.signals_noted() as noted:
    process.run_command(arguments, os.environ, noted)
"""

#: In the command's place: an engine of its own, and a file that is being written; as stubborn as it is told.
WORKING = """
import os, pathlib, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
print("at work", flush=True)
sys.stdin.read()
if sys.argv[1] != "stubborn":
    child.kill()
    os._exit(143)
time.sleep(600)
"""


def stop_waiting(number, log, *arguments):
    """Signal a process that waits for the command; its status, and what was started, and is left."""
    with log.open("w") as stream:
        waiting = subprocess.Popen(
            [sys.executable, "-c", WAITING, *arguments], stderr=stream, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while "at work" not in log.read_text():
            assert waiting.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        started = psutil.Process(waiting.pid).children(recursive=True)
        waiting.send_signal(number)
        status = waiting.wait(60)
    _, left = psutil.wait_procs(started, timeout=20)
    return status, started, [process for process in left if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name
)
def test_a_signal_to_who_waits_ends_the_command(tmp_path, number):
    """Each does then what it would have done; SIGINT, which only takes note of it, ends the start, too."""
    (tmp_path / "command.py").write_text(WORKING)
    status, started, left = stop_waiting(number, tmp_path / "log", str(tmp_path / "command.py"), "obedient")
    assert status == -number
    assert len(started) == 2 and not left


def test_a_command_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """With whatever it has started."""
    use_command(monkeypatch, tmp_path, WORKING)
    monkeypatch.setattr(process, "GRACE", 0.5)
    others = psutil.Process().children(recursive=True)
    started = []

    def look():
        while len(started) < 2:
            started[:] = set(psutil.Process().children(recursive=True)) - set(others)
        noted.append(signal.SIGTERM)

    noted = []
    threading.Thread(target=look).start()
    run_command(["stubborn"], os.environ, noted)
    assert not psutil.wait_procs(started, timeout=5)[1]


def test_a_signal_in_another_thread_is_not_looked_for():
    def wait():
        with signals_noted() as noted:
            assert not noted

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_command_says_is_remembered(monkeypatch, tmp_path):
    """Its words, not the bar's, whose characters come in parts."""
    use_command(
        monkeypatch,
        tmp_path,
        "import sys, time\nbar = '\\r' + '\\u2588' * 3\n"
        "for _ in range(20000): sys.stdout.write(bar)\n"
        "sys.exit('\\nvllm-delta calibrate: \\u00fcber')",
    )
    with pytest.raises(CalibrationError, match=r"^über$"):
        run_command([], {**os.environ, "PYTHONIOENCODING": "utf-8"}, [])


def test_a_server_calibrates_and_serves(tmp_path, build):
    """Where the rule of thumb does not find the layer that retrieves; the next start finds the file."""
    induction_model = build_induction_model(tmp_path / "model")
    options = {"dtype": "float32", "gpu_memory_utilization": 0.3}
    arguments = ["--attention-backend", "DELTA", "--additional-config", json.dumps(AUTO), "--enforce-eager"]
    arguments += ["--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    # In one process each, the calibration's engine and the server's worker start sooner.
    env = {**ONE_THREAD, "VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    log = tmp_path / "server.log"
    with Server(induction_model, arguments, env=env, log_path=log) as server:
        note = "The boat shed has the number"
        prompt = f"{note} 4711. " + "All work and no play makes Jack a dull boy. " * 25 + note
        body = {"model": server.model, "prompt": prompt, "max_tokens": 5, "temperature": 0}
        answer = server.post("/v1/completions", body)["choices"][0]["text"]
        assert answer.startswith(" 4711.")
        layers = server.counters()["layers"]
    assert layers["full"]["rows"] == 0 and layers["selection"]["rows"] * 3 == layers["sparse"]["rows"] > 0
    text = log.read_text()
    (path,) = (tmp_path / "cache" / "delta").glob("*.json")
    assert json.loads(path.read_text())["delta"]["selection_layers"] == [0, RETRIEVES]
    assert f"selection layers from calibration {path}" in text
    assert "0 full layers and selection layers 0, 5 keep 100.0% of what it looks up" in text
    assert layers_of(build(induction_model, **options)) == (0, [0, RETRIEVES])
    assert not calls(tmp_path)
