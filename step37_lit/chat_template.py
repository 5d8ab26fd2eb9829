"""Chat templates (Jinja): written by others, so they run in a sandbox and on a budget.

Jinja's sandbox keeps a template from the interpreter, not from endless loops or gigabytes of text. Here every turn of a
loop and every call takes a step of a budget, what operators, `join` and `replace` give is bounded, what pads text to a
width is not there, and nothing is computed when a template is only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from step37_lit.errors import ConfigError

LONGEST_TEMPLATE = 1_000_000  # characters
STEPS = 1_000_000  # of a rendering
LONGEST_TEXT = 50_000_000  # characters, of a rendering or of what `*` gives
LARGEST_NUMBER = 10**18
PADDING_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "format", "format_map", "expandtabs"})
PADDING_FILTERS = ("center", "format", "indent", "wordwrap")
COUNTED, BOUNDED = "_counted", "_bounded"


class ChatTemplate:
    """A template.

    Args:
        text: Its source.
        file: Where it is from, for messages.

    Raises:
        ConfigError: it does not parse, or is longer than any chat template.
    """

    def __init__(self, text: str, file: str | Path | None = None):
        self.file = file
        if len(text) > LONGEST_TEMPLATE:
            raise ConfigError("chat_template", f"at most {LONGEST_TEMPLATE} characters", len(text), file)
        try:
            self._template = _Environment().from_string(text)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError("chat_template", "a Jinja template", _line(error), file) from error

    def render(self, **values: Any) -> str:
        """The text of a conversation.

        Raises:
            ConfigError: the template refuses the values, fails, or does not come to an end within its budget.
        """
        environment: Any = self._template.environment
        environment.begin()
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(**values):
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise jinja2.TemplateRuntimeError(f"more than {LONGEST_TEXT} characters")
                pieces.append(piece)
        except RecursionError as error:
            raise ConfigError("chat_template", "messages that it accepts", "endless recursion", self.file) from error
        except Exception as error:  # whatever a template's expressions raise
            raise ConfigError("chat_template", "messages that it accepts", _line(error), self.file) from error
        return "".join(pieces)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget; of one template, since it counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Not optimized: constant expressions would be computed while the template is read.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0)
        self.globals["raise_exception"] = _raise_exception
        for name in ("lipsum", "cycler"):
            self.globals.pop(name)
        for name in PADDING_FILTERS:
            self.filters.pop(name)
        self.filters |= {"replace": _replace, "join": _join, COUNTED: self._counted, BOUNDED: _bounded}
        self.steps = 0

    def begin(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise jinja2.TemplateRuntimeError(f"more than {STEPS} steps")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, COUNTED)
        for block in list(template.find_all(nodes.AssignBlock)):
            block.filter = _filtered(block.filter, BOUNDED)
        _bound_concatenations(template)
        return template

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.step()
        text = getattr(function, "__self__", None)  # of a method
        if isinstance(text, str) and args:
            if function.__name__ == "join":
                return _join(args[0], text)
            if function.__name__ == "replace":
                _check_replaced(text, *args[:2])
        return super().call(context, function, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            raise jinja2.TemplateRuntimeError("text % values is not supported in chat templates")
        if operator == "**" and not (_small(left) and _small(right) and abs(right) <= 64):
            raise jinja2.TemplateRuntimeError("a power too large for a chat template")
        if operator == "*":
            sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
            _check_length(sizes[0] * sizes[1] if not (_small(left) and _small(right)) else 0)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _filtered(value: Any, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=1 if value is None else value.lineno)


def _bound_concatenations(node: nodes.Node) -> None:
    """Puts the filter `_bounded` around every `a ~ b`, the inner ones first."""
    for child in list(node.iter_child_nodes()):
        _bound_concatenations(child)
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Concat):
            setattr(node, name, _filtered(value, BOUNDED))
        elif isinstance(value, list):
            value[:] = [_filtered(each, BOUNDED) if isinstance(each, nodes.Concat) else each for each in value]


def _check_length(length: float) -> None:
    if length > LONGEST_TEXT:
        raise jinja2.TemplateRuntimeError(f"more than {LONGEST_TEXT} characters or entries")


def _bounded(text: Any) -> Any:
    _check_length(len(text))
    return text


def _small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER


def _join(values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
    """The filter and the method `join`, bounded."""
    if attribute is not None:
        raise jinja2.TemplateRuntimeError("join by attribute is not supported in chat templates")
    texts = [str(value) for value in values]
    _check_length(sum(map(len, texts)) + len(texts) * len(separator))
    return separator.join(texts)


def _check_replaced(text: str, old: str, new: str) -> None:
    _check_length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _replace(text: Any, old: Any, new: Any) -> str:
    """The filter `replace`, bounded."""
    text, old, new = str(text), str(old), str(new)
    _check_replaced(text, old, new)
    return text.replace(old, new)


def _raise_exception(message: str) -> None:
    """What chat templates call to refuse messages."""
    raise jinja2.TemplateError(message)
