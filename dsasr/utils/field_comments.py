"""The comment beside each field of a dataclass, read from its source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize


def field_comments(cls: type) -> dict[str, str]:
    """Field name → its comment, on one line; "" for a field without one.

    That is the comment at the end of the field's line, else the comment lines right above it, else
    a string literal below it.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0].body
    by_name = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, first = [], node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                above.insert(0, comments[first])
                first -= 1
            text = comments.get(node.end_lineno) or " ".join(above) or _literal(after)
            by_name[node.target.id] = text
    return {f.name: by_name.get(f.name, "") for f in dataclasses.fields(cls)}


def _literal(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""
