"""README and the documentation: their commands and Python blocks run, and what they name exists."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from processes import run_lowtide, run_python

from lowtide.cli.main import COMMANDS, main
from lowtide.memory.plan import line as plan_line
from lowtide.runtime import errors

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```.*?^```\n", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
TIMEOUT_S = 600
RUN_BEFORE: set[str] = set()
"""Commands that several pages show run once."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `note` is the HTML comment in the line before it."""

    page: Path
    number: int
    language: str
    text: str
    note: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def read_blocks(language: str) -> list[Block]:
    pattern = re.compile(
        r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```",
        re.DOTALL | re.MULTILINE,
    )
    return [
        Block(page, read(page).count("\n", 0, m.start()) + 1, language, m["text"], m["note"] or "")
        for page in PAGES
        for m in pattern.finditer(read(page))
        if m["language"] == language
    ]


def lowtide_lines(block: Block) -> list[str]:
    return [line for line in block.text.splitlines() if re.search(r"(^|\| |v )lowtide ", line)]


def as_parameters(blocks: list[Block]) -> list[object]:
    parameters = []
    for block in blocks:
        marks = [] if "FakeModel" in block.text else [pytest.mark.real]
        if block.note == "slow":
            marks.append(pytest.mark.slow)
        if not block.note.startswith("not run: "):
            parameters.append(pytest.param(block, id=block.id, marks=marks))
    return parameters


COMMAND_BLOCKS = [block for block in read_blocks("sh") if lowtide_lines(block)]
PYTHON_BLOCKS = read_blocks("python")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the commands read."""
    (tmp_path / "question.txt").write_text("Why is the sea salty?")
    (tmp_path / "turns.txt").write_text("Name a colour.\nName another one.\n")
    facts = " ".join(f"Harbour {number} has {number * 7} boats." for number in range(150))
    (tmp_path / "report.txt").write_text(f"{facts}\nHow many boats has harbour 40?")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", as_parameters(COMMAND_BLOCKS))
def test_commands_run(block: Block, folder: Path) -> None:
    for line in lowtide_lines(block):
        if line in RUN_BEFORE:
            continue
        RUN_BEFORE.add(line)
        before, _, command = line.partition("lowtide ")
        program, *arguments = shlex.split(before.rstrip("| ")) or [""]
        stdin = b""
        if program:
            ending = "\n" if program == "echo" else ""
            stdin = (arguments[0] + ending).replace("\\n", "\n").encode()
        done = run_lowtide(*shlex.split(command, comments=True), stdin=stdin, timeout=TIMEOUT_S)
        assert done.code == 0, f"{line}\n{done.stderr}"
        assert done.stdout or "convert" in line, line


@pytest.mark.parametrize("block", as_parameters(PYTHON_BLOCKS))
def test_python_blocks_run(block: Block, folder: Path) -> None:
    done = run_python(block.text, timeout=TIMEOUT_S)
    assert done.code == 0, done.stderr


def test_notes_before_blocks_are_known() -> None:
    for block in [*read_blocks("sh"), *PYTHON_BLOCKS]:
        assert re.fullmatch(r"|slow|not run: .+", block.note), block.id


@pytest.mark.real
def test_python_example_of_readme_names_a_budget_that_is_large_enough() -> None:
    (block,) = (block for block in PYTHON_BLOCKS if block.page == README)
    done = run_python(block.text, timeout=TIMEOUT_S)
    assert "planned peak" in done.stdout
    assert re.search(r"needs at least (\d+) MiB.*: raise memory to \1MiB", done.stdout)


def test_readme_is_short() -> None:
    text = read(README)
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800
    assert max(map(len, text.splitlines())) <= 120
    assert "pytest" not in text


def prose_of(page: Path) -> str:
    """The text without code, and with the text of links only."""
    return re.sub(r"\]\([^)]*\)", "]", INLINE.sub("code", FENCED.sub("\n", read(page))))


def test_readme_has_few_numbers() -> None:
    numbers = re.findall(r"(?<![\w.,/-])\d+(?:[.,]\d+)*(?![\w-])", prose_of(README))
    assert len(numbers) <= 30, numbers


def test_readme_has_short_sentences() -> None:
    for paragraph in re.split(r"\n\s*\n|\n(?=[|*#])", prose_of(README)):
        for sentence in re.split(r"(?<=[.!?:;])\s|\|", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 25, sentence


def options_of(command: click.Command) -> set[str]:
    """The options of a command and its subcommands that its help shows."""
    options = {"--help", "-h"}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            options |= {*parameter.opts, *parameter.secondary_opts}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            options |= options_of(child)
    return options


def command_named(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"lowtide {name}"
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    foreign = re.compile(r"pip install|pipx |uv tool|pytest|--benchmark|CMAKE_ARGS")
    known = options_of(main)
    code = [*INLINE.findall(FENCED.sub("\n", read(page)))]
    code += [line for block in FENCED.findall(read(page)) for line in block.splitlines()]
    for piece in code:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", piece.partition("  #")[0]))
        if not foreign.search(piece):
            assert used <= known, piece
        named = re.search(r"\blowtide ([a-z]+)\b", piece)
        if named and named[1] in COMMANDS:
            assert used <= options_of(command_named(named[1])), piece


def test_command_line_page_has_every_command() -> None:
    page = read(ROOT / "docs/cli.md")
    for name in COMMANDS:
        assert f"::: cli {name}\n" in page and f"`lowtide {name}`" in page


def test_commands_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`lowtide ([a-z]+)", read(page)):
            assert name in COMMANDS, f"{page.name}: lowtide {name}"


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("\n", read(page)), re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}
    return slugs | {f"lowtide-{name}" for name in COMMANDS if page.name == "cli.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("\n", read(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    folders = "runtime|memory|attention|models|cli|tests|docs|examples"
    for code in INLINE.findall(FENCED.sub("\n", read(page))):
        for path in re.findall(rf"(?<![\w./])(?:{folders})/[\w./-]*", code):
            if not re.search(r"\b[A-Z]+\b", path):  # NAME stands for a name of one's own
                assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = read(ROOT / "Makefile")
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"`make (\w[\w-]*)`", read(page)))
        named |= set(re.findall(r"^make (\w[\w-]*)", read(page), re.MULTILINE))
    assert {"chat", "test", "check", "bench", "docs"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_page_has_every_error_and_its_exit_code() -> None:
    page = read(ROOT / "docs/python.md")
    for name in errors.__all__:
        assert f"| `{name}` | {getattr(errors, name).exit_code} |" in page


def test_memory_page_has_every_plan_line() -> None:
    page = read(ROOT / "docs/memory.md")
    first_cells = ", ".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)).split(", ")
    for name, component in vars(plan_line).items():
        if name.isupper() and isinstance(component, str):
            assert component in first_cells


def keys_of(heading: str) -> set[str]:
    """The keys that a section of the JSON page names."""
    page = read(ROOT / "docs/json.md")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert section is not None
    return {"version", "model", "machine", *INLINE.findall(section[1])}


@pytest.mark.real
@pytest.mark.parametrize(
    "arguments",
    [
        'run --json -n 4 -p "Hi." --speculate auto',
        "plan --json",
        'profile --json -n 4 -p "Hi."',
    ],
)
def test_json_page_has_every_key(arguments: str) -> None:
    done = run_lowtide(*shlex.split(arguments))
    found = json.loads(done.stdout)
    known = keys_of(arguments.partition(" ")[0])
    assert found.keys() <= known
    nested = [found.get("stats") or {}, (found.get("stats") or {}).get("speculation") or {}]
    nested += (found.get("rows") or [])[:1] + (found.get("measured") or [])[:1]
    nested += (found.get("phases") or [])[:1] + (found.get("layers") or [])[:1]
    for values in nested:
        assert values.keys() <= known
