"""The docs name files, functions and rooms that exist."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[1]
NAMED = ("docs/architecture.md", "CONTRIBUTING.md")
LINKING = (*NAMED, "README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


def names_in(file: Path) -> set[str]:
    """Functions, classes and variables that a file defines, as `Class.method` and `function.inner`."""
    found = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            else:
                visit(child, prefix)

    visit(ast.parse(file.read_text()), "")
    return found


@pytest.mark.parametrize("page", NAMED)
def test_files_and_functions_exist(page):
    references = re.findall(r"([\w./]+\.py)(?::([\w.]*\w))?", (ROOT / page).read_text())
    assert len(references) > 20
    for path, name in references:
        file = next((base / path for base in (ROOT / "pshare_jax", ROOT) if (base / path).is_file()), None)
        assert file is not None, path
        assert not name or name in names_in(file), f"{path}:{name}"


def test_the_table_of_rooms_is_the_import_contract():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    table = (ROOT / NAMED[0]).read_text().split("| rooms, from the top |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert [re.findall(r"`(\w+)`", row) for row in rows] == [layer.split(" | ") for layer in layers]


@pytest.mark.parametrize("page", sorted(set(LINKING)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
