"""A process of `python -m benchmarks compare`: this checkout's benchmarks on another tree's diffmem.

    python compare_worker.py TREE BENCHMARK-FILE '{"quick": false, "only": [], "check": true}'

It obeys lines of JSON on its standard input and answers with one each: {"do": "next"} prepares and checks the next
workload, {"do": "time", "inner": 3} runs it so often and says how long a run took.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

BENCHMARKS = Path(__file__).resolve().parent


def load(name: str, path: Path, **options: Any):
    """A module of this checkout, under its name, whatever the path of imports holds."""
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(tree: str, file: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what benchmarks print
    sys.path[:] = [tree, *(each for each in sys.path if Path(each or ".").resolve() not in (BENCHMARKS, Path(tree)))]
    load("benchmarks", BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)])
    import diffmem

    if not Path(diffmem.__file__).resolve().is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"diffmem came from {diffmem.__file__}, not from {tree}")
    bench = make_bench(Path(file).stem.removeprefix("bench_"), json.loads(options), answers)
    bench.listen(("next",))
    try:
        load(f"benchmarks.{Path(file).stem}", Path(file)).run(bench)
    except Exception as error:
        bench.say(error=f"{type(error).__name__}: {error}", workload="")
        return
    bench.say(done=True)


def make_bench(subject: str, options: dict[str, Any], answers: TextIO):
    from benchmarks.harness import Bench

    class Paired(Bench):
        """Checks a workload, then runs its first contender when it is told to."""

        def say(self, **values: Any) -> None:
            print(json.dumps(values), file=answers, flush=True)

        def listen(self, known: tuple[str, ...]) -> dict[str, Any]:
            line = sys.stdin.readline()
            if not line:  # the other side is gone
                raise SystemExit(0)
            found = json.loads(line)
            assert found["do"] in known, found
            return found

        def measured(self, workload: str) -> bool:
            return False

        def record(self, workload: str, contender: str, note: str = "", **values: str) -> None:
            """Rows that are not times are not compared."""

        def write(self) -> None:
            """No table."""

        def compare(self, workload, contenders, check=None, repeats=5) -> None:
            if not self.wants(workload):
                return
            chosen = contenders if options["check"] else contenders[:1]
            try:
                found = {contender.name: contender.run() for contender in chosen}
                if check is not None and options["check"]:
                    check(found)
                del found
                once = self.timed(contenders[0], 1)
            except (Exception, SystemExit) as error:
                self.say(workload=workload, error=f"{type(error).__name__}: {error}")
                self.listen(("next",))
                return
            self.say(workload=workload, seconds=once)
            while (told := self.listen(("next", "time")))["do"] == "time":
                self.say(seconds=self.timed(contenders[0], told["inner"]))

        @staticmethod
        def timed(contender, inner: int) -> float:
            if inner > 1:  # short: what the other process left in the caches would show
                contender.run()
            start = time.perf_counter()
            for _ in range(inner):
                contender.run()
            return (time.perf_counter() - start) / inner

    import tempfile

    return Paired(subject, options["quick"], tuple(options["only"]), folder=Path(tempfile.mkdtemp()))


if __name__ == "__main__":
    main(*sys.argv[1:])
