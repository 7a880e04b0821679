"""The benchmarks' harness: rows say where they come from, are kept while they are true, and show in the README."""

import subprocess
import sys
import time

import pytest

from benchmarks import harness, load, plan, readme_table
from benchmarks.harness import Bench, Contender
from benchmarks.load import Load, Meter
from benchmarks.rows import COLUMNS, groups, read_table, write_table

IDLE = Load(0.0, 0.0)


@pytest.fixture
def loads(monkeypatch):
    """What the next rows' meters say; then idle."""
    coming: list[Load] = []
    monkeypatch.setattr(Meter, "load", lambda self: coming.pop(0) if coming else IDLE)
    monkeypatch.setattr(harness, "wait_until_idle", lambda longest: IDLE)
    monkeypatch.setattr(harness, "LEAST", 0.0)
    return coming


def measure(folder, answers=(1, 1), **options) -> tuple[Bench, list[str]]:
    """A workload of two contenders, and who ran, in order."""
    ran: list[str] = []

    def contender(name: str, answer: int, package: str = "") -> Contender:
        return Contender(name, lambda: ran.append(name) or answer, package=package)

    def check(found):
        if found["diffmem"] != found["theirs"]:
            raise AssertionError("wrong")

    bench = Bench("tiny", folder=folder, **options)
    bench.compare("work", [contender("diffmem", answers[0]), contender("theirs", answers[1], "numpy")], check, 3)
    return bench, ran


def test_a_row_names_baseline_versions_instruction_set_spread_and_load(tmp_path, loads):
    bench, ran = measure(tmp_path)
    assert ran == ["diffmem", "theirs"] + 3 * ["diffmem", "diffmem", "theirs", "theirs"]
    ours, theirs = read_table(bench.path)
    assert tuple(ours) == COLUMNS
    assert (ours["version"], theirs["version"].split()[0]) == (harness.package_version("diffmem"), "numpy")
    assert ours["isa"] == harness.isa() != ""
    assert (ours["load"], ours["steal"], ours["repeats"], ours["ratio"]) == ("0.00", "0.00", "3", "1")
    assert len(ours["times"].split()) == 3
    for column in ("machine", "threads", "versions", "date", "seconds", "iqr", "fastest"):
        assert ours[column], column


def test_values_are_checked_before_anything_is_timed(tmp_path, loads):
    with pytest.raises(AssertionError, match="wrong"):
        measure(tmp_path, answers=(1, 2))
    assert not list(tmp_path.iterdir())


def test_rows_are_kept_while_they_would_be_the_same(tmp_path, loads, monkeypatch):
    bench, _ = measure(tmp_path)
    if not harness.commit():
        pytest.skip("no git checkout: rows have no commit, and are measured each time")
    assert measure(tmp_path)[1] == []
    assert measure(tmp_path, redo=True)[1] != []
    rows = read_table(bench.path)
    for column, other in (("commit", "0000000"), ("machine", "another"), ("versions", "torch 1"), ("load", "0.90"),
                          ("load", ""), ("steal", "0.50")):  # fmt: skip
        write_table(bench.path, [row | {column: other} for row in rows])
        kept = column == "load" and not other and not load.STAT.exists()
        assert (measure(tmp_path)[1] == []) == kept, column
    monkeypatch.setattr(harness, "isa", lambda: "another")  # rows of another instruction set stay beside
    assert measure(tmp_path)[1] != []
    assert {isa for _, isa in groups(read_table(bench.path))} == {"another", rows[0]["isa"]}


def test_disturbed_rows_are_measured_again_and_the_calmest_is_taken(tmp_path, loads):
    loads += [Load(0.9, 0.0), Load(0.3, 0.0), Load(0.1, 0.4)]
    bench, ran = measure(tmp_path)
    assert ran.count("diffmem") == 1 + 3 * 6
    assert read_table(bench.path)[0]["load"] == "0.30"
    loads += [Load(0.9, 0.0)]
    bench, ran = measure(tmp_path, busy=True)
    assert ran.count("diffmem") == 1 + 6
    assert read_table(bench.path)[0]["load"] == "0.90"


@pytest.mark.skipif(not load.STAT.exists(), reason="the system does not say what other processes do")
def test_own_work_and_that_of_children_is_no_load_and_that_of_strangers_is():
    burn = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    began = load.own_seconds()
    with subprocess.Popen([sys.executable, "-c", burn]) as child:
        while child.poll() is None:
            time.sleep(0.05)
            living = load.own_seconds() - began
    assert 0.4 < living <= load.own_seconds() - began + 0.02
    # What `Meter` takes from the machine's count is what this process and its children took.
    assert load.machine_seconds()[0] > load.own_seconds()


def row(workload, contender, seconds, **changes):
    values = {"machine": "M, 2 cores", "threads": "2", "versions": "torch 2, numpy 1", "commit": "aaa", "isa": "avx512",
              "load": "0.02", "steal": "0.00", "date": "2026-01-02"}  # fmt: skip
    return {"workload": workload, "contender": contender, "seconds": str(seconds), **values, **changes}


def test_readme_has_one_line_of_origin_and_marks_what_differs(tmp_path):
    pair = lambda workload, **changes: [row(workload, "diffmem", 0.5, **changes), row(workload, "B", 1, **changes)]  # noqa: E731
    new = [*pair("one"), *pair("two"), *pair("two", isa="avx2"), *pair("old", commit="bbb"), *pair("busy", load="1.00")]
    write_table(tmp_path / "a.csv", new)
    other = {"machine": "N, 8 cores", "versions": "torch 3, numpy 1"}
    write_table(tmp_path / "b.csv", [*pair("one", date="2026-01-01", commit="ccc"), *pair("two", isa="", commit="ccc"),
                                     *pair("elsewhere", **other)])  # fmt: skip
    write_table(tmp_path / "c.quick.csv", pair("quick"))
    lines = readme_table.table(tmp_path).splitlines()
    assert lines[2] == "| one | avx512 | 500 ms | B | 1 s | 2× |"
    works = [line.split("|")[1].strip() for line in lines[2:-2]]
    assert works == ["one", "two", "two", "old¹", "busy\\*", "elsewhere²"]
    assert lines[-1] == (
        "Measured on M, 2 cores, 2 threads; torch 2, numpy 1; commit aaa. ¹ commit bbb. "
        "² N, 8 cores, 2 threads, torch 3, commit aaa. \\* Not known to have been measured while nothing else ran."
    )


def test_the_plan_says_what_is_there_and_what_is_missing(tmp_path, loads):
    parts = plan.plan(["nearest", "kernel_traffic"], folder=tmp_path)
    assert [part.subject for part in parts][-1] == "kernel_traffic"
    assert not any(part.finished for part in parts)
    if harness.commit():
        plan.note_made(parts[-1], 77.0, tmp_path)
        assert plan.plan(["kernel_traffic"], folder=tmp_path)[0].seconds == 77  # its table is not there
        (tmp_path / "kernel_traffic.csv").touch()
        assert plan.plan(["kernel_traffic"], folder=tmp_path)[0].finished
        assert not plan.plan(["kernel_traffic"], redo=True, folder=tmp_path)[0].finished
