"""The lines of code in a Python file."""

import ast
import functools

Function = ast.FunctionDef | ast.AsyncFunctionDef


parse = functools.cache(ast.parse)


def lines_of(node):
    return range(node.lineno, node.end_lineno + 1)


@functools.cache
def code_lines(source):
    """The numbers of the lines that hold code: no comment, blank line or string that stands
    alone.
    """
    documentation = set()
    in_strings = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            in_strings.update(lines_of(node))
        if isinstance(node, ast.Module | ast.ClassDef | Function):
            for item in node.body:
                text = item.value if isinstance(item, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    documentation.update(lines_of(item))
    lines = enumerate(map(str.strip, source.split("\n")), 1)
    written = {number for number, line in lines if line and not line.startswith("#")}
    return (written | in_strings) - documentation
