"""The native checks: `PYTHONPATH=tests python -m native sanitize|memcheck|fuzz|budget`."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from native import budget, build


def sanitize(seconds: float, given_seed: int | None) -> None:
    """Random contracts under g++'s sanitizers, for so long each: once in order, once in threads."""
    for flavour, level in ((build.ADDRESS, None), (build.THREAD, "default")):
        for target in build.TARGETS:
            program = build.build_target(target, flavour)
            seed = str(random.randrange(2**32) if given_seed is None else given_seed)
            environment = dict(os.environ)
            if level:
                environment["ATEN_CPU_CAPABILITY"] = level
            print(f"{flavour.name} sanitizer, {target}, seed {seed}: ", end="", flush=True)
            subprocess.run([program, str(seconds), seed], check=True, env=environment)


def memcheck(seconds: float) -> None:
    """Random contracts under valgrind at the levels that it has; values are not compared."""
    build.need("valgrind", "memcheck")
    for target in build.TARGETS:
        program = build.build_target(target, build.MEMORY)
        print(f"memcheck, {target}: ", end="", flush=True)
        command = ["valgrind", "--quiet", "--error-exitcode=1", "--leak-check=full"]
        subprocess.run([*command, program, str(seconds), "1"], check=True)


def fuzz(seconds: float, targets: list[str], corpus: Path) -> None:
    """libFuzzer on each target for so long, from and into corpus/TARGET."""

    def run(target: str) -> int:
        program = build.build_target(target, build.FUZZER)
        folder = corpus / target
        folder.mkdir(parents=True, exist_ok=True)
        log = corpus / f"{target}.log"
        command = [
            str(program),
            str(folder),
            f"-max_total_time={seconds:.0f}",
            "-max_len=256",
            "-len_control=0",
        ]
        command += ["-print_final_stats=1", "-timeout=60", f"-artifact_prefix={corpus}/{target}-"]
        with log.open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
        lines = [
            line for line in log.read_text().splitlines() if "cov:" in line or "stat::" in line
        ]
        print(f"{target}: exit status {code}, {log}", *lines[-7:], sep="\n  ", flush=True)
        return code

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(pool.map(run, targets)):
            sys.exit("fuzz: a target failed; its log says how, the input lies beside it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, seconds in (("sanitize", 8.0), ("memcheck", 20.0), ("fuzz", 900.0)):
        command = commands.add_parser(name)
        command.add_argument("--seconds", type=float, default=seconds, help="for each target")
        if name == "sanitize":
            command.add_argument("--seed", type=int, help="of every target; by default a new one")
    command.add_argument("--corpus", type=Path, default=build.OUT / "corpus")
    command.add_argument("targets", nargs="*", default=build.FUZZED)
    budgets = commands.add_parser("budget")
    budgets.add_argument("--update", action="store_true", help="write what is measured")
    arguments = parser.parse_args()
    try:
        if arguments.command == "sanitize":
            sanitize(arguments.seconds, arguments.seed)
        elif arguments.command == "memcheck":
            memcheck(arguments.seconds)
        elif arguments.command == "fuzz":
            fuzz(arguments.seconds, arguments.targets, arguments.corpus)
        else:
            budget.main(update=arguments.update)
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
