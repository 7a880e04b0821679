"""Many workers, some of which die: the index is the one that a single process makes."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from indexes.conftest import write_tar
from processes import Started, as_ranks, free_port, start_command

import diffmem
from diffmem.errors import InputError, OutputInUseError
from diffmem.executors import Processes
from diffmem.indexes import build_index, verify_index, work
from diffmem.indexes.build import Settings
from diffmem.indexes.planning import resident
from diffmem.search import find_duplicates

NETWORK = "features.pt"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight tars of 40 images each, and a network."""
    import torch

    folder = tmp_path_factory.mktemp("workers")
    images = np.random.default_rng(4).integers(0, 256, (320, 3, 16, 16), dtype=np.uint8)
    images[200] = images[10]
    for number in range(8):
        write_tar(folder / f"{number}.tar", images[number * 40 : number * 40 + 40])
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 12)
    network = torch.nn.Sequential(*layers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 16, 16)), folder / NETWORK)
    return folder


OPTIONS = {"preprocessing": "-1-1", "batch": 16}


def built(source, out, **options):
    features = f"torchscript:{source / NETWORK}"
    return build_index([source / "{0..7}.tar"], out, features, **OPTIONS, **options)


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The index that one process makes."""
    return everything(built(source, tmp_path_factory.mktemp("alone") / "index", workers=1))


def everything(index):
    found = index.duplicates
    rows = [shard.vectors.tobytes() for shard in index.shards]
    return index.fingerprint, rows, list(index.names), found.members.tolist(), found.roots.tolist()


def finished(out):
    return len(list(Path(out).glob("shards/*/shard.json")))


def test_one_of_several_processes_is_killed(source, alone, tmp_path):
    executor = Processes(2, threads=1)

    def kill():
        while finished(tmp_path / "index") < 2:
            time.sleep(0.01)
        os.kill(executor._processes[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        index = built(source, tmp_path / "index", executor=executor)
    finally:
        executor.close()
        thread.join()
    assert everything(index) == alone
    assert alone[3] == [10, 200]  # duplicates in different shards, of images
    assert not [name for name in os.listdir(index.path / "shards") if name.startswith(".")]


def slow_command(source, out):
    """`diffmem index build`, each shard taking a little longer."""
    original = work._make

    def slow(*arguments):
        time.sleep(0.3)
        return original(*arguments)

    work._make = slow
    built(source, out, workers=1)


def test_a_killed_build_continues_and_two_at_once_are_told_apart(source, alone, tmp_path):
    out = tmp_path / "index"
    with Started(slow_command, [source, out]) as process:
        while finished(out) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        with pytest.raises(OutputInUseError, match="is writing there: wait for it to end"):
            built(source, out)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with pytest.raises(InputError, match="its build has not ended"):
        diffmem.open_index(out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shards/*/shard.json")}
    assert 3 <= len(before) < 8
    (out / "shards" / f".{'0' * 32}.00000000.partial").mkdir()
    assert everything(built(source, out, workers=1)) == alone
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [name for name in os.listdir(out / "shards") if name.startswith(".")]


def test_ranks_of_torchrun_share_the_work_and_one_may_die(source, alone, tmp_path):
    words = ["index", "build", str(source / "{0..7}.tar")]
    options = ["--features", f"torchscript:{source / NETWORK}", "--preprocessing", "-1-1", "--batch", 16]
    done = as_ranks(2, start_command, *words, tmp_path / "both", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 320
    assert everything(diffmem.open_index(tmp_path / "both")) == alone

    done = as_ranks(2, dying_rank, str(source), str(tmp_path / "one"))
    assert done.returncode != 0
    assert "another rank has ended" in done.stderr, done.stderr
    assert finished(tmp_path / "one") == 5  # four of the first rank, one of the other
    assert everything(built(source, tmp_path / "one", workers=1)) == alone


def dying_rank(source, out, **options):
    return Started(_dying_rank, [source, out], **options)


def _dying_rank(source, out):
    from diffmem.cli.distributed import process_group
    from diffmem.executors import Ranks

    original = work._make

    def make(job, *arguments):
        if os.environ["RANK"] == "1" and work.made:
            os.kill(os.getpid(), signal.SIGKILL)
        work.made = True
        return original(job, *arguments)

    work.made, work._make = False, make
    try:
        with process_group():
            built(Path(source), Path(out), executor=Ranks())
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


class Node:
    """One `ray start`, with its own session of processes, which ends with it."""

    def __init__(self, *words, env):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
        ports = ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", str(free_port())]
        self.process = subprocess.Popen(
            [*command, *ports, "--object-store-memory", "80000000", *words],
            env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self):
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                return
        pytest.fail(f"ray start: {''.join(said)}")

    def workers(self):
        """Processes that make a shard."""
        session = str(self.process.pid)
        listed = subprocess.run(["pgrep", "-s", session, "-f", "ray::_run_on_cluster"], capture_output=True, text=True)
        return [int(process) for process in listed.stdout.split()]

    def end(self):
        while left := subprocess.run(["pgrep", "-s", str(self.process.pid)], capture_output=True, text=True).stdout:
            for process in left.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            self.process.poll()
        self.process.stdout.close()


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes by `ray start`, with one CPU each, which wants to see a token."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    nodes = []
    # For sockets, whose names are short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as home:
        head = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false", "--temp-dir", home]
        try:
            nodes.append(Node(*head, "--node-ip-address", "127.0.0.1", env=env))
            nodes.append(Node("--address", address, "--node-ip-address", "127.0.0.1", env=env))
            for node in nodes:
                node.wait()
            yield address, *nodes
        finally:
            for node in reversed(nodes):
                node.end()


def test_a_ray_cluster_has_a_slow_worker_and_loses_one_and_a_node(source, alone, tmp_path, cluster):
    address, head, node = cluster
    out = tmp_path / "index"
    words = ["index", "build", source / "{0..7}.tar", out, "--features", f"torchscript:{source / NETWORK}"]

    def until(holds):
        while not (found := holds()) and build.poll() is None:
            time.sleep(0.02)
        assert found, build.communicate()
        return found

    with start_command(*words, "--preprocessing", "-1-1", "--batch", 16, "--ray", address, "--json") as build:
        slow = until(node.workers)[0]
        os.kill(slow, signal.SIGSTOP)
        before = finished(out)
        until(lambda: finished(out) >= before + 2)  # the other worker goes on
        os.kill(slow, signal.SIGCONT)
        os.kill(until(head.workers)[0], signal.SIGKILL)
        until(lambda: finished(out) >= before + 3)
        node.end()
        out_text, errors = build.communicate()
    assert build.returncode == 0, errors
    assert json.loads(out_text)["rows"] == 320
    assert everything(diffmem.open_index(out)) == alone
    assert not [name for name in os.listdir(out / "shards") if name.startswith(".")]


def test_shards_are_verified_and_compared_by_several_processes(tmp_path):
    rng = np.random.default_rng(8)
    images = rng.integers(0, 256, (120, 1, 6, 6), dtype=np.uint8)
    for one, other in ((3, 110), (110, 45), (10, 11), (12, 70)):
        images[other] = np.clip(images[one].astype(int) + rng.integers(-2, 3, images[one].shape), 0, 255)
    np.save(tmp_path / "images.npy", images)
    expected = find_duplicates(images, 2)
    executor = Processes(2, threads=1)
    try:
        index = build_index(
            tmp_path / "images.npy", tmp_path / "index", duplicate_radius=2, shards=6, executor=executor
        )
        assert index.duplicates.as_groups().group_of.tolist() == expected.group_of.tolist()
        settings = Settings(executor=executor, say=lambda line: None)
        assert verify_index(index.path, settings=settings).intact
        for number, name in ((1, "digests.npy"), (4, "vectors.npy")):
            path = index.shards[number].folder / name
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        (index.shards[2].folder / "shard.json").unlink()
        found = verify_index(index.path, settings=settings)
        assert found == verify_index(index.path)  # in this process
        assert [address for address, _, _ in found.damaged] == [index.shards[n].address for n in (1, 2, 4)]
        assert verify_index(index.path, rebuild=True, settings=settings).rebuilt
    finally:
        executor.close()
    assert verify_index(index.path).intact


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_copy_of_a_shard_may_be_faster(shards, tmp_path, monkeypatch, fails):
    """A worker that was taken for lost, and lives on where there are no locks."""
    original = work._make

    def make(job, folder, device):
        found = original(job, folder, device)
        shutil.copytree(folder, job.target)
        if fails:
            raise InputError("the folder is not there any more")
        return found

    monkeypatch.setattr(work, "_make", make)
    twice = build_index(shards, tmp_path / "twice", workers=1)
    monkeypatch.undo()
    assert everything(twice) == everything(build_index(shards, tmp_path / "once", workers=1))
    assert len(os.listdir(twice.path / "shards")) == 3


def _measured(file, out):
    said = []
    before = resident()
    build_index(file, out, "precomputed", memory="480MB", shards=1, workers=1, say=said.append)
    status = Path("/proc/self/status").read_text()
    print(json.dumps([before, int(status.partition("VmHWM:")[2].split()[0]) * 1024, said]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the highest use of memory is read from /proc")
def test_a_worker_holds_no_more_than_it_said(tmp_path):
    block = np.random.default_rng(6).normal(size=(1000, 1024)).astype(np.float32)
    with open(tmp_path / "large.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (24_000, 1024)})
        for number in range(24):
            (block + np.float32(number)).tofile(file)
    with Started(_measured, [str(tmp_path / "large.npy"), str(tmp_path / "index")]) as process:
        out, err = process.communicate()
    before, peak, said = json.loads(out)
    line = next(each for each in said if each.startswith("memory: at most "))
    planned = float(line.split()[3]) * 1e6
    assert peak < planned <= 480e6, (peak, line, err)
    assert peak - before < 60e6 < 0.7 * 24_000 * 1024 * 4, (before, peak)  # a block, and not the file
