"""CloudEvents SQL 1.0: filters such as ``type = 'com.shop.order.placed' AND priority > 3``.

The rules are those of https://github.com/cloudevents/spec, folder cesql, version 1.0.0; "spec 3.4" in this file is a
section of its spec.md, "the TCK" its conformance cases. An expression is parsed once into Python closures and then
evaluated for every event. Three things that surprise people who know SQL:

- AND, OR and XOR bind equally and go left to right (spec 3.6): ``a OR b AND c`` is ``(a OR b) AND c``.
- NOT and ``-`` bind tightest: write ``NOT (a = b)``; ``NOT a = b`` is ``(NOT a) = b``.
- An attribute that is absent is an error, hence no match: write ``EXISTS a AND a = 'x' OR ...`` to go on without it.

Where the spec leaves a choice: the first error ends the evaluation (fail-fast, spec 4.1) and the result is the zero
value of the outermost operator, unless the outermost function names a value of its own; arithmetic that leaves 32 bits
is a math error; IN stops at the first element that is equal; names of attributes may be written in upper case.
"""

from __future__ import annotations

import base64
import operator
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, NamedTuple

Value = str | int | bool
"""What an expression evaluates to: a CESQL String, Integer or Boolean."""

ErrorKind = Literal["cast", "functionEvaluation", "generic", "math", "missingAttribute", "missingFunction"]
"""The evaluation errors of spec 3.3, under the names that the TCK gives them."""

MAX_DEPTH = 64
"""How deep an expression may nest; AND, OR and XOR chain without limit."""

_Run = Callable[[Mapping[str, object]], Any]

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_ZERO: dict[type | None, Value] = {str: "", int: 0, bool: False, None: False}
_REQUIRED = frozenset({"id", "source", "specversion", "type"})
# The characters with the Unicode property White_Space; str.strip() alone also takes the control characters 1C to 1F.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class CesqlSyntaxError(ValueError):
    """The text is no CESQL expression; the message shows where and what was expected.

    ``expression`` is the text, ``position`` the index of the offending character (its length at the end).
    """

    def __init__(self, expression: str, position: int, problem: str) -> None:
        start = max(0, position - 60)
        window = expression[start : position + 60]
        shown = "".join(char if char.isprintable() else " " for char in window)
        super().__init__(f"invalid CloudEvents SQL: {problem}\n  {shown}\n  {' ' * (position - start)}^")
        self.expression = expression
        self.position = position


class EvaluationError(Exception):
    """Why an expression has no proper value for an event; ``kind`` is one of ``ErrorKind`` (spec 3.3)."""

    def __init__(self, kind: ErrorKind, text: str, value: Value | None = None, origin: _Run | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        # What the function that failed (the origin) returns beside the error, when the spec asks for a certain value.
        self._value = value
        self._origin = origin


class Result(NamedTuple):
    """What ``Expression.evaluate`` returns: always a value, and the error that went with it, if any."""

    value: Value
    error: EvaluationError | None


class Expression:
    """A parsed expression; make one with ``parse``. It is immutable and safe to use from any thread.

    ``source`` is its text. ``missing_functions`` names the calls that no function answers (``"FOO/2"``): each of them
    is an error for every event that reaches it, so a program may want to refuse such a filter.
    """

    __slots__ = ("_run", "_type", "missing_functions", "source")

    def __init__(self, source: str, node: _Node, missing_functions: tuple[str, ...]) -> None:
        self.source = source
        self.missing_functions = missing_functions
        self._run = node.run
        self._type = node.gives

    def evaluate(self, attributes: Mapping[str, object]) -> Result:
        """The value for an event, given its context attributes and extensions by name (lower case), and the error.

        A value that is neither str, bool nor a 32-bit int is seen as its String (spec 3.2): bytes as Base64, a datetime
        as RFC 3339, anything else by ``str``. None is an absent attribute.
        """
        try:
            return Result(self._run(attributes), None)
        except EvaluationError as error:
            own = error._value if error._origin is self._run else None
            return Result(_ZERO[self._type] if own is None else own, error.with_traceback(None))

    def matches(self, attributes: Mapping[str, object]) -> bool:
        """Whether an event passes: the value is the Boolean true and there was no error (spec 1.2)."""
        try:
            return self._run(attributes) is True
        except EvaluationError:
            return False

    def __repr__(self) -> str:
        return f"parse({self.source!r})"


def parse(expression: str) -> Expression:
    """The expression, ready to evaluate.

    Raises:
        CesqlSyntaxError: it is not well-formed, or nests deeper than ``MAX_DEPTH``.
    """
    return _Parser(expression).parse()


# ---- values: attributes and casts (spec 3.2, 3.7) -------------------------------------------------------------------

_INTEGER = re.compile(r"([+-]?)0*([0-9]{1,10})")


def _integer(text: str) -> int | None:
    """The 32-bit Integer that ``text`` spells, or None; stricter than int(), which takes '1_0', ' 1' and '\u0661'."""
    found = _INTEGER.fullmatch(text)
    number = int(found[1] + found[2]) if found else None
    return number if number is not None and _LOWEST <= number <= _HIGHEST else None


def _to_str(value: Value) -> str:
    if type(value) is str:
        return value
    return str(value) if type(value) is int else "true" if value else "false"


def _to_int(value: Value) -> int:
    if type(value) is int:
        return value
    number = _integer(value) if isinstance(value, str) else int(value)
    if number is None:
        raise EvaluationError("cast", f"{value!r} is no 32-bit Integer")
    return number


def _to_bool(value: Value) -> bool:
    if type(value) is bool:
        return value
    if isinstance(value, int):
        return value != 0
    lower = value.lower()
    if lower not in ("true", "false"):
        raise EvaluationError("cast", f"{value!r} is no Boolean")
    return lower == "true"


_CAST: dict[type, Callable[[Value], Value]] = {str: _to_str, int: _to_int, bool: _to_bool}


def _can(cast: Callable[[Value], Value], value: Value) -> bool:
    try:
        cast(value)
    except EvaluationError:
        return False
    return True


def _primitive(name: str, value: object) -> Value:
    """An attribute as one of the three types of CESQL."""
    if value is None:
        raise EvaluationError("missingAttribute", f"the event has no attribute {name!r}")
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and _LOWEST <= value <= _HIGHEST:
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)  # of a member of a str Enum: its text, not its name
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    try:
        if isinstance(value, datetime):
            return re.sub(r"\+00:00\Z", "Z", value.isoformat())
        return str(value)
    except Exception as error:  # a foreign __str__ may raise anything, and evaluating is total
        raise EvaluationError("generic", f"attribute {name!r} cannot be read as a String: {error}") from None


# ---- functions (spec 3.5; the casting functions are in the TCK, spec 3.7 has their semantics) -----------------------


class _Function(NamedTuple):
    takes: tuple[type | None, ...]
    gives: type
    call: Callable[..., Value]
    variadic: bool = False  # the last parameter may be given any number of times, or not at all

    def accepts(self, count: int) -> bool:
        return count >= len(self.takes) - 1 if self.variadic else count == len(self.takes)


def _part(text: str, count: int, part: slice) -> str:
    if count < 0:
        raise EvaluationError("functionEvaluation", f"{count} characters of a string", text)
    return text[part]


def _substring(text: str, position: int, length: int = _HIGHEST) -> str:
    if length < 0 or abs(position) > len(text):
        what = f"{length} characters" if length < 0 else f"position {position}"
        raise EvaluationError("functionEvaluation", f"{what} in a string of {len(text)}", "")
    start = position - 1 if position > 0 else len(text) + position
    return text[start : start + length] if position else ""


def _abs(number: int) -> int:
    if number == _LOWEST:
        raise EvaluationError("math", f"ABS({number}) is outside the 32 bits of an Integer", _HIGHEST)
    return abs(number)


_FUNCTIONS: dict[str, tuple[_Function, ...]] = {
    "ABS": (_Function((int,), int, _abs),),
    "BOOL": (_Function((None,), bool, _to_bool),),
    "CONCAT": (_Function((str,), str, lambda *parts: "".join(parts), variadic=True),),
    "CONCAT_WS": (_Function((str, str), str, lambda delimiter, *parts: delimiter.join(parts), variadic=True),),
    "INT": (_Function((None,), int, _to_int),),
    "IS_BOOL": (_Function((None,), bool, lambda value: _can(_to_bool, value)),),
    "IS_INT": (_Function((None,), bool, lambda value: _can(_to_int, value)),),
    "LEFT": (_Function((str, int), str, lambda text, count: _part(text, count, slice(count))),),
    "LENGTH": (_Function((str,), int, len),),
    "LOWER": (_Function((str,), str, str.lower),),
    "RIGHT": (_Function((str, int), str, lambda x, count: _part(x, count, slice(max(0, len(x) - count), None))),),
    "STRING": (_Function((None,), str, _to_str),),
    "SUBSTRING": (_Function((str, int), str, _substring), _Function((str, int, int), str, _substring)),
    "TRIM": (_Function((str,), str, lambda text: text.strip(_WHITESPACE)),),
    "UPPER": (_Function((str,), str, str.upper),),
}


# ---- operators, compiled to closures (spec 3.4) ---------------------------------------------------------------------


class _Node(NamedTuple):
    """A compiled subexpression: its type where that is known, its height as a tree, its value if it is a literal."""

    run: _Run
    gives: type | None
    depth: int = 1
    literal: Value | None = None

    def cast(self, target: type | None) -> _Run:
        """Evaluates to ``target``, without a cast where none is needed."""
        if target is None or target is self.gives:
            return self.run
        run, cast = self.run, _CAST[target]
        return lambda event: cast(run(event))


def _above(*nodes: _Node) -> int:
    return max((node.depth for node in nodes), default=0) + 1


def _literal(value: Value) -> _Node:
    return _Node(lambda _: value, type(value), literal=value)


def _attribute(name: str) -> _Node:
    def run(event: Mapping[str, object]) -> Value:
        value = event.get(name)
        return value if type(value) is str else _primitive(name, value)

    return _Node(run, None)


def _exists(name: str) -> _Node:
    if name in _REQUIRED:  # a valid event has them, whatever the mapping holds (spec 3.4.4)
        return _Node(lambda _: True, bool)
    return _Node(lambda event: event.get(name) is not None, bool)


def _failing(kind: ErrorKind, text: str, value: bool) -> _Node:
    def run(_: Mapping[str, object]) -> Value:
        raise EvaluationError(kind, text, value, run)

    return _Node(run, bool)


def _not(operand: _Node) -> _Node:
    if type(operand.literal) is int:
        # The TCK asks for this error and value; by spec 3.7 the literal would be cast, as every other Integer is.
        return _failing("cast", f"NOT takes a Boolean, not the Integer {operand.literal}", True)
    run = operand.cast(bool)
    return _Node(lambda event: not run(event), bool, operand.depth + 1)


def _negate(operand: _Node) -> _Node:
    run = operand.cast(int)
    return _Node(lambda event: _bounded(-run(event)), int, operand.depth + 1)


def _call(function: _Function, arguments: list[_Node]) -> _Node:
    last = len(function.takes) - 1
    runs = [argument.cast(function.takes[min(index, last)]) for index, argument in enumerate(arguments)]
    call = function.call

    def run(event: Mapping[str, object]) -> Value:
        values = [argument(event) for argument in runs]
        try:
            return call(*values)
        except EvaluationError as error:
            error._origin = run
            raise

    return _Node(run, function.gives, _above(*arguments))


def _logic(first: _Node, rest: list[tuple[str, _Node]]) -> _Node:
    """A chain of AND, OR and XOR, left to right: AND needs its right side only after true, OR only after false."""
    start = first.cast(bool)
    steps = [({"AND": True, "OR": False, "XOR": None}[word], node.cast(bool)) for word, node in rest]

    def run(event: Mapping[str, object]) -> bool:
        value: bool = start(event)
        for needs, right in steps:
            if value is needs:
                value = right(event)
            elif needs is None:
                value = value is not right(event)
        return value

    return _Node(run, bool, _above(first, *(node for _, node in rest)))


def _binary(symbol: str, left: _Node, right: _Node) -> _Node:
    depth = _above(left, right)
    if symbol in _NUMERIC:
        compute, gives = _NUMERIC[symbol]
        x, y = left.cast(int), right.cast(int)
        return _Node(lambda event: compute(x(event), y(event)), gives, depth)
    # Equality exists for each of the types; that of the right side chooses (spec 3.7).
    compare, x, y = operator.eq if symbol == "=" else operator.ne, left.cast(right.gives), right.run
    if right.gives is not None:
        return _Node(lambda event: compare(x(event), y(event)), bool, depth)

    def run(event: Mapping[str, object]) -> bool:
        a, b = x(event), y(event)
        equal: bool = compare(_CAST[type(b)](a), b)
        return equal

    return _Node(run, bool, depth)


def _bounded(number: int) -> int:
    if not _LOWEST <= number <= _HIGHEST:
        raise EvaluationError("math", f"{number} is outside the 32 bits of an Integer")
    return number


def _quotient(x: int, y: int) -> int:
    """Rounded towards 0, where Python's own goes down."""
    if y == 0:
        raise EvaluationError("math", f"{x} is divided by 0")
    return abs(x) // abs(y) * (1 if (x < 0) is (y < 0) else -1)


_NUMERIC: dict[str, tuple[Callable[[int, int], Value], type]] = {
    "<": (operator.lt, bool),
    "<=": (operator.le, bool),
    ">": (operator.gt, bool),
    ">=": (operator.ge, bool),
    "+": (lambda x, y: _bounded(x + y), int),
    "-": (lambda x, y: _bounded(x - y), int),
    "*": (lambda x, y: _bounded(x * y), int),
    "/": (lambda x, y: _bounded(_quotient(x, y)), int),
    "%": (lambda x, y: x - y * _quotient(x, y), int),  # so it has the sign of x
}


def _like(left: _Node, pattern: str, negated: bool) -> _Node:
    """``%`` is any characters, ``_`` is one; a backslash before them takes their meaning, elsewhere it is itself.

    What stands between two ``%`` is matched at its first place for good (an atomic group): later places cannot do
    better, and trying them costs time that grows with the number of ``%`` as exponent.
    """
    parts = [""]
    for piece in re.findall(r"\\[%_]|.", pattern, re.DOTALL):
        if piece == "%":
            parts.append("")
        else:
            parts[-1] += "." if piece == "_" else re.escape(piece[-1])
    first, *middle = parts
    last = ".*" + middle.pop() if middle else ""
    match = re.compile(first + "".join(f"(?>.*?{part})" for part in middle) + last, re.DOTALL).fullmatch
    run = left.cast(str)
    return _Node(lambda event: (match(run(event)) is None) is negated, bool, left.depth + 1)


def _in(left: _Node, elements: list[_Node], negated: bool) -> _Node:
    """The type of the left side is that of the comparison (spec 3.4.5)."""
    x, runs = left.run, [element.run for element in elements]
    literals = [_to_str(element.literal) for element in elements if element.literal is not None]
    texts = frozenset(literals) if len(literals) == len(elements) else None

    def run(event: Mapping[str, object]) -> bool:
        value = x(event)
        if texts is not None and type(value) is str:
            return (value in texts) is not negated
        cast = _CAST[type(value)]
        for element in runs:
            if cast(element(event)) == value:
                return not negated
        return negated

    return _Node(run, bool, _above(left, *elements))


# ---- text to nodes (spec 2; precedence by spec 3.6) -----------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    |(?P<keyword>(?i:NOT[ \t\r\n]+LIKE|NOT[ \t\r\n]+IN|AND|EXISTS|FALSE|IN|LIKE|NOT|OR|TRUE|XOR)(?!\w))
    |(?P<function>[A-Za-z][A-Za-z_]*)(?=[ \t\r\n]*\()
    |(?P<integer>[0-9]+)(?!\w)
    |(?P<attribute>[A-Za-z0-9]+)(?!\w)
    |(?P<symbol><>|!=|<=|>=|[=<>+\-*/%(),])
    |(?P<bad>\w+|.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_POWER = {"NOT LIKE": 5, "LIKE": 5, "NOT IN": 4, "IN": 4, "*": 3, "/": 3, "%": 3, "+": 2, "-": 2}
_POWER |= dict.fromkeys(("=", "!=", "<>", "<", "<=", ">", ">="), 1)
_PREFIX = 6


class _Token(NamedTuple):
    kind: str  # "string", "integer", "attribute", "function" or "end"; of a keyword or symbol its own text
    text: str
    start: int


def _tokenize(source: str) -> list[_Token]:
    tokens = []
    for found in _TOKEN.finditer(source):
        kind = str(found.lastgroup)
        text = found[kind]
        if kind == "bad":
            problem = f"no closing {text} to this one" if text in "'\"" else f"{text!r} is neither name nor operator"
            raise CesqlSyntaxError(source, found.start(), problem)
        if kind != "space":
            own = kind in ("keyword", "symbol")
            tokens.append(_Token(" ".join(text.upper().split()) if own else kind, text, found.start()))
    return [*tokens, _Token("end", "the end", len(source))]


class _Parser:
    """A Pratt parser: ``_operand`` reads what stands alone, ``_term`` what operators join, tightest first."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = _tokenize(source)
        self._index = 0
        self._depth = 0
        self._missing: list[str] = []

    def parse(self) -> Expression:
        node = self._expression()
        self._expect("end", "an operator or the end")
        return Expression(self._source, node, tuple(self._missing))

    def _take(self, *kinds: str) -> _Token | None:
        """The next token if it is of one of these kinds."""
        token = self._tokens[self._index]
        if token.kind not in kinds:
            return None
        self._index += 1
        return token

    def _expect(self, kind: str, expected: str) -> _Token:
        token = self._take(kind)
        if token is None:
            raise self._error(expected, self._tokens[self._index])
        return token

    def _error(self, expected: str, token: _Token) -> CesqlSyntaxError:
        found = token.text if len(token.text) <= 40 else f"{token.text[:36]} ..."
        return CesqlSyntaxError(self._source, token.start, f"expected {expected}, found {found}")

    def _limit(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            start = self._tokens[self._index].start
            raise CesqlSyntaxError(self._source, start, f"nested deeper than {MAX_DEPTH} levels")

    def _expression(self) -> _Node:
        first = self._term(0)
        rest = []
        while token := self._take("AND", "OR", "XOR"):
            rest.append((token.kind, self._term(0)))
        return _logic(first, rest) if rest else first

    def _term(self, power: int) -> _Node:
        """Reads on while the operators bind tighter than ``power``."""
        self._depth += 1
        self._limit(self._depth)
        node = self._operand()
        while _POWER.get(symbol := self._tokens[self._index].kind, 0) > power:
            self._index += 1
            if symbol in ("LIKE", "NOT LIKE"):
                pattern = self._expect("string", "a string literal as the pattern")
                node = _like(node, _unquote(pattern.text), symbol != "LIKE")
            elif symbol in ("IN", "NOT IN"):
                self._expect("(", "'(' and the elements of the set")
                node = _in(node, self._list(), symbol != "IN")
            else:
                node = _binary(symbol, node, self._term(_POWER[symbol]))
        self._limit(node.depth)  # 1 + 1 + ... nests to the left without any recursion here
        self._depth -= 1
        return node

    def _list(self) -> list[_Node]:
        nodes = [self._expression()]
        while self._take(","):
            nodes.append(self._expression())
        self._expect(")", "an operator, ',' or ')'")
        return nodes

    def _operand(self) -> _Node:
        token = self._tokens[self._index]
        self._index += token.kind != "end"
        match token.kind:
            case "string":
                return _literal(_unquote(token.text))
            case "attribute":
                return _attribute(token.text.lower())
            case "function":
                return self._function(token.text.upper())
            case "integer":
                return self._integer(token, "")
            case "TRUE" | "FALSE":
                return _literal(token.kind == "TRUE")
            case "NOT":
                return _not(self._term(_PREFIX))
            case "EXISTS":
                return _exists(self._expect("attribute", "the name of an attribute").text.lower())
            case "(":
                node = self._expression()
                self._expect(")", "an operator or ')'")
                return node
            case "+" | "-":
                following = self._tokens[self._index]
                if following.kind == "integer" and following.start == token.start + 1:
                    self._index += 1
                    return self._integer(following, token.text)
                if token.kind == "-":
                    return _negate(self._term(_PREFIX))
                raise self._error("the digits of an Integer right after '+'", following)
            case _:
                raise self._error("a value", token)

    def _integer(self, token: _Token, sign: str) -> _Node:
        number = _integer(sign + token.text)  # with its sign: -2147483648 is an Integer, 2147483648 is none
        if number is None:
            raise self._error(f"an Integer from {_LOWEST} to {_HIGHEST}", token)
        return _literal(number)

    def _function(self, name: str) -> _Node:
        self._index += 1  # over the parenthesis that makes it a function
        arguments = [] if self._take(")") else self._list()
        for function in _FUNCTIONS.get(name, ()):
            if function.accepts(len(arguments)):
                return _call(function, arguments)
        self._missing.append(f"{name}/{len(arguments)}")
        return _failing("missingFunction", f"there is no function {name} of {len(arguments)} arguments", False)


def _unquote(literal: str) -> str:
    """Only the delimiter is escaped; any other backslash stands for itself, so that LIKE patterns need no doubling."""
    quote = literal[0]
    return re.sub(r"\\(.)", lambda found: quote if found[1] == quote else found[0], literal[1:-1], flags=re.DOTALL)
