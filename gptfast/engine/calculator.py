"""The calculator that a model may use while it answers: arithmetic, and nothing else.

Values are Python's ints and floats, so that a result reads as the reference's, which uses eval:
"6*4" is "24", "48/2" is "24.0" and "0.1+0.2" is "0.30000000000000004".
"""

import operator
import re
from collections.abc import Container

_LONGEST = 256
_MOST_BRACKETS = 32
# As in Python, an int other than zero has no leading zeros; "012" is two tokens, so no expression.
_TOKEN = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+|0+|[1-9][0-9]*|//|[-+*/()]")
_SUMS = {"+": operator.add, "-": operator.sub}
_PRODUCTS = {"*": operator.mul, "/": operator.truediv, "//": operator.floordiv}
_NO_NUMBER = {*_SUMS, *_PRODUCTS, "(", ")"}


def calculate(expression: str) -> str | None:
    """The value of numbers with + - * / // and ( ), as Python writes it; commas are left out.

    None for everything else: any other character or operator (`**` among them), division by
    zero, more than 256 characters or 32 pairs of brackets. So few characters cannot make a
    number that overflows, or take long.
    """
    text = expression.replace(",", "").replace(" ", "")
    tokens = _TOKEN.findall(expression.replace(",", ""))
    if len(expression) > _LONGEST or "".join(tokens) != text or text.count("(") > _MOST_BRACKETS:
        return None
    try:
        return str(_Parser(tokens).value())
    except (SyntaxError, ZeroDivisionError):
        return None


class _Parser:
    """Recursive descent: a sum of products of factors."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def value(self) -> int | float:
        value = self._sum()
        if self._next < len(self._tokens):
            raise SyntaxError("something follows the expression")
        return value

    def _sum(self) -> int | float:
        value = self._product()
        while sign := self._take(_SUMS):
            value = _SUMS[sign](value, self._product())
        return value

    def _product(self) -> int | float:
        value = self._factor()
        while sign := self._take(_PRODUCTS):
            value = _PRODUCTS[sign](value, self._factor())
        return value

    def _factor(self) -> int | float:
        negative = False
        while sign := self._take(_SUMS):
            negative ^= sign == "-"
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise SyntaxError("a bracket is not closed")
        else:
            value = self._number()
        return -value if negative else value

    def _number(self) -> int | float:
        token = self._peek()
        if not token or token in _NO_NUMBER:
            raise SyntaxError("a number is missing")
        self._next += 1
        return float(token) if "." in token else int(token)

    def _take(self, wanted: Container[str]) -> str:
        """The next token if it is one of these, otherwise an empty string."""
        token = self._peek()
        if not token or token not in wanted:
            return ""
        self._next += 1
        return token

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""
