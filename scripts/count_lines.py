"""Lines of code by room, after `ruff format`, without blank lines, comments and docstrings; and the longest functions.

python scripts/count_lines.py [ROOM ...]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffusion_kit"
CORE = ["sampling", "adapters", "pipelines", "models"]
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def functions(file: Path) -> list[tuple[int, str]]:
    """Length in lines of code and name of every function of a file."""
    source = file.read_text()
    code = code_lines(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            found.append((size, f"{file.relative_to(PACKAGE)}:{node.name}"))
    return found


def main(rooms: list[str]) -> dict[str, int]:
    """Prints a table and returns lines of code by room."""
    totals, longest = {}, []
    for room in rooms:
        files = sorted((PACKAGE / room).rglob("*.py"))
        totals[room] = sum(len(code_lines(file.read_text())) for file in files)
        longest += [size for file in files for size in functions(file)]
        print(f"{room:12s} {totals[room]:6d}  in {len(files)} files")
    print(f"{'together':12s} {sum(totals.values()):6d}")
    for size, name in sorted(longest, reverse=True)[:5]:
        print(f"{size:6d}  {name}")
    return totals


if __name__ == "__main__":
    main(sys.argv[1:] or CORE)
