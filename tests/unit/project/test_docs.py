"""The pages say what is so: links and anchors lead somewhere, references and messages are those of the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasilet_dev import docs_tasks
from wasilet_node import command_parser

from tests.docs_pages import DOCS, Command, File, PageError, begins, fences, items, matches, pages, without_fences

pytestmark = pytest.mark.unit

CHECKOUT = DOCS.parent
FRONT = tuple(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))
SAMPLES = tuple(sorted(CHECKOUT.glob("samples/*/README.md")))

NOT_MESSAGES = frozenset(
    {
        "the pod's status is Completed and CrashLoopBackOff in turn",
        "kubectl logs says x509 or TLS",
        "kubectl logs says 502, or the proxy refuses loopback",
        "DESTINATION_NOT_ALLOWED",
        'violates PodSecurity "baseline:latest"',
    }
)
"""Headings of the troubleshooting page that describe what is seen."""

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#{1,6})\s+(.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub and MyST make them."""
    found: set[str] = set()
    for _, title in _HEADING.findall(without_fences(page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower().replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"``?[^`\n]+``?", "", without_fences(page.read_text()))
    yield from _LINK.findall(text)


def broken_links(page: Path) -> Iterator[str]:
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page if not target else (page.parent / target).resolve()
        if not file.exists():
            yield f"{link}: there is no {target}"
        elif anchor and anchor not in anchors(file):
            yield f"{link}: {file.name} has no such heading"


@pytest.mark.parametrize("page", [*pages(), *FRONT, *SAMPLES], ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_every_page_can_be_found_from_the_first_one() -> None:
    trees = [fence for fence in fences((DOCS / "index.md").read_text()) if fence.language == "{toctree}"]
    listed = {line.strip() for tree in trees for line in tree.body if line.strip() and not line.startswith(":")}
    assert listed == {str(page.relative_to(DOCS).with_suffix("")) for page in pages()} - {"index"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    assert not re.search(r"/root/|/home/(?!you)|/work/", page.read_text())


@pytest.mark.parametrize("name", ["hello-world-2020", "hello-wasm-2022", "cat-facts"])
def test_every_command_block_of_a_tutorial_is_one_that_is_run(name: str) -> None:
    found = list(fences((DOCS / "tutorials" / f"{name}.md").read_text()))
    assert sum(fence.language == "console" for fence in found) >= 5
    assert not [fence.line for fence in found if fence.language in {"", "sh", "bash", "shell"}]


# --- what is made from the sources -----------------------------------------------------------------------------------


def test_the_reference_of_the_tasks_is_up_to_date() -> None:
    text = docs_tasks.page().read_text()
    assert docs_tasks.updated(text) == text, "type: python -P -m wasilet_dev.docs_tasks"


def test_every_task_is_explained_with_its_options() -> None:
    reference = docs_tasks.reference()
    for wanted in (
        "### `up`",
        "### `demo`",
        "`--provider TEXT`",
        "| `APP` | a sample's name",
        "invoke demo hello-world",
    ):
        assert wanted in reference


def test_every_flag_and_variable_of_the_node_is_in_its_reference() -> None:
    text = (DOCS / "node.md").read_text()
    usage = command_parser.make_parser("1").format_help()
    known = {*re.findall(r"(?<![\w-])--?[a-z][a-z-]*", usage.partition("examples:")[0])}
    variables = {*re.findall(r"\b(?:WASILET_NODE|KRUSTLET)_[A-Z_]+|\bMAX_PODS\b|\bNODE_LABELS\b", usage)}
    assert len(variables) > 20
    missing = [name for name in sorted(known | variables) if f"`{name}" not in text]
    assert not set(missing) - {"-h", "-m"}


def test_every_setting_of_the_environment_is_in_the_reference_of_the_harness() -> None:
    from wasilet.settings import _ENVIRONMENT

    text = (DOCS / "harness.md").read_text()
    assert [name for name in _ENVIRONMENT if name not in text] == []


# --- messages --------------------------------------------------------------------------------------------------------


def messages() -> set[tuple[str, ...]]:
    """The fixed parts, in lower case, of every text of the sources that is long enough to be known again."""
    found = set()
    for package in ("common", "harness", "node"):
        for file in sorted((CHECKOUT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                parts = _fixed_parts(node)
                if sum(map(len, parts)) >= 10:
                    found.add(parts)
    return found


def _fixed_parts(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value.strip().lower(),)
    if isinstance(node, ast.JoinedStr):
        return tuple(str(part.value).strip().lower() for part in node.values if isinstance(part, ast.Constant))
    return ()


def says(heading: str, parts: tuple[str, ...]) -> bool:
    """Whether the heading is that message, or its beginning, or holds it: hints stand behind it in the sources too."""
    if len(heading) >= 20 and parts[0].startswith(heading):
        return True
    at = 0
    for part in parts:
        at = heading.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return sum(map(len, parts)) * 3 >= len(heading)


def test_every_message_of_the_troubleshooting_page_is_one_of_the_sources() -> None:
    text = without_fences((DOCS / "troubleshooting.md").read_text())
    headings = [title for level, title in _HEADING.findall(text) if level == "###"]
    assert len(headings) > 50
    known = messages()
    unknown = [
        heading
        for heading in headings
        if heading not in NOT_MESSAGES and not any(says(heading.lower(), parts) for parts in known)
    ]
    assert unknown == []


def test_a_message_that_the_sources_do_not_hold_is_noticed() -> None:
    assert says("there is no cluster 'x' (`invoke up` makes one)", ("there is no cluster ",))
    assert not says("there is no cluster 'x' (`invoke up` makes one)", ("there is", "no node"))
    assert not says("there is no cluster 'x' (`invoke up` makes one)", ("there is no",))


# --- pages as programs -----------------------------------------------------------------------------------------------


def test_a_page_is_read_as_commands_and_files() -> None:
    text = (
        "Put this into `~/a.txt`:\n\n```text\none\n```\n\n<!-- exit code 2 -->\n\n```console\n$ cat <<E\n> x\n>\n> E\n"
        "x\n\n$ tail -f a\n...\n^C\n```\n```text\ntwo\n```"
    )
    assert items(text) == [
        File(line=3, path="~/a.txt", content="one\n"),
        Command(line=10, text="cat <<E\nx\n\nE", expected=("x",), exit_code=2),
        Command(line=16, text="tail -f a", expected=("...",), interrupted=True, exit_code=2),
    ]


@pytest.mark.parametrize(
    "text", ["```console\nls\n```", "```console\n```", "```console\n$ a\nout\n> b\n```", "```console\n$ a"]
)
def test_a_page_that_cannot_be_typed_is_refused(text: str) -> None:
    with pytest.raises(PageError, match="page:"):
        items(text)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        (["a ... c"], ["a b b c"]),
        (["NAME   READY", "x      1/1"], ["NAME               READY ", "x                 1/1"]),
        (["...", "b", "..."], ["a", "b", "c", "d"]),
        (["...", "b", "..."], ["b"]),
        (["a"], ["a", ""]),
    ],
)
def test_output_that_fits(expected: list[str], printed: list[str]) -> None:
    assert matches(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [(["a"], ["a", "b"]), (["a b"], ["a  b"]), (["a.c"], ["abc"]), (["...", "b"], ["a"]), (["a"], [])],
)
def test_output_that_does_not_fit(expected: list[str], printed: list[str]) -> None:
    assert not matches(expected, printed)


def test_a_command_that_runs_on_fits_as_soon_as_its_first_lines_do() -> None:
    assert begins(["a"], ["a", "b"])
    assert not begins(["a", "b"], ["a"])
