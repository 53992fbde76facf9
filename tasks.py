"""The one task runner. `python3 tasks.py help` lists its commands; all it needs is Python 3.11 or newer.

Each command makes or reuses the virtual environment .venv, installs what it needs when pyproject.toml has changed, and
passes further arguments on to the tool that does the work.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  the reader may have an older one, and this file must still tell them
    sys.exit("Stentor needs Python 3.11 or newer; this is {}.{} ({}).".format(*sys.version_info[:2], sys.executable))

import tomllib
from collections.abc import Callable

ROOT = Path(__file__).resolve().parent
HERE = ROOT / ".venv"
SHOWN = ROOT / "build" / "guarantees"
"""What the suite showed of each broker, for the tables of docs/guarantees.md."""
FAST = "not slow and not soak"
SLOW = "slow and not conformance and not soak"
TWICE = ("-n", str(2 * (os.cpu_count() or 1)))
"""Two processes of tests a core: for tests that mostly wait."""
BROKERS = ("memory", "sqlite", "redis", "postgresql", "nats", "rabbitmq", "rocketmq", "kafka")
COMMANDS: dict[str, Callable[[list[str]], int]] = {}


def command(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Make a function a command; the first line of its docstring is its line of help."""
    COMMANDS[function.__name__.rstrip("_")] = function
    return function


# Environments


class CannotMakeEnvironment(Exception):
    """No way to make a virtual environment was found; the message says what to install."""


def ask(python: Path | str, question: str) -> str:
    """What a line of Python prints in an interpreter; nothing if that fails."""
    return subprocess.run([python, "-c", question], capture_output=True, text=True, check=False).stdout.strip()


def make_environment(venv: Path, base: str) -> None:
    """A virtual environment of the interpreter `base`, with its own venv module, else with uv or virtualenv."""
    making: list[str | Path]
    if ask(base, "import ensurepip, venv; print(ensurepip.version())"):
        making = [base, "-m", "venv", venv]
    elif shutil.which("uv"):
        making = ["uv", "venv", "--quiet", "--python", base, venv]
    elif shutil.which("virtualenv"):
        making = ["virtualenv", "--quiet", "--python", base, venv]
    else:
        package = ask(base, "import sys; print('python{}.{}-venv'.format(*sys.version_info))")
        raise CannotMakeEnvironment(
            f"{base} cannot make a virtual environment: its module ensurepip is missing or incomplete.\n"
            f"Install it (Debian and Ubuntu: apt install {package}), or install uv or virtualenv, and try again."
        )
    shutil.rmtree(venv, ignore_errors=True)
    try:
        subprocess.run(making, check=True)
    except BaseException as error:  # half an environment must not be taken for one the next time
        shutil.rmtree(venv, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            raise CannotMakeEnvironment(f"{making[0]} could not make the environment {venv}.") from error
        raise


def requirements(group: str) -> list[str]:
    """What a dependency group of pyproject.toml asks for, with the groups that it includes."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    found: list[str] = []
    for entry in groups.get(group, ()):
        found += [entry] if isinstance(entry, str) else requirements(entry["include-group"])
    return found


def environment(group: str = "stentor", venv: Path = HERE, base: str = sys.executable) -> Path:
    """The programs of an environment that has Stentor (editable) and one dependency group, both up to date."""
    programs = venv / "bin"
    python = programs / "python"
    name = venv.relative_to(ROOT)
    if not (python.exists() and ask(python, "print('yes')")):
        print(f"{name}: a new environment of {base}", flush=True)
        make_environment(venv, base)
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = venv / f"stentor-{group}.stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return programs
    print(f"{name}: installing {group} ... ", end="", flush=True)
    installer: list[str | Path] = (
        ["uv", "pip", "install", "--python", python] if shutil.which("uv") else [python, "-m", "pip", "install"]
    )
    what = ["--no-deps"] if group == "flights" else ["--editable", f"{ROOT}[http,webhooks,deliver,brokers]"]
    start = time.monotonic()
    done = subprocess.run(
        [*installer, "--quiet", *what, *requirements(group)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"failed\n{done.stdout}")
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    stamp.write_text(wanted)
    return programs


def interpreters() -> dict[int, str]:
    """Every released CPython from 3.11 up on the PATH or under pyenv, one for each minor version."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    names = [shutil.which(f"python3.{minor}") for minor in range(11, 40)] + [shutil.which("python3")]
    question = "import sys; print(sys.version_info.minor, sys.version_info.releaselevel + sys.abiflags, sys.executable)"
    found: dict[int, str] = {}
    for path in [*filter(None, names), *map(str, sorted(versions.glob("3.*/bin/python3")))]:
        minor, kind, executable = ask(path, question).split(maxsplit=2) or ("0", "", "")  # a shim may lead nowhere
        if int(minor) >= 11 and kind == "final":  # neither a beta nor a free-threaded build
            found.setdefault(int(minor), executable)
    return dict(sorted(found.items()))


def run(program: Path | str, *args: Path | str, **env: str) -> int:
    """Run a program in the project's folder; its exit code."""
    return subprocess.run([program, *args], cwd=ROOT, env=os.environ | env, check=False).returncode


def pytest(programs: Path, *args: str, **env: str) -> int:
    """Run pytest on every core; what comes later in `args` wins."""
    env = {"JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1", **env}  # servers that live for minutes: compile little
    return run(programs / "python", "-m", "pytest", "-n", "logical", *args, **env)


# Commands


@command
def demo(args: list[str]) -> int:
    """Show a small shop at work: order, retries, a dead letter and its redrive. Needs no server and no network."""
    return run(environment() / "stentor", "demo", *args)


@command
def test(args: list[str]) -> int:
    """Run the fast tests here, then on the newest other Python that is found. --here: only here."""
    options = [arg for arg in args if arg != "--here"]
    programs = environment("test")
    minor = int(ask(programs / "python", "import sys; print(sys.version_info.minor)"))
    results = {minor: pytest(programs, "-m", FAST, *TWICE, *options)}
    others = {} if "--here" in args else interpreters()
    newest = max((other for other in others if other != minor), default=0)
    if newest:
        print(f"\nPython 3.{newest}", flush=True)
        try:
            programs = environment("test", ROOT / ".venvs" / f"3.{newest}", others[newest])
            results[newest] = pytest(programs, "-m", FAST, *TWICE, *options)
        except CannotMakeEnvironment as missing:
            print(f"skipped: the tests on Python 3.{newest}. {missing}", flush=True)
        print("\n" + "\n".join(f"Python 3.{v}: {'failed' if code else 'passed'}" for v, code in results.items()))
    return max(results.values())


@command
def slow(args: list[str]) -> int:
    """Run the slow tests: real processes and their deaths, the flights example through kill -9."""
    environment("flights")
    return pytest(environment("test"), "-m", SLOW, *TWICE, *args)


@command
def conformance(args: list[str]) -> int:
    """Run the contract's tests on every broker, or on one: `conformance redis`. Real servers are started for it."""
    chosen = []
    if args and not args[0].startswith("-"):
        name = args.pop(0)
        chosen = ["-k", name, f"--junitxml={SHOWN / name}.xml"]
    return pytest(environment("test"), "-m", "conformance and not soak", *TWICE, *chosen, *args)


@command
def soak(args: list[str]) -> int:
    """Mix faults at random and count what was lost, reordered or doubled. --minutes N, else 2."""
    minutes = "2"
    if "--minutes" in args:
        at = args.index("--minutes")
        minutes = args[at + 1]
        args = args[:at] + args[at + 2 :]
    kept = f"--junitxml={SHOWN / 'soak'}.xml"
    side_by_side = str(1 + (os.cpu_count() or 1))  # each starts a process a second
    return pytest(environment("test"), "-m", "soak", kept, "-n", side_by_side, *args, STENTOR_SOAK_MINUTES=minutes)


@command
def guarantees(args: list[str]) -> int:
    """Write the tables of docs/guarantees.md from what `conformance NAME` and `soak` showed here, as CI runs them."""
    return run(environment("test") / "python", "-m", "docs.gen_guarantees", *args)


@command
def lint(args: list[str]) -> int:
    """Check style and format; change nothing."""
    ruff = environment("lint") / "ruff"
    return max(run(ruff, "check", *args), run(ruff, "format", "--check", *args))


@command
def format_(args: list[str]) -> int:
    """Format the code and mend what can be mended."""
    ruff = environment("lint") / "ruff"
    return max(run(ruff, "check", "--fix", *args), run(ruff, "format", *args))


@command
def types(args: list[str]) -> int:
    """Check types: mypy --strict on src and tests; mypy and pyright on the examples and the README's snippets."""
    programs = environment("test")
    shown = [name for name in ("examples", "README.md") if (ROOT / name).exists()]
    for name in {"examples", "README.md"} - set(shown):
        print(f"skipped: the types of {name}, which does not exist yet")
    if "README.md" in shown:
        shown[-1] = snippets(ROOT / "README.md")
    result = run(programs / "mypy", "src", "tests", "servers", "tasks.py", *shown, *args)
    return max(result, run(programs / "pyright", "--pythonpath", programs / "python", *shown) if shown else 0)


def snippets(page: Path) -> str:
    """The Python of a Markdown page as a file: each line keeps its number, all else is blank."""
    inside, lines = False, []
    for line in page.read_text("utf-8").splitlines():
        fence = line.startswith("```")
        inside = line.startswith("```python") if fence and not inside else inside and not fence
        lines.append(line if inside and not fence else "")
    target = ROOT / "build" / "snippets" / f"{page.stem.lower()}_snippets.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", "utf-8")
    return str(target.relative_to(ROOT))


@command
def docs(args: list[str]) -> int:
    """Build the documentation into site/, every warning an error. `docs serve` shows it while you write."""
    programs = environment("docs")
    if not (ROOT / "docs" / "index.md").exists():
        print("skipped: the documentation, which has no docs/index.md yet")
        return 0
    return run(programs / "python", "docs/gen_reference.py") or run(
        programs / "zensical", *(args or ["build", "--strict", "--clean"])
    )


@command
def bench(args: list[str]) -> int:
    """Measure Stentor beside its peers, all figures or those named: `bench memory`. `bench --help` lists them."""
    python = environment("bench", ROOT / ".venvs" / "bench") / "python"  # the peers' needs apart from ours
    return run(python, "-m", "benchmarks", *(args or ["all"]))


@command
def seven(args: list[str]) -> int:
    """Put all seven brokers under one load; writes docs/bench/seven.html and what `stentor choose` ships with."""
    return run(environment("test") / "python", "-m", "benchmarks.seven", *args)


@command
def servers(args: list[str]) -> int:
    """Start real servers on this machine, without Docker: `servers up kafka redis`, `servers down`, `servers list`."""
    return run(environment("test") / "python", "-m", "servers", *args)


@command
def flights(args: list[str]) -> int:
    """Replay every flight that left New York in 2013 through sources, handlers and a read model."""
    environment("flights")
    return run(environment() / "python", "-m", "examples.flights", *args)


@command
def ci(_args: list[str]) -> int:
    """Run all that must hold before a change lands, and say which step failed."""
    steps = ["test", "lint", "types", "docs", "slow"]
    steps += [f"conformance {name}" for name in BROKERS]
    steps += ["soak --minutes 2"]
    counts = dict.fromkeys(("failed", "passed", "skipped", "xfailed", "errors"), 0)
    report: list[str] = []
    failed = 0
    began = time.monotonic()
    for step in steps:
        print(f"\n>>> python3 tasks.py {step}", flush=True)
        start = time.monotonic()
        with subprocess.Popen(
            [sys.executable, __file__, *step.split()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for coloured in process.stdout or ():
                line = re.sub(r"\x1b\[[\d;]*m", "", coloured)
                print(line, end="", flush=True)
                if line.startswith("skipped: "):
                    report.append(line.rstrip())
                if re.fullmatch(r"=+ .+ in [\d.]+s.*=+\n", line):  # pytest's closing line
                    for count, word in re.findall(r"(\d+) (failed|passed|skipped|xfailed|error)", line):
                        counts["errors" if word == "error" else word] += int(count)
        failed += bool(process.returncode)
        report.append(f"{'FAILED' if process.returncode else 'ok':8}{time.monotonic() - start:5.0f} s  {step}")
    print("\n" + "\n".join(report))
    total = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no tests ran"
    print(f"===== {total} in {time.monotonic() - began:.2f}s =====")  # as pytest closes, all its runs added up
    return 1 if failed else 0


@command
def clean(_args: list[str]) -> int:
    """Remove the environments and all that the other commands made."""
    made = ".venv .venvs build dist site docs/reference .cache .data .mypy_cache .pytest_cache .ruff_cache .hypothesis"
    for name in made.split():
        shutil.rmtree(ROOT / name, ignore_errors=True)
    return 0


@command
def help_(_args: list[str]) -> int:
    """List these commands."""
    print("python3 tasks.py COMMAND [arguments for its tool]\n")
    for name, function in COMMANDS.items():
        print(f"  {name:13}{(function.__doc__ or '').splitlines()[0]}")
    return 0


def main(args: list[str]) -> int:
    """Run the command that the first argument names."""
    name = args[0] if args and args[0] not in ("-h", "--help") else "help"
    if name not in COMMANDS:
        print(f"There is no command {name!r}. `python3 tasks.py help` lists them.", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](args[1:])
    except CannotMakeEnvironment as missing:
        print(missing, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
