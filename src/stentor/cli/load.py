"""From ``MODULE:APP`` on the command line to an App, with errors that say what to do."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import click

from stentor.app import App
from stentor.errors import DefinitionError, StentorError
from stentor.event import spec_of

FRAMES = 4
"""How many frames of the user's own traceback are shown."""


class CannotLoad(DefinitionError):
    """MODULE:APP leads to no App."""


def load_app(target: str) -> App:
    """The App that ``MODULE:APP`` names; ``:APP`` may be left out where the module has one App.

    The current directory comes first on the module path. Raises CannotLoad, or what the module itself raises as a
    StentorError.
    """
    name, _, attribute = target.partition(":")
    if name.endswith(".py"):
        name = name.removesuffix(".py").replace("/", ".").lstrip(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise CannotLoad(f"{target!r} is no module and app; write for example shop.app:app")
    module = _import(name)
    apps = {key: value for key, value in vars(module).items() if isinstance(value, App)}
    if not attribute:
        if len(apps) == 1:
            return next(iter(apps.values()))
        raise CannotLoad(f"{name} has {_listed(name, apps)}; say which: MODULE:APP")
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CannotLoad(f"{name} has no {attribute!r}; it has {_listed(name, apps)}")
        found = getattr(found, part)
    if not isinstance(found, App):
        kind = "class" if isinstance(found, type) else type(found).__name__
        raise CannotLoad(f"{target} is a {kind}, not a stentor App; {name} has {_listed(name, apps)}")
    return found


def learn_events(app: App, target: str) -> None:
    """Add the event classes that the app's module names to its catalog, so that they can be published by type."""
    name = target.partition(":")[0].removesuffix(".py").replace("/", ".").lstrip(".")
    for value in list(vars(sys.modules[name]).values()):
        if spec_of(value) is not None and app.catalog.find(value.__event__.type) is None:
            app.catalog.add(value)


def _listed(name: str, apps: dict[str, App]) -> str:
    return ", ".join(f"{name}:{key}" for key in apps) or "no App"


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except StentorError as error:
        _show_traceback(error)
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CannotLoad(_missing(name, error.name, here)) from None
        _show_traceback(error)
        raise CannotLoad(f"{name} could not be imported: {error}; install it, or correct the import") from None
    except (Exception, SystemExit) as error:
        _show_traceback(error)
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CannotLoad(f"{name} could not be imported: {text}") from None


def _missing(name: str, missing: str, here: str) -> str:
    """What to say of a module that is not there: what is, that looks like it."""
    parent, _, last = missing.rpartition(".")
    folder = Path(here, *parent.split(".")) if parent else Path(here)
    known = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    near = difflib.get_close_matches(last, known, 1)
    if near:
        hint = f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    elif Path(here, "src", *name.split(".")).exists() or Path(here, "src", f"{name.replace('.', '/')}.py").exists():
        hint = "it is in src/: install the project first (pip install -e .), or run from there"
    else:
        hint = "run from the project's folder, or install the project"
    return f"there is no module {missing!r} in {here} or on Python's path; {hint}"


def _show_traceback(error: BaseException) -> None:
    """The user's own part of a traceback: without the frames of the import system and of Stentor."""
    ours = str(Path(__file__).parent.parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen")) and "importlib" not in frame.filename
    ]
    lines = traceback.format_list(frames[-FRAMES:])
    if isinstance(error, SyntaxError):
        lines += traceback.format_exception_only(error)[:-1]
    click.echo(click.style("".join(lines).rstrip(), dim=True), err=True, nl=bool(lines))
