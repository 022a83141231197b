"""What the launchers ask of a device, and a stream beside the main one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; few where Triton's interpreter stands in for one, which runs them in turn."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take, by Triton's own measure."""
    if device.type != "cuda":
        return 1 << 30  # the interpreter has no limit
    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return limit


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it is done, and wait for it (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(device: torch.device, dependent: bool = True) -> dict[str, bool]:
    """Options of a launch: to start before the one ahead of it is done, if it may and the device can."""
    if dependent and has_dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


class SideStream:
    """Launches beside the main stream's, until these wait for them; a CUDA graph records them as a branch."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pending = False

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Launch inside of it what needs all that was launched so far, and what `join` waits for."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._pending = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> bool:
        """Let what is launched next wait for the side stream; returns whether there was something."""
        was_pending, self._pending = self._pending, False
        if was_pending:
            torch.cuda.current_stream().wait_stream(self._stream)
        return was_pending
