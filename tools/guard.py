"""A guard around code for Monty, under which no exception has a long text.

What is not caught in a worker crosses to the host whole, be it as long as the worker's memory lets it, and more than
one copy of it is made there. What is caught and raised again loses the lines that it came from.
"""

from __future__ import annotations

import re
import secrets
import tokenize

_GUARD = """
{name} = BaseException, Exception, type
try:
{body}
 pass
except {name}[0] as {name}_error:
 {name}_text = f"{{{name}_error}}"
 if {name}_text[{most}:{most} + 1]:
  raise {name}[1](f"{{{name}[2]({name}_error).__name__}}: {{{name}_text[:{most}]}}")
 raise
"""


def guarded(code: str, most: int) -> str:
    """`code` as a statement of which an exception has no text of more than `most` characters, beside its names.

    Its lines are moved in, but for those that begin within a string. The names that the guard needs are not known to
    the code, which could give another meaning to those that are. Raises `SyntaxError` of code that cannot be read.
    """
    lines = re.split("\r\n|\r|\n", code)
    try:
        tokens = list(tokenize.generate_tokens(iter([line + "\n" for line in lines]).__next__))
    except tokenize.TokenError as error:
        raise SyntaxError(error.args[0]) from error
    inside = {row for token in tokens for row in range(token.start[0], token.end[0])}
    body = "\n".join(line if row in inside else f" {line}" for row, line in enumerate(lines))
    return _GUARD.format(body=body, name=f"_{secrets.token_hex(8)}", most=most)
