"""A guard around code for Monty, under which no exception has a long text.

What is not caught in a worker crosses to the host whole, be it as long as the worker's memory lets it, and more than
one copy of it is made there. What is caught and raised again loses the lines that it came from.
"""

from __future__ import annotations

import re
import secrets
import tokenize
from collections.abc import Sequence

_NAMES = "{name} = BaseException, Exception, type"
_GUARD = """
try:
{body}
 pass
except {name}[0] as {name}_error:
 {name}_text = f"{{{name}_error}}"
 if {name}_text[{most}:{most} + 1]:
  raise {name}[1](f"{{{name}[2]({name}_error).__name__}}: {{{name}_text[:{most}]}}")
 raise
"""


def guarded(feeds: Sequence[str], most: int) -> list[str]:
    """`feeds`, one after another, as statements of which no exception has a text of more than `most` characters.

    The names that the guard needs are taken before the first, and under one that code cannot know: it could give
    another meaning to those that it knows. Raises `SyntaxError` of code that cannot be read.
    """
    name = f"_{secrets.token_hex(8)}"
    statements = [_GUARD.format(body=_moved_in(feed), name=name, most=most) for feed in feeds]
    return [_NAMES.format(name=name) + statements[0], *statements[1:]]


def _moved_in(code: str) -> str:
    """`code` one level further in, but for lines that begin within a string."""
    lines = re.split("\r\n|\r|\n", code)
    try:
        tokens = list(tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__))
    except tokenize.TokenError as error:
        raise SyntaxError(error.args[0]) from error
    inside = {row for token in tokens for row in range(token.start[0], token.end[0])}
    return "\n".join(line if row in inside else f" {line}" for row, line in enumerate(lines))
