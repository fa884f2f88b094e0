"""The lines of code in a Python file."""

import ast
import functools
import io
import tokenize

LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


parse = functools.cache(ast.parse)


@functools.cache
def code_lines(source):
    """The numbers of the lines that hold code: no comment, blank line or string that stands alone."""
    documentation = set()
    for node in ast.walk(parse(source)):
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
