"""`python -m benchmarks compare` finds a planted slowdown, and none where there is none."""

import json
import math
import subprocess
import textwrap

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import command, intervals
from benchmarks.compare import compare_tables
from benchmarks.rows import groups, write_table

# Its clock goes on while it works, and only then: whatever else the machine does, the times are these, within 4 %.
BENCHMARK = """
    import diffmem
    from benchmarks.harness import Contender

    def check(answers):
        if answers["diffmem"] != 42:
            raise ValueError(f"{answers['diffmem']} is not 42")

    def run(bench):
        for name in diffmem.WORK:
            bench.compare(name, [Contender("diffmem", lambda name=name: diffmem.work(name))], check)
"""
PACKAGE = """
    import random, time
    WORK, now = {work}, 0.0
    time.perf_counter = lambda: now
    def work(name):
        global now
        seconds, answer = WORK[name]
        now += seconds * random.uniform(0.98, 1.02)
        return answer
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository of three commits, and a benchmark of its package."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "bench_tiny.py").write_text(textwrap.dedent(BENCHMARK))
    (root / "diffmem").mkdir()

    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for tag, work in {
        "first": {"slowed": (0.02, 42), "kept": (0.02, 42), "sped up": (0.04, 42), "fixed": (0.001, 41)},
        "second": {"slowed": (0.04, 42), "kept": (0.02, 42), "sped up": (0.02, 42), "fixed": (0.001, 42)},
        "wrong": {"slowed": (0.02, 41), "kept": (0.02, 42), "sped up": (0.02, 42), "fixed": (0.001, 42)},
    }.items():
        (root / "diffmem" / "__init__.py").write_text(textwrap.dedent(PACKAGE.format(work=work)))
        git("add", "diffmem")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    return root


def compare(checkout, monkeypatch, *words):
    """The command on that repository: its exit status, its rows by workload, and all it printed."""
    monkeypatch.setattr(command, "ROOT", checkout)
    options = ["--file", str(checkout / "bench_tiny.py"), "--rounds", "5", "--processes", "1", "--margin", "0.05"]
    result = CliRunner().invoke(command.main, ["compare", *words, *options, "--json"])
    rows = json.loads(result.stdout[: result.stdout.rindex("}") + 1])["rows"] if "{" in result.stdout else []
    return result.exit_code, {row["workload"]: row for row in rows}, result.output


def test_a_planted_slowdown_is_found_between_two_commits(checkout, monkeypatch):
    status, rows, output = compare(checkout, monkeypatch, "first", "second")
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "slowed": "slower", "kept": "same", "sped up": "faster", "fixed": "failed",
    }, output  # fmt: skip
    assert status == 3
    assert rows["slowed"]["low"] > 1.9
    assert rows["slowed"]["ratio"] == pytest.approx(2, rel=0.05)
    assert "41 is not 42" in rows["fixed"]["note"]
    listed = subprocess.run(["git", "worktree", "list"], cwd=checkout, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1  # no tree is left behind


def test_wrong_values_at_b_fail_and_are_not_timed(checkout, monkeypatch):
    status, rows, output = compare(checkout, monkeypatch, "second", "wrong", "--only", "slowed")
    assert (status, rows["slowed"]["verdict"], rows["slowed"]["ratio"]) == (1, "failed", None)
    assert "at B: ValueError: 41 is not 42" in output


def test_a_commit_that_is_not_there_is_named(checkout, monkeypatch):
    status, _, output = compare(checkout, monkeypatch, "first", "nowhere")
    assert status == 1
    assert "nowhere: neither a commit nor a table of results" in output


def stored(path, times, machine="M", baseline=None, isa="avx512"):
    row = {"workload": "work", "contender": "diffmem", "machine": machine, "threads": "2", "isa": isa,
           "seconds": str(np.median(times)), "times": " ".join(map(str, times))}  # fmt: skip
    rows = [row] + ([row | {"contender": "B", "seconds": str(baseline)}] if baseline else [])
    write_table(path, rows)
    return str(path)


@pytest.mark.parametrize(("after", "status", "verdict"), [
    ([1.0, 1.01, 0.99, 1.0], 0, "same"),
    ([1.2, 1.21, 1.19, 1.2], 3, "slower"),
    ([0.8, 0.81, 0.79, 0.8], 0, "faster"),
    ([0.9, 1.3, 1.0, 1.2], 0, "undecided"),
    ([1.2, 1.2], 0, "undecided"),
])  # fmt: skip
def test_stored_tables_are_compared_as_they_are(tmp_path, after, status, verdict):
    tables = stored(tmp_path / "a.csv", [1.0, 1.01, 0.99, 1.0]), stored(tmp_path / "b.csv", after)
    result = CliRunner().invoke(command.main, ["compare", *tables, "--json"])
    assert result.exit_code == status, result.output
    assert json.loads(result.stdout)["rows"][0]["verdict"] == verdict
    assert verdict in CliRunner().invoke(command.main, ["compare", *tables]).output


def test_tables_of_two_machines_are_compared_by_their_baseline(tmp_path):
    sides = [([1.0, 1.0, 1.0], "M", 2.0), ([0.5, 0.5, 0.5], "N", 0.5)]
    tables = [stored(tmp_path / f"{i}.csv", *side) for i, side in enumerate(sides)]
    result = CliRunner().invoke(command.main, ["compare", *tables, "--json"])
    assert result.exit_code == 3
    row = json.loads(result.stdout)["rows"][0]
    assert (row["ratio"], "in times of the baseline" in row["note"]) == (2.0, True)
    alone = groups([{"workload": "work", "contender": "diffmem", "seconds": "1", "machine": "N", "isa": "avx512"}])
    here = groups([{"workload": "work", "contender": "diffmem", "seconds": "1", "machine": "M", "isa": "avx512"}])
    assert compare_tables(alone, here)[0].verdict == "failed"


def test_the_interval_covers_the_true_ratio_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng, true, within = np.random.default_rng(0), math.log(1.1), 0
    for _ in range(200):
        shifts = true + 0.02 * rng.standard_normal(3)  # processes differ
        _, low, high = intervals.paired([shift + 0.05 * rng.standard_normal(7) for shift in shifts])
        within += low <= 1.1 <= high
    assert 170 <= within <= 200
