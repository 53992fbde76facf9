"""From a user's function to one callable: what it takes and gives is found once, at definition and at start-up."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Annotated, Any, Union, get_args, get_origin

from stentor.cesql import parse as parse_sql
from stentor.clock import Duration, seconds
from stentor.context import Context, Depends, Firing, current
from stentor.errors import DefinitionError
from stentor.event import Named, Outgoing, spec_of
from stentor.message import Message
from stentor.retry import Retry

Invoke = Callable[[Any, Context], Awaitable[Any]]
"""Runs the user's function with an event (or list of events, or message) and a Context."""


class Batch:
    """Settings of a batch handler: at most ``size`` events at once, waiting up to ``wait`` for more than one."""

    __slots__ = ("size", "wait")

    def __init__(self, size: int = 100, wait: Duration = "0ms") -> None:
        if type(size) is not int or size < 1:
            raise DefinitionError(f"Batch: size must be a whole number from 1, not {size!r}")
        self.size = size
        self.wait = seconds(wait, "Batch: wait")


class Handler:
    """One handler of a group, as declared."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        types: tuple[type, ...] = (),
        topic: str | None = None,
        retry: Retry | None = None,
        timeout: Duration | None = None,
        where: Callable[[Any], bool] | str | None = None,
        batch: Batch | None = None,
    ) -> None:
        if not callable(function):
            raise DefinitionError(f"a handler must be a function, not {function!r}")
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.types = types
        self.topic = topic
        if retry is not None and not isinstance(retry, Retry):
            raise DefinitionError(f"{self.name}: retry must be a Retry, not {retry!r}")
        self.retry = retry or Retry()
        self.timeout = None if timeout is None else seconds(timeout, f"{self.name}: timeout")
        if self.timeout == 0:
            raise DefinitionError(f"{self.name}: timeout must be above zero")
        if batch is not None and not isinstance(batch, Batch):
            raise DefinitionError(f"{self.name}: batch must be a Batch, not {batch!r}")
        self.batch = batch
        self.raw = False
        """Its parameter is a Message though it is registered for types: it gets what the broker has, undecoded."""
        self.local = local_names()
        self.where, self.where_sql = _filter(where, self.name)

    @property
    def place(self) -> str:
        """Where the function stands, for messages."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return f"{self.name} ({code.co_filename}:{code.co_firstlineno})" if code else self.name

    @property
    def names(self) -> tuple[str, ...]:
        """What it claims within its group: event types, or a topic."""
        if self.topic is not None:
            return (f"topic {self.topic}",)
        return tuple(name for cls in self.types if (spec := spec_of(cls)) for name in spec.names)

    @property
    def returns(self) -> tuple[type, ...]:
        """The event classes that its return annotation names."""
        return _events(_resolve(inspect.signature(self.function).return_annotation, self.function, self.local))

    def compile(self, scope: AppScope, overrides: dict[Any, Any] | None = None) -> Invoke:
        """The callable that the worker runs.

        Raises:
            DefinitionError: a parameter or the return annotation cannot be served.
        """
        function = (overrides or {}).get(self.function, self.function)
        return _compile(self, function, scope, overrides or {})


def _filter(where: Any, name: str) -> tuple[Callable[[Any], bool] | None, Callable[[Any], bool] | None]:
    if where is None:
        return None, None
    if isinstance(where, str):
        try:
            expression = parse_sql(where)
        except ValueError as error:
            raise DefinitionError(f"{name}: where: {error}") from None
        if expression.missing_functions:
            missing = ", ".join(expression.missing_functions)
            raise DefinitionError(f"{name}: where={where!r} calls {missing}, which CloudEvents SQL does not have")
        return None, expression.matches
    if callable(where):
        return where, None
    raise DefinitionError(f"{name}: where must be a predicate or a CloudEvents SQL text, not {where!r}")


# ---- annotations ----------------------------------------------------------------------------------------------------

_UNKNOWN = object()


def local_names() -> dict[str, Any]:
    """The classes and functions that are local where a handler is being declared, for annotations that are texts."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") in ("stentor.handler", "stentor.group", "stentor.app"):
        frame = frame.f_back
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name != "<module>":
        found = {name: value for name, value in frame.f_locals.items() if callable(value)} | found
        if "__qualname__" not in frame.f_locals:
            break  # a function: what is around it is not in its caller's frame; only a class body's is
        frame = frame.f_back
    return found


def _resolve(annotation: Any, function: Callable[..., Any], local: dict[str, Any]) -> Any:
    """An annotation as an object; _UNKNOWN when it is a text that names nothing known."""
    if not isinstance(annotation, str):
        return annotation
    target = inspect.unwrap(function)
    if isinstance(target, functools.partial):
        target = target.func
    if inspect.ismethod(target):
        target = target.__func__
    names = {**getattr(target, "__globals__", {}), **local}
    closure = getattr(target, "__closure__", None)
    code = getattr(target, "__code__", None)
    if closure and code:
        for name, cell in zip(code.co_freevars, closure, strict=True):
            try:
                names[name] = cell.cell_contents
            except ValueError:
                continue
    try:
        return eval(annotation, names)  # noqa: S307 - the program's own annotation, as typing.get_type_hints does
    except Exception:
        return _UNKNOWN


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _check_event_parameter(handler: Handler, parameter: inspect.Parameter, function: Callable[..., Any]) -> None:
    where = f"handler {handler.place}: parameter {parameter.name!r}"
    if parameter.annotation is inspect.Parameter.empty:
        expected = " | ".join(cls.__name__ for cls in handler.types) or ("Message" if handler.topic else "Firing")
        raise DefinitionError(f"{where} has no annotation; write {parameter.name}: {expected}")
    annotation = _resolve(parameter.annotation, function, handler.local)
    if annotation is _UNKNOWN or annotation is Any:
        return
    if handler.batch is not None:
        if get_origin(annotation) is not list:
            raise DefinitionError(f"{where} of a batch handler must be a list, not {_show(annotation)}")
        annotation = get_args(annotation)[0]
        if isinstance(annotation, str):
            return
    if annotation is Message:
        handler.raw = True
        return
    if handler.topic is not None:
        raise DefinitionError(f"{where} of a whole-topic handler must be a Message, not {_show(annotation)}")
    members = _members(annotation)
    if _UNKNOWN in members or any(isinstance(member, (str, typing.TypeVar, typing.ForwardRef)) for member in members):
        return
    for cls in handler.types:
        if not any(isinstance(member, type) and issubclass(cls, member) for member in members):
            raise DefinitionError(
                f"{where} is annotated {_show(annotation)}, but the handler is registered for {cls.__name__}"
            )


def _show(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _check_return(handler: Handler, function: Callable[..., Any]) -> None:
    annotation = _resolve(inspect.signature(function).return_annotation, function, handler.local)
    if annotation in (inspect.Signature.empty, _UNKNOWN, None, Any, type(None)):
        return
    bad = _not_events(annotation)
    if bad is not None:
        raise DefinitionError(
            f"handler {handler.place}: it returns {_show(bad)}, which is no event; a handler returns events "
            "(one, a list, a tuple, an async generator) or None"
        )


_NOTHING = (None, type(None), Any, Ellipsis, typing.NoReturn, typing.Never)


def _not_events(annotation: Any) -> Any | None:
    """The part of a return annotation that is no event, or None."""
    for member in _members(annotation):
        if member in _NOTHING or isinstance(member, (str, typing.TypeVar, typing.ForwardRef)):
            continue
        origin = get_origin(member)
        if origin is Annotated:
            bad = _not_events(get_args(member)[0])
        elif isinstance(origin, type) and issubclass(origin, (list, tuple, AsyncIterator, Iterable)):
            bad = next((b for b in map(_not_events, get_args(member)) if b is not None), None)
        elif isinstance(member, type) and (
            spec_of(member) or issubclass(member, (Outgoing, Named, Message)) or hasattr(member, "__inherit__")
        ):
            continue
        else:
            bad = member
        if bad is not None:
            return bad
    return None


def _events(annotation: Any) -> tuple[type, ...]:
    if isinstance(annotation, type) and spec_of(annotation) is not None:
        return (annotation,)
    return tuple(cls for part in get_args(annotation) for cls in _events(part))


# ---- injection ------------------------------------------------------------------------------------------------------


class AppScope:
    """Holds what ``Depends(..., scope="app")`` made, from first use to the app's stop, and threads for sync handlers.

    The event loop's own executor has few (four more than cores), and others use it too. A test may give another.
    """

    def __init__(self, most: int, executor: Executor | None = None) -> None:
        self._most = max(1, most)
        self._given = executor
        self._threads: ThreadPoolExecutor | None = None
        self._made: dict[Callable[..., Any], asyncio.Future[Any]] = {}
        self._stack = AsyncExitStack()

    async def get(self, function: Callable[..., Any], make: Callable[[AsyncExitStack], Awaitable[Any]]) -> Any:
        future = self._made.get(function)
        if future is None:
            future = self._made[function] = asyncio.get_running_loop().create_future()
            try:
                future.set_result(await make(self._stack))
            except BaseException as error:
                # The next delivery tries again: a dependency that failed to start must not stay failed.
                del self._made[function]
                future.set_exception(error)
                future.exception()
                raise
        return await asyncio.shield(future)

    @property
    def threads(self) -> Executor:
        """Starts a thread when all that there are have work."""
        if self._given is not None:
            return self._given
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._most, "stentor handler")
        return self._threads

    async def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None
        self._made.clear()
        await self._stack.aclose()


_Resolver = Callable[[Context, Any, AsyncExitStack | None], Any]


def _dependency(
    depends: Depends, owner: str, scope: AppScope, overrides: dict[Any, Any], local: dict[str, Any]
) -> _Resolver:
    """A coroutine function that makes a dependency's value and registers its closing."""
    function = overrides.get(depends.function, depends.function)
    label = f"{owner}: Depends({getattr(function, '__name__', function)!s})"
    if not callable(function):
        raise DefinitionError(f"{label} is not callable")
    target = inspect.unwrap(function)
    taken = list(inspect.signature(function).parameters.values())
    parameters = _parameters(function, taken, label, scope, overrides, local)
    if depends.scope == "app" and parameters:
        for parameter in taken:
            found = _depends_of(_resolve(parameter.annotation, function, local))
            if found is None or found.scope != "app":
                raise DefinitionError(f"{label}: with scope='app' it can depend only on others of that scope")
    if inspect.isasyncgenfunction(target) and target is function:
        function = asynccontextmanager(function)
    elif inspect.isgeneratorfunction(target) and target is function:
        function = contextmanager(function)

    async def make(context: Context | None, event: Any, stack: AsyncExitStack) -> Any:
        value = function(**{name: await _value(part, context, event, stack) for name, part in parameters.items()})
        if inspect.isawaitable(value):
            value = await value
        if hasattr(value, "__aenter__"):
            return await stack.enter_async_context(value)
        if hasattr(value, "__enter__") and hasattr(value, "__exit__"):
            return stack.enter_context(value)
        return value

    if depends.scope == "app":
        return lambda context, event, stack: scope.get(depends.function, lambda own: make(None, None, own))
    return lambda context, event, stack: make(context, event, typing.cast(AsyncExitStack, stack))


async def _value(resolver: _Resolver, context: Any, event: Any, stack: AsyncExitStack | None) -> Any:
    value = resolver(context, event, stack)
    return await value if inspect.isawaitable(value) else value


def _depends_of(annotation: Any) -> Depends | None:
    if get_origin(annotation) is Annotated:
        return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, Depends)), None)
    return None


def _parameters(
    function: Callable[..., Any],
    parameters: list[inspect.Parameter],
    owner: str,
    scope: AppScope,
    overrides: dict[Any, Any],
    local: dict[str, Any],
) -> dict[str, _Resolver]:
    """A resolver for each parameter that is injected by its annotation."""
    found: dict[str, _Resolver] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = _resolve(parameter.annotation, function, local)
        depends = _depends_of(annotation)
        if depends is not None:
            found[parameter.name] = _dependency(depends, owner, scope, overrides, local)
        elif annotation is Context:
            found[parameter.name] = lambda context, event, stack: context
        elif annotation is Message:
            found[parameter.name] = lambda context, event, stack: context.message
        elif annotation is Firing or (isinstance(annotation, type) and spec_of(annotation)):
            found[parameter.name] = lambda context, event, stack: event
        elif parameter.default is inspect.Parameter.empty:
            raise DefinitionError(
                f"{owner}: parameter {parameter.name!r} cannot be injected; annotate it as Context, Message, Firing or "
                "Annotated[T, Depends(...)], or give it a default"
            )
    return found


def _compile(handler: Handler, function: Callable[..., Any], scope: AppScope, overrides: dict[Any, Any]) -> Invoke:
    parameters = list(inspect.signature(function).parameters.values())
    owner = f"handler {handler.place}"
    timer = not handler.types and handler.topic is None
    positional, local = 0, handler.local
    if parameters and not (timer and _resolve(parameters[0].annotation, function, local) is not Firing):
        if parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
            raise DefinitionError(f"{owner}: its first parameter is the event and cannot be keyword-only")
        _check_event_parameter(handler, parameters[0], function) if not timer else None
        positional = 1
    elif not timer:
        raise DefinitionError(f"{owner}: it takes no parameter; its first parameter is the event")
    _check_return(handler, function)
    injected = _parameters(function, parameters[positional:], owner, scope, overrides, local)
    scoped = any(_depends_of(_resolve(parameter.annotation, function, local)) for parameter in parameters[positional:])

    call: Callable[..., Any]
    if inspect.isasyncgenfunction(function):

        async def collect(*args: Any, **kwargs: Any) -> list[Any]:
            return [event async for event in function(*args, **kwargs)]

        call = collect
    elif inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        call = function
    else:
        call = _in_thread(function, scope)

    if not injected:
        if positional:
            return lambda event, context: call(event)
        return lambda event, context: call()
    only = next(iter(injected)) if len(injected) == 1 else None
    if (
        only is not None
        and positional
        and not scoped
        and _resolve(next(p.annotation for p in parameters if p.name == only), function, local) is Context
    ):
        return lambda event, context: call(event, **{only: context})

    async def invoke(event: Any, context: Context) -> Any:
        args = (event,) if positional else ()
        if not scoped:
            return await call(*args, **{name: resolver(context, event, None) for name, resolver in injected.items()})
        async with AsyncExitStack() as stack:
            values = {name: await _value(resolver, context, event, stack) for name, resolver in injected.items()}
            return await call(*args, **values)

    return invoke


def _in_thread(function: Callable[..., Any], scope: AppScope) -> Callable[..., Awaitable[Any]]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        work = functools.partial(context.run, function, *args, **kwargs)
        future = asyncio.get_running_loop().run_in_executor(scope.threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # A thread cannot be stopped: its key stays taken until it returns, whatever it then says.
            running = current.get()
            if running is not None:
                running.cancelled = True
            raise ThreadStillRuns(future) from None

    return run


class ThreadStillRuns(BaseException):
    """A sync handler was cancelled but its thread goes on; ``future`` ends with it."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        super().__init__("the handler's thread is still running")
        self.future = future
