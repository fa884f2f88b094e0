"""The ratchet: the code may shrink. Who makes it smaller lowers the limits here in the same commit."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"rlhf_jax": 9999, "experiments": 1439, "tests": 16060, "benchmarks": 1105}
PACKAGE_ENTRIES = 22
FUNCTION_LIMIT = 60

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source):
    """The numbers of the lines that hold code: no comment, no blank line, no string that stands alone."""
    documentation = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            for item in node.body:
                text = item.value if isinstance(item, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    documentation |= set(range(item.lineno, item.end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - documentation


def functions(node, name):
    """Pairs (qualified name, function) of all functions below ``node``, those within functions included."""
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.ClassDef | Function) else name
        if isinstance(child, Function):
            yield inner, child
        yield from functions(child, inner)


@pytest.mark.parametrize("folder", LIMITS)
def test_code_lines(folder):
    total = sum(len(code_lines(path.read_text("utf-8"))) for path in (ROOT / folder).rglob("*.py"))
    assert total <= LIMITS[folder]


def test_entries_at_the_packages_root():
    entries = [path.name for path in (ROOT / "rlhf_jax").iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= PACKAGE_ENTRIES


def test_no_function_is_long():
    too_long = {}
    for path in sorted((ROOT / "rlhf_jax").rglob("*.py")):
        source = path.read_text("utf-8")
        code = code_lines(source)
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, function in functions(ast.parse(source), module):
            length = len(code & set(range(function.lineno, function.end_lineno + 1)))
            if length > FUNCTION_LIMIT:
                too_long[name] = length
    assert too_long == {}
