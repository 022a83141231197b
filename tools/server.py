"""Run ``vllm serve`` as a child process: start, wait until healthy, talk to it, stop it for sure.

The demo and the end-to-end tests need the same care: a free port, a log to show when the start
fails, and no process left behind whatever goes wrong. vLLM starts its engine in processes of its
own, so the server gets a process group and the whole group is stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn, Self

from vllm_delta.method.counters import total

if TYPE_CHECKING:
    from openai import OpenAI

HOST = "127.0.0.1"

# A caller's environment wins over the first group, for these are choices of size and manners.
DEFAULT_ENV = {
    "HF_HUB_OFFLINE": "1",  # every model here is a local folder
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
REQUIRED_ENV = {"VLLM_SERVER_DEV_MODE": "1"}  # POST /collective_rpc, where the counters are read


class ServerError(RuntimeError):
    """The server did not start, died, answered a request with an error, or not as it should."""


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def show_waiting(elapsed: float) -> None:
    """Show that a server is starting: a running count, or a line now and then in a log."""
    if sys.stdout.isatty():
        print(f"\r  starting ... {elapsed:3.0f} s", end="", flush=True)
    elif round(elapsed) % 10 == 0:
        print(f"  starting ... {elapsed:.0f} s", flush=True)


def exit_status(work: Callable[[], object], log_path: Path) -> int:
    """Do a demo's work; the exit status, where what went wrong is printed.

    SIGTERM ends this process by way of an exception, so that servers are stopped on the way out.
    """
    from openai import OpenAIError

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        work()
    except ServerError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except OpenAIError as error:
        print(f"\ndemo: {error}; the end of {log_path}:\n{tail(log_path)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a log, or why there are none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(no log: {error})"


def error_lines(path: Path, lines: int = 5) -> list[str]:
    """The first errors in a log: vLLM reports the cause long before the end, in another process."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    found = re.findall(r"^(?:.*\] )?((?:\w+\.)*\w*(?:Error|Exception): .*)$", text, re.MULTILINE)
    return list(dict.fromkeys(found))[:lines]


def vllm_command() -> str:
    """The ``vllm`` script of the environment this Python belongs to."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ServerError("there is no vllm command in this environment (run: make setup)")
    return found


class Server:
    """One ``vllm serve`` process; a context manager that starts it and stops it.

    ``args`` go to ``vllm serve`` as they are, ``env`` is laid over this process's environment. The
    log is kept at ``log_path``. ``on_wait`` is called about once a second while the server starts,
    with the seconds since the start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: Path = Path("build/server.log"),
        *,
        start_timeout: float = 600.0,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.model = str(model)
        self.args = list(args)
        self.env = {**DEFAULT_ENV, **os.environ, **(env or {}), **REQUIRED_ENV}
        self.log_path = Path(log_path)
        self.start_timeout = start_timeout
        self.on_wait = on_wait
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Where the server listens, without a path."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it is healthy; on failure the caller must ``stop``."""
        if self._process is not None:
            raise ServerError("the server is already running")
        self.port = free_port()
        command = [vllm_command(), "serve", self.model, "--host", HOST, "--port", str(self.port)]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("wb")
        self._process = subprocess.Popen(
            [*command, *self.args],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self.env,
            start_new_session=True,
        )
        self._wait_until_healthy(self._process)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        begin = time.monotonic()
        while True:
            elapsed = time.monotonic() - begin
            if (status := process.poll()) is not None:
                raise self._failure(f"the server ended with status {status} after {elapsed:.0f} s")
            if elapsed > self.start_timeout:
                raise self._failure(f"the server was not healthy after {elapsed:.0f} s")
            # Nothing listens at first, and later /health may answer with an error for a while.
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.base_url}/health", timeout=5),
            ):
                return
            if self.on_wait is not None:
                self.on_wait(elapsed)
            time.sleep(1.0)

    def _failure(self, message: str) -> ServerError:
        parts = [message]
        if errors := error_lines(self.log_path):
            parts += [f"errors in {self.log_path}:", *errors]
        return ServerError("\n".join([*parts, f"the end of {self.log_path}:", tail(self.log_path)]))

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 300.0) -> Any:
        """POST ``body`` as JSON and return the decoded answer."""
        request = urllib.request.Request(
            f"{self.base_url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:2000]
            raise ServerError(f"POST {path} answered {error.code}: {detail}") from error
        except OSError as error:
            raise self._failure(f"POST {path} failed: {error}") from error

    def collective_rpc(self, method: str, *args: str) -> list[Any]:
        """Call a method of every worker; one result per worker."""
        results = self.post("/collective_rpc", {"method": method, "args": list(args)})["results"]
        if not isinstance(results, list):
            raise ServerError(f"{method} answered {results!r}, not a list")
        return results

    def counters(self) -> dict[str, Any]:
        """The attention counters since the start, summed over the workers."""
        results = self.collective_rpc("delta_counters")
        if not results or not all(isinstance(result, dict) for result in results):
            raise ServerError(f"the workers have no counters; they answered {results!r}")
        return total(results)

    def client(self, timeout: float = 300.0) -> OpenAI:
        """An OpenAI client for this server that does not retry."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.base_url}/v1", api_key="unused", timeout=timeout, max_retries=0)

    def stop(self, grace: float = 10.0) -> None:
        """Stop the server and every process of its group; harmless when there is none."""
        process, self._process = self._process, None
        if process is not None:
            try:
                # First the server alone, which ends its engine in an orderly way. SIGTERM rather than
                # SIGINT, which a child of a background job ignores.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=grace)
                # Then what is left: the helpers need a moment to release their shared memory.
                _signal_group(process.pid, signal.SIGTERM)
                deadline = time.monotonic() + grace / 2
                while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                    process.poll()
                    time.sleep(0.1)
            finally:  # also when a second Ctrl-C cuts the patience short
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if it has no process left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
