"""``vllm-delta calibrate`` in a process of its own, which ends with the process that waits for it."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from vllm_delta.calibration.prompts import CalibrationError

#: The command, to which arguments are added.
COMMAND = (sys.executable, "-m", "vllm_delta.cli", "calibrate")

#: Seconds that it has to end its engine when nobody waits any more.
GRACE = 30.0

#: Characters of what it prints last that are remembered.
REMEMBERED = 1 << 16


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, and at the end the first of them does what it would have done.

    Whoever waits meanwhile has to look at the list. In another thread than the main one, nothing is noted.

    Raises:
        KeyboardInterrupt: one was noted, and its own handler has only taken note of it, too.
    """
    noted: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])
            raise KeyboardInterrupt


def run_command(arguments: Sequence[str], environment: Mapping[str, str], noted: Sequence[int]) -> None:
    """Calibrate, and show on standard error what the command prints.

    It watches a pipe from here, and ends itself and its engine when that closes, for whatever reason. It ends
    also when a signal is noted, and has not calibrated then.

    Args:
        arguments: of ``vllm-delta calibrate``.
        environment: of the process.
        noted: see `signals_noted`.

    Raises:
        CalibrationError: it failed; in the command's own words, if it said some.
    """
    child = subprocess.Popen(
        [*COMMAND, *arguments, "--end-with-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"COLUMNS": str(shutil.get_terminal_size().columns), **_bar_options(), **environment},
        process_group=0,  # so that a terminal signals this process alone, and what is left can be found
    )
    assert child.stdin is not None and child.stdout is not None
    relay = _Relay(child.stdout)
    relay.start()
    try:
        while child.poll() is None and not noted:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
    finally:
        child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        if child.returncode is None or child.returncode < 0:  # it could not end its engine
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        relay.join(1.0)  # longer only if somebody else holds the pipe
    if child.returncode and not noted:
        said = re.findall(r"^vllm-delta calibrate: (?:error: )?(.+)$", relay.text, re.MULTILINE)
        raise CalibrationError(said[-1] if said else f"it ended with status {child.returncode}")


def _bar_options() -> dict[str, str]:
    """In a log a bar is a line that becomes long: there it moves every ten seconds."""
    return {} if sys.stderr and sys.stderr.isatty() else {"TQDM_MININTERVAL": "10"}


class _Relay(threading.Thread):
    """Writes to standard error what a process prints, and remembers the end of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self.text = ""

    def run(self) -> None:
        """Until the process has closed its side."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with self._stream:
            while data := os.read(self._stream.fileno(), 1 << 14):
                text = decoder.decode(data)
                self.text = (self.text + text)[-REMEMBERED:]
                with contextlib.suppress(Exception):  # whatever it is: the process must not wait for us
                    sys.stderr.write(text)
                    sys.stderr.flush()
