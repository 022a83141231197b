"""The pages say what is true, as far as a program can tell, and in sentences that a tired person can read."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import ROOT

from vllm_delta.integration.compat import TESTED_VLLM
from vllm_delta.method.config import DeltaConfig
from vllm_delta.method.plan import make_plan

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").glob("*.md"))
)

MOST_WORDS, MOST_COLUMNS = 40, 110

#: What a path in this repository begins with, in code spans; and the package's rooms, without the package.
FOLDERS = ("vllm_delta", "tests", "docs", "csrc", "benchmarks", "tools", ".ci", ".github")
ROOMS = ("method", "kernels", "plain", "calibration", "integration", "cli")

#: Tests of the benchmarks and of the accuracy harness.
HARNESS = ROOT / "tests" / "harness"

#: Messages of vLLM's that docs/troubleshooting.md quotes.
OF_VLLM = (
    "Unknown attention backend: 'DELTA'",
    "is not supported with … backend",
    "is less than desired CPU memory utilization",
    "allocation is less than requested memory for kv",
    "assert self.intermediate_tensors is not None",
    "Dual-Batch Overlap is not supported on CPU, disabled.",
)


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@functools.cache
def without_code_blocks(page: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def without_results(page: str) -> str:
    """Nor what is written from results."""
    return re.sub(r"<!-- table:.*?<!-- end -->", "", without_code_blocks(page), flags=re.DOTALL)


def code_blocks(page: str) -> list[str]:
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def paragraphs(page: str) -> Iterator[str]:
    """Prose: paragraphs and items of lists, without tables, headings, pictures and comments."""
    prose = re.sub(r"<!--.*?-->", "", without_results(page), flags=re.DOTALL)
    prose = re.sub(r"^ *(\||#|!\[).*$", "", prose, flags=re.MULTILINE)
    prose = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", prose, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        if paragraph.strip():
            yield " ".join(paragraph.split())


def sentences(paragraph: str) -> list[str]:
    """A code span is a word, of a link its text counts; a full stop ends a sentence before a new one."""
    plain = re.sub(r"`[^`]*`", "Code", paragraph)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("*", "")
    return re.split(r"""(?<=[.!?])["')]*\s+(?=["'(]*[A-Z0-9])""", plain)


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def test_sentences_are_split_fairly():
    text = "See `a.b c.d` in [the docs](x.md#a.b). It is 0.32.0 with 1.5 GiB (so it is). `Code` ends. no, so!"
    assert [len(words(sentence)) for sentence in sentences(text)] == [5, 9, 4]


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    for sentence in itertools.chain.from_iterable(map(sentences, paragraphs(page))):
        assert len(words(sentence)) <= MOST_WORDS, sentence


def test_the_first_pages_are_short():
    assert len(text_of("README.md").split()) <= 500
    assert text_of("docs/benchmarks.md").count("\n") <= 150


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_wrapped(page):
    for line in without_results(page).splitlines():
        assert len(line) <= MOST_COLUMNS or line.startswith("|"), line


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    slugs = []
    for heading in re.findall(r"^#+ (.*)$", without_code_blocks(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slugs.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return {f"{slug}-{slugs[:index].count(slug)}".removesuffix("-0") for index, slug in enumerate(slugs)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page)):
        if re.match(r"\w+:", link):
            continue  # another site's
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


def is_there(path: str) -> bool:
    """Braces and stars stand for several files; of a test's name behind ``::`` only the file is looked at."""
    path = path.partition("::")[0]
    variants = [path]
    while any("{" in variant for variant in variants):
        variants = [
            variant[: found.start()] + part + variant[found.end() :]
            for variant in variants
            if (found := re.search(r"{([^{}]*)}", variant))
            for part in found[1].split(",")
        ]
    return all(any(ROOT.glob(variant)) for variant in variants)


def paths(page: str) -> set[str]:
    """Whatever looks like a path in this repository, in code spans and as a word of a code block."""
    found = set()
    in_blocks = itertools.chain.from_iterable(block.split() for block in code_blocks(page))
    for word in itertools.chain(code_spans(without_code_blocks(page)), in_blocks):
        first, _, rest = word.rstrip(",;:)").partition("/")
        if first in FOLDERS and re.fullmatch(r"[\w./*{},:-]*", rest) and "/" in word:
            found.add(f"{first}/{rest}")
        elif first in ROOMS and re.fullmatch(r"[\w./*{},-]+", rest):
            found.add(f"vllm_delta/{first}/{rest}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    assert not [path for path in sorted(paths(page)) if not is_there(path)]


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the tables that begin with these words, row by row."""
    rows: list[list[str]] = []
    inside = False
    for line in text_of(page).splitlines():
        inside = line.startswith(heading) or (inside and line.startswith("|"))
        if inside and not line.startswith((heading, "|---")):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_every_setting_is_documented_with_its_default():
    documented = {
        cells[0].strip("`"): json.loads(cells[1].strip("`"))
        for cells in table("docs/configuration.md", "| key | default |")
    }
    assert documented == {field.name: field.default for field in fields(DeltaConfig)}


def test_the_log_line_is_that_of_the_default_plan():
    plans = {
        "docs/configuration.md": make_plan(DeltaConfig(), range(28), 28),
        "README.md": replace(
            make_plan(DeltaConfig(full_layers=0, selection_layers=(0, 2, 7, 15, 18)), range(30), 30),
            source="probe",
        ),
    }
    for page, plan in plans.items():
        assert f"DELTA: {plan.describe()}; budget " in text_of(page).replace("\n", " "), page


def test_installing_names_the_tested_versions():
    named = re.findall(r"\b\d+\.\d+\.\d+\b", text_of("docs/install.md"))
    assert set(named) == set(TESTED_VLLM)


def test_every_file_of_tests_is_in_the_table():
    files = {path.name for folder in (ROOT / "tests", HARNESS) for path in folder.glob("test_*.py")}
    rows = table("CONTRIBUTING.md", "| file | proves |")
    named = {name for cells in rows for name in code_spans(cells[0])}
    assert not files - named, "they stand in no row"
    assert not named - files, "they are not there"


def targets_named(page: str) -> set[str]:
    named = set()
    lines = itertools.chain.from_iterable(block.splitlines() for block in code_blocks(page))
    for code in itertools.chain(code_spans(without_code_blocks(page)), lines):
        for call in re.findall(r"(?:^|\s)make((?: [a-z][a-z-]*\b(?!=))+)", code.partition("#")[0]):
            named |= set(call.split())
    return named


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), flags=re.MULTILINE))
    named = {page: targets_named(page) - targets for page in PAGES}
    assert not {page: names for page, names in named.items() if names}
    assert "setup" in targets_named("docs/install.md"), "nothing is found"


def literals() -> str:
    """All texts in the code that may make a message, with a mark where a value is put in."""
    found = []
    for path in (*(ROOT / "vllm_delta").rglob("*.py"), ROOT / "setup.py", ROOT / "tools" / "install_vllm.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "\0").replace("%d", "\0"))
    return "\1".join((*found, text_of("Makefile")))


def messages(page: str) -> set[str]:
    """Code spans of several words in the first cells of tables."""
    cells = re.findall(r"^\| (.*?) \|", text_of(page), flags=re.MULTILINE)
    return {span for cell in cells for span in code_spans(cell) if " " in span}


def test_messages_of_troubleshooting_are_those_of_the_code():
    quoted = messages("docs/troubleshooting.md")
    assert len(quoted) > 40, "nothing is found"
    assert set(OF_VLLM) <= quoted
    code = literals()
    for message in quoted - set(OF_VLLM):
        for part in message.split("…"):
            assert part in code, f"{message}: {part!r} is in no text of the code"


def test_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/design.md"} <= set(PAGES)
    assert Path(ROOT / "docs" / "configuration.md").exists()
