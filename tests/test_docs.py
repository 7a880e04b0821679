"""The documentation's commands and code work as written: a page's blocks run in the page's order, in one folder.

`console` blocks hold commands of diffmem (`$ …`) and lines of what they print; a command succeeds unless the next one
is `echo $?`, which shows its exit status. In `python` blocks the comment after a `print(…)` is what it prints. An
ellipsis stands for anything. `sh` blocks need what tests do not have (several GPUs, an installation); their options are
checked.
"""

import importlib
import logging
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
from test_architecture import ALLOWED

import diffmem
from diffmem.cli import cli, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FRAMEWORKS = ("torchmetrics", "lightning", "diffusers", "transformers")  # a page each
NOT_RUN = ("diffmem ", "make ", "pip install ", "ray start ", "torchrun ")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [
        (language, re.sub(f"^{indent}", "", code, flags=re.M))
        for indent, language, code in FENCE.findall(page.read_text())
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


def shown(expected: str, printed: str) -> None:
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("…"))
    assert re.search(pattern, printed), f"{expected!r} is not in what was printed:\n{printed}"


def run_command(line: str, capsys) -> tuple[int, str]:
    words = shlex.split(line, comments=True)
    assert words[0] == "diffmem", f"only commands of diffmem are run: {line}"
    target = words[words.index(">") + 1] if ">" in words else None
    with pytest.raises(SystemExit) as end:
        main(words[1 : words.index(">") if target else None])
    out, err = capsys.readouterr()
    if target is not None:
        Path(target).write_text(out)
    return end.value.code, (out if target is None else "") + err


def run_console(code: str, capsys) -> None:
    status, printed = 0, ""
    for line in code.replace("\\\n", "").splitlines():
        if line == "$ echo $?":
            status, printed = 0, f"{status}\n"
        elif line.startswith("$ "):
            assert status == 0, printed
            status, printed = run_command(line[2:], capsys)
        elif line.strip():
            shown(line, printed)
    assert status == 0, printed


def run_python(code: str, where: str, names: dict, capsys) -> None:
    exec(compile(code, where, "exec"), names)
    printed = capsys.readouterr().out
    assert not re.search(r"^\)  # ", code, re.MULTILINE), "a print is too long for its comment to stay beside it"
    for comment in re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE):
        shown(comment, printed)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if {"console", "python"} & set(dict(blocks(page)))], ids=name_of
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*`:UserWarning")
def test_page(page, tmp_path, monkeypatch, capsys, one_thread):
    if page.parent.name == "frameworks" and page.stem in FRAMEWORKS:
        pytest.importorskip(page.stem, reason=f"the extra {page.stem} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    try:
        for language, code in blocks(page):
            if language == "console":
                run_console(code, capsys)
            elif language == "python":
                run_python(code, name_of(page), names, capsys)
    finally:
        logging.getLogger("diffmem").setLevel(logging.NOTSET)


def test_commands_that_are_not_run_have_options_that_exist():
    for page in PAGES:
        for code in [code for language, code in blocks(page) if language == "sh"]:
            for line in code.replace("\\\n", "").splitlines():
                assert line.startswith(NOT_RUN), f"{name_of(page)}: {line}"
                words = shlex.split(line, comments=True)
                if "diffmem" in words:
                    command = cli.commands[words[words.index("diffmem") + 1]]
                    given = {word for word in words[words.index("diffmem") :] if word.startswith("--")}
                    assert given <= options_of(command), f"{name_of(page)}: {line}"


def options_of(command: click.Command) -> set[str]:
    mine = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return mine.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_options_and_names_in_the_text_exist():
    options = options_of(cli) | {"--help", "--version", "--nproc-per-node", "--exhaustive"}
    wrong = []
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = FENCE.sub("", page.read_text())
        for code in INLINE.findall(text):
            wrong += [
                f"{page.name}: {word}" for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", code) if word not in options
            ]
            for name in re.findall(r"^diffmem(?:\.\w+)+", code):
                if not re.search(r"\.(py|html|json)$", name) and not exists(name):
                    wrong.append(f"{page.name}: {name}")
    assert not wrong, "\n".join(wrong)


def exists(name: str) -> bool:
    value, parts = diffmem, name.split(".")[1:]
    for place, part in enumerate(parts, 1):
        if not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(["diffmem", *parts[:place]]))
            except ImportError:
                return False
        else:
            value = getattr(value, part)
    return True


def test_the_picture_of_the_house_is_the_house():
    """CONTRIBUTING draws the import directions that the architecture test enforces, and names files that exist."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = next(code for _, language, code in FENCE.findall(text) if language == "text")
    cells = [re.split(r"  +", line.strip()) for line in picture.split("---")[0].splitlines()]
    drawn = {cell[0]: set(cell[-1].split()) for cell in cells}
    assert drawn.pop("cli") == {"everything", "below"}
    drawn |= {"ops": set(), "data": set()}  # what stands beside them are no rooms
    assert drawn == {room: allowed for room, allowed in ALLOWED.items() if room != "cli"}
    paths = re.findall(r"`((?:diffmem|csrc|tests|benchmarks|\.github)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(paths) > 20


def test_every_public_room_has_a_page_of_reference():
    """Every subpackage with public names is shown, but for those that are not for callers."""
    rooms = {path.parent.name for path in (ROOT / "diffmem").glob("*/__init__.py") if "__all__ = [" in path.read_text()}
    assert {page.stem for page in (DOCS / "reference").glob("*.md")} - {"index"} == rooms - {"demo", "cli"}


def test_the_table_of_disguises_is_what_the_rule_says():
    """The column of digits, made again; of JPEG the numbers may differ by what its decoders differ."""
    page = (DOCS / "what-the-rule-sees.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 5]
    printed = [(name, float(cell.rstrip("%"))) for name, _, _, cell in rows[2:] if cell]
    made = runpy.run_path(str(DOCS / "disguises.py"))["digit_shares"]()
    computed = [(name, 100 * share) for name, points in made.items() for _, share in points]
    assert [name for name, _ in printed] == [name for name, _ in computed]
    for (name, shown_share), (_, share) in zip(printed, computed, strict=True):
        assert abs(shown_share - share) <= (3 if name == "JPEG" else 0.05001), name


def test_every_picture_is_small_and_shown():
    used = {name for page in PAGES for name in re.findall(r"images/([\w.-]+)", page.read_text())}
    pictures = {path.name: path.stat().st_size for path in (DOCS / "images").iterdir()}
    assert used == set(pictures)
    assert max(pictures.values()) < 300_000
