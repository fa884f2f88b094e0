"""How dense the code may be: nodes of the syntax tree in a line of code, lines in a function."""

import ast
import functools
from pathlib import Path

import pytest
from source import code_lines, parse

ROOT = Path(__file__).resolve().parent.parent
NODES_A_LINE = {"rlhf_jax": 10.0, "experiments": 10.0, "tests": 10.0, "benchmarks": 10.0}
NODES_A_LINE_OF_A_FILE = 11.0
PACKAGE_ENTRIES = 25
FUNCTION_LIMIT = 60
FUNCTION_NODES = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder):
    """{path: text} of the Python files below a folder."""
    return {path: path.read_text("utf-8") for path in sorted((ROOT / folder).rglob("*.py"))}


@functools.cache
def num_nodes(source):
    """The nodes of a file's syntax tree."""
    return sum(1 for _ in ast.walk(parse(source)))


def num_packed(source):
    """The values that one assignment puts into several names, beyond the first: ``a, b = x, y`` is
    1.
    """
    packed = 0
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            in_names = isinstance(node.targets[0], ast.Tuple)
            packed += len(node.value.elts) - 1 if in_names else 0
    return packed


def functions(node, name):
    """Pairs (qualified name, function) of all functions below ``node``, nested ones included."""
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, ast.ClassDef | Function) else name
        if isinstance(child, Function):
            yield inner, child
        yield from functions(child, inner)


@pytest.mark.parametrize("folder", NODES_A_LINE)
def test_density(folder):
    texts = sources(folder).values()
    nodes = sum(num_nodes(text) for text in texts)
    lines = sum(len(code_lines(text)) for text in texts)
    assert nodes / lines <= NODES_A_LINE[folder]
    assert sum(num_packed(text) for text in texts) == 0


def test_no_file_is_dense():
    dense = {}
    for path, text in sources("rlhf_jax").items():
        density = round(num_nodes(text) / max(len(code_lines(text)), 1), 1)
        if density > NODES_A_LINE_OF_A_FILE and num_nodes(text) > 100:
            dense[str(path.relative_to(ROOT))] = density
    assert dense == {}


def test_entries_at_the_packages_root():
    entries = [path.name for path in (ROOT / "rlhf_jax").iterdir()]
    assert (
        len([name for name in entries if name not in ("__pycache__", "py.typed")])
        <= PACKAGE_ENTRIES
    )


def test_no_function_is_long():
    too_long = {}
    for path, source in sources("rlhf_jax").items():
        code = code_lines(source)
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, function in functions(parse(source), module):
            length = len(code & set(range(function.lineno, function.end_lineno + 1)))
            if length > FUNCTION_LIMIT:
                too_long[name] = length
    assert too_long == {}


def test_no_function_of_the_tests_is_large():
    too_large = {}
    for path, source in sources("tests").items():
        for name, function in functions(parse(source), path.stem):
            size = sum(1 for _ in ast.walk(function))
            if size > FUNCTION_NODES:
                too_large[name] = size
    assert too_large == {}
