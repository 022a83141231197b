"""Entry points: vLLM calls these functions in every process that it starts.

Imports of vLLM stand inside the functions: `platform_plugin` runs while vLLM itself is being imported.
"""

from __future__ import annotations

from typing import Any

from vllm_delta.integration.names import BACKEND_NAME, BACKEND_PATH, CPU_PLATFORM_PATH, PLATFORM_PLUGINS


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make DELTA known, and effective on this platform.

    Does nothing more for a user who does not select DELTA. May be called more than once.
    """
    register_backend()
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or current_platform.is_cuda():
        from vllm_delta.integration.platform import adopt_platform

        adopt_platform(current_platform)


def platform_plugin() -> str | None:
    """Entry point of ``vllm.platform_plugins``: DELTA's variant of the CPU platform, where vLLM runs on one.

    It runs early, before any configuration is built, which lets ``LLM(attention_config={"backend":
    "DELTA"})`` find the name. Returns None where vLLM runs on something else, and where another platform
    plugin is installed: vLLM accepts one only. `register` then adapts that one.
    """
    register_backend()
    from importlib.metadata import entry_points

    others = [entry for entry in entry_points(group=PLATFORM_PLUGINS) if entry.name != "delta"]
    if others:
        return None
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM_PATH if cpu_platform_plugin() else None


def register_backend() -> None:
    """Add DELTA to vLLM's attention backends, once."""
    from vllm.v1.attention.backends import registry

    backends = registry.AttentionBackendEnum
    if BACKEND_NAME in backends.__members__:
        return
    registry.register_backend(BACKEND_NAME, BACKEND_PATH)
    # Members of an enum pickle by value, and a new process unpickles vLLM's configuration before it loads
    # plugins, when the value does not exist yet. Pickled as a call to a function of ours, the member brings
    # its registration along.
    backends[BACKEND_NAME].__reduce_ex__ = lambda _protocol: (restore_backend, ())


def restore_backend() -> Any:
    """The enum member, registered if need be; what a pickled member is unpickled with."""
    register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND_NAME]
