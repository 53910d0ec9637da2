"""README and docs: their code runs and prints what they say, links lead somewhere, and what is named is there."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import itm_kernels
from itm_kernels import info

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]

FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--((?:(?!-->).)*)-->\s*\Z", re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# A path of the project in a code span; `<op>`, `{split}` and `*` stand for many.
CODE_PATH = re.compile(r"`((?:itm_kernels|csrc|python|benchmarks|tests|docs)/[\w./-]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the HTML comment directly above it."""

    language: str
    body: str
    comment: str
    line: int


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        above = COMMENT.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], match["body"], above[1].strip() if above else "", line))
    return found


def programs(text: str) -> Iterator[tuple[Block, str | None]]:
    """The Python blocks that run, each with what it must print where a `<!-- prints -->` block follows."""
    found = blocks(text)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language == "python" and not block.comment.startswith("not run:"):
            expects = following is not None and following.comment == "prints"
            yield block, following.body if expects and following is not None else None


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    titles = (re.sub(r"[`*]", "", title).strip().lower() for title in HEADING.findall(without_code(text)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page are one program, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block, expected in programs(page.read_text("utf-8")):
        printed = io.StringIO()
        # The line numbers of a traceback are those of the page.
        code = compile("\n" * block.line + block.body, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if expected is not None:
            assert printed.getvalue() == expected, f"{name_of(page)} line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue  # elsewhere: not this test's business
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        assert target.is_file(), f"{name_of(page)}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{name_of(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    for path in CODE_PATH.findall(page.read_text("utf-8")):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


def test_every_public_name_is_in_the_api() -> None:
    text = (DOCS / "api.md").read_text("utf-8")
    missing = [name for name in itm_kernels.__all__ if not re.search(rf"itm_kernels\.{name}\b", text)]
    assert not missing, f"docs/api.md lacks {', '.join(missing)}"


@pytest.mark.parametrize("op", [*info.ops(), "triplet_loss", "contrastive_loss"])
def test_every_op_has_a_page(op: str) -> None:
    page = DOCS / "ops" / f"{op}.md"
    assert page.is_file(), f"write {name_of(page)}"
    text = page.read_text("utf-8")
    assert f".. autofunction:: itm_kernels.{op}" in text
    for heading in ("equation", "options", "backward", "edge-cases"):
        assert heading in anchors(text), f"{name_of(page)} has no heading {heading!r}"
    assert f"({op}.md)" in (DOCS / "ops" / "index.md").read_text("utf-8")


def test_no_name_of_an_option_is_left_out() -> None:
    text = (DOCS / "ops" / "cross_attention_scores.md").read_text("utf-8")
    from itm_kernels.ops import options

    for names in (options.DIRECTIONS, options.RAW_FEATURE_NORMS, options.AGG_FUNCS, options.FOCALS[1:]):
        for name in names:
            assert f'"{name}"' in text, name


def test_blocks_and_their_comments_are_found() -> None:
    text = textwrap.dedent(
        """\
        ```python
        print(1)
        ```

        <!-- prints -->

        ```text
        1
        ```

        <!-- not run: needs a GPU -->
        ```python
        raise SystemExit
        ```

        ```bash
        make
        ```
        """
    )
    assert [(block.language, block.comment) for block in blocks(text)] == [
        ("python", ""),
        ("text", "prints"),
        ("python", "not run: needs a GPU"),
        ("bash", ""),
    ]
    assert [(block.body, block.line, expected) for block, expected in programs(text)] == [("print(1)\n", 1, "1\n")]


def test_anchors_are_those_of_headings() -> None:
    assert anchors("# Blocks and `workspace_bytes`\n```bash\n# a comment\n```\n## Add an op, now") == {
        "blocks-and-workspace_bytes",
        "add-an-op-now",
    }
