"""README.md and the pages of docs/: their text, their blocks, and the commands in these."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>[\w-]*)[^\n`]*\n(?P<text>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
_NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*\Z")
_SHELLS = ("sh", "bash", "shell")
_STARTS = ("python ", "python3 ", "pip ", "make ", "git ", "neuroal-")  # of an unnamed block that is a command


class Block(NamedTuple):
    """A fenced block: where it stands, its language, what it needs that a test does not have, and its text."""

    page: str
    line: int
    language: str
    needs: str | None
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in _FENCE.finditer(text):
        needs = _NEEDS.search(text[: match.start()])
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name(page), line, match["language"], needs and needs[1], body))
    return found


def prose(text: str) -> str:
    """A page's text without its fenced blocks and its comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.S)


def command_lines(block: Block) -> list[str]:
    """The lines of shell of a block, those that go on joined; empty where it holds none."""
    lines = block.text.replace("\\\n", "\\\0").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif block.language not in _SHELLS and not (block.language == "" and block.text.startswith(_STARTS)):
        return []
    return [line.replace("\\\0", " ") for line in lines if line.strip() and not line.lstrip().startswith("#")]


def simple_commands(line: str) -> list[list[str]]:
    """The commands of a line of shell, each as its words, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if set(word) <= set("|&;"):
            commands.append([])
        elif set(word) <= set("<>"):
            next(words)
        else:
            commands[-1].append(word)
    return [_without_prefixes(words) for words in commands if words]


def _without_prefixes(words: list[str]) -> list[str]:
    """A command without values of the environment and what starts it."""
    while words and (words[0] in ("srun", "time") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words = words[1:]
    return words
