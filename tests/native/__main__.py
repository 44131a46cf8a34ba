"""The native checks: `PYTHONPATH=tests python -m native sanitize|memcheck|fuzz|budget`."""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checks
from native import budget, build

# By check and target.
Found = dict[str, dict[str, dict[str, int]]]


def sanitize(seconds: float, given_seed: int | None) -> Found:
    """Random contracts under g++'s sanitizers, for so long each: once in order, once in threads."""
    found: Found = {}
    for flavour, level in ((build.ADDRESS, None), (build.THREAD, "default")):
        for target in build.TARGETS:
            program = build.build_target(target, flavour)
            seed = str(random.randrange(2**32) if given_seed is None else given_seed)
            environment = dict(os.environ)
            if level:
                environment["ATEN_CPU_CAPABILITY"] = level
            print(f"{flavour.name} sanitizer, {target}, seed {seed}: ", end="", flush=True)
            check = f"g++'s {flavour.name} sanitizer"
            command = [*build.at_fixed_addresses(), str(program), str(seconds), seed]
            found.setdefault(check, {})[target] = {"inputs": inputs_of(command, environment)}
    return found


def inputs_of(command: list[str], environment: dict[str, str] | None = None) -> int:
    """How many inputs the program tried; what it says is printed."""
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    return int(done.stdout.partition(" inputs")[0])


def memcheck(seconds: float) -> Found:
    """Random contracts under valgrind at the levels that it has; values are not compared."""
    build.need("valgrind", "memcheck")
    found: dict[str, dict[str, int]] = {}
    for target in build.TARGETS:
        program = build.build_target(target, build.MEMORY)
        print(f"memcheck, {target}: ", end="", flush=True)
        command = ["valgrind", "--quiet", "--error-exitcode=1", "--leak-check=full"]
        command += [str(program), str(seconds), "1"]
        found[target] = {"inputs": inputs_of(command)}
    return {"valgrind's memcheck": found}


def fuzz(seconds: float, targets: list[str], corpus: Path) -> Found:
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
    found = {target: read_statistics((corpus / f"{target}.log").read_text()) for target in targets}
    return {"libFuzzer with clang's address sanitizer": found}


def read_statistics(log: str) -> dict[str, int]:
    """Of libFuzzer's log: the inputs tried, the edges that they reached and the inputs kept."""
    kept = re.findall(r"cov: (\d+) .*?corp: (\d+)/", log)
    tried = re.findall(r"stat::number_of_executed_units: +(\d+)", log)
    return {"inputs": int(tried[-1]), "edges": int(kept[-1][0]), "inputs kept": int(kept[-1][1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, seconds in (("sanitize", 8.0), ("memcheck", 20.0), ("fuzz", 900.0)):
        check = commands.add_parser(name)
        check.add_argument("--seconds", type=float, default=seconds, help="for each target")
        check.add_argument("--record", action="store_true", help="keep the counts for the pages")
        if name == "sanitize":
            check.add_argument("--seed", type=int, help="of every target; by default a new one")
    fuzzer = commands.choices["fuzz"]
    fuzzer.add_argument("--corpus", type=Path, default=build.OUT / "corpus")
    fuzzer.add_argument("targets", nargs="*", default=build.FUZZED)
    budgets = commands.add_parser("budget")
    budgets.add_argument("--update", action="store_true", help="write what is measured")
    arguments = parser.parse_args()
    try:
        if arguments.command == "budget":
            budget.main(update=arguments.update)
            return
        if arguments.command == "sanitize":
            found = sanitize(arguments.seconds, arguments.seed)
        elif arguments.command == "memcheck":
            found = memcheck(arguments.seconds)
        else:
            found = fuzz(arguments.seconds, arguments.targets, arguments.corpus)
        if arguments.record:
            options = shlex.join(option for option in sys.argv[2:] if option != "--record")
            command = f"make {arguments.command}" + (f' ARGS="{options}"' if options else "")
            for name, counts in found.items():
                checks.record(name, command, counts)
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
