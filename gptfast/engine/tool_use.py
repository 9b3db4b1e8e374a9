"""The calculator as the model sees it: python_start, expression, python_end; then, not sampled but
forced, output_start, result, output_end."""

from collections.abc import Callable

from gptfast.tokenizer import Tokenizer

Tool = Callable[[str], str | None]


class ToolUse:
    """Follows the sampled tokens of one sequence, and answers them with the tool's.

    tool: from the expression's text to the result's, or None where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, tool: Tool) -> None:
        self._tokenizer, self._tool = tokenizer, tool
        self._start, self._end, self._output_start, self._output_end = (
            tokenizer.special_id(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end")
        )
        # The tokens since python_start; None outside.
        self._expression: list[int] | None = None

    def after(self, token: int) -> list[int]:
        """What must follow a sampled token: the tool's answer, or nothing."""
        if token == self._start:
            self._expression = []
        elif self._expression is not None and token != self._end:
            self._expression.append(token)
        elif self._expression is not None:
            expression, self._expression = self._expression, None
            result = self._tool(self._tokenizer.decode(expression))
            if result is not None:
                return [self._output_start, *self._tokenizer.encode(result), self._output_end]
        return []
