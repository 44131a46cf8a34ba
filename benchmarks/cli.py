"""What every script's command line shares: options are a dataclass, an error is one line."""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import torch
import typer

T = TypeVar("T")

MAX_COUNT = 2**31 - 1
MAX_THREADS = 1024

# What Typer raises for a command line that is not as declared; its module, and the name of its
# base, differ between Typer's releases.
UsageError: Any = typer.BadParameter.__base__


class Refusal(Exception):
    """The request cannot be met; the message is the one line that its author reads."""

    exit_code = 2


def run(options: Callable[..., T], main: Callable[[T], None], args: Sequence[str]) -> None:
    """Parses `args` into the dataclass `options`, whose fields are the command line, for `main`.

    A usage error, a Refusal or an interrupt ends the process with one line on stderr.
    """
    app = typer.Typer(add_completion=False)
    app.command()(options)
    try:
        parsed = typer.main.get_command(app).main(args, standalone_mode=False)
        if isinstance(parsed, int):  # the exit status of --help, or 130 for an interrupt
            sys.exit(parsed)
        main(parsed)
    except UsageError as error:
        _exit(error.format_message(), error.exit_code)
    except Refusal as refusal:
        _exit(str(refusal), refusal.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(message: str, status: int) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    threads: Annotated[int, typer.Option(help="CPU threads that torch may use.")] = 1
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu"
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: a rough answer.")] = False
    json: Annotated[Path | None, typer.Option(help="Write the measurements to this file.")] = None

    def __post_init__(self) -> None:
        require_threads(self.threads)
        require_device(self.device)
        require_kernels(self.device)
        if self.json is not None:
            require_writable(self.json)

    @property
    def rounds(self) -> int:
        return 11 if self.quick else 31

    @property
    def seconds_per_case(self) -> float:
        """After which rounds are left out, but for the least number of them."""
        return 1.5 if self.quick else 20.0


def items(option: str, text: str, choices: Mapping[str, T]) -> dict[str, T]:
    """The chosen part of `choices`, named by `text` as a comma-separated list."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise Refusal(f"{option}: {name!r} is not one of {', '.join(choices)}")
    return {name: choices[name] for name in names}


def positive_integers(option: str, text: str, separator: str = ",") -> list[int]:
    numbers = [number.strip() for number in text.split(separator)]
    if not all(number.isdecimal() and 0 < int(number) <= MAX_COUNT for number in numbers):
        raise Refusal(f"{option} takes positive integers separated by {separator!r}, not {text!r}")
    return [int(number) for number in numbers]


def require_range(least: float, most: float = math.inf, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            limits = f"finite and at least {least}" if most == math.inf else f"{least} to {most}"
            raise Refusal(f"--{name.replace('_', '-')} must be {limits}, not {value}")


def require_threads(threads: int) -> None:
    require_range(1, MAX_THREADS, threads=threads)


def require_device(name: str) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch finds no CUDA device on this machine")


def require_kernels(device: str) -> None:
    """Refuses a build without kernels for `device`: torch would be measured against itself."""
    if device != "cuda":
        return
    require_fusedstep()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "fusedstep::cross_entropy_forward", "CUDA"
    ):
        raise Refusal(
            "--device cuda: this build of fusedstep has no CUDA kernels "
            "(`python -m fusedstep info` says what was built)"
        )


def require_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot write to {path}: {error.strerror}") from None


def require_writable(path: Path) -> None:
    """Refuses a path that a long run would only at its end find it cannot write."""
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}") from None
    if not existed:
        path.unlink()


def require_module(name: str, remedy: str) -> ModuleType:
    """Refuses, too, where the module is there but was built for another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise Refusal(f"{error} ({remedy})") from None


def require_fusedstep() -> ModuleType:
    return require_module("fusedstep", "`make build` builds it")
