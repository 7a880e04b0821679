"""`diffmem emm` and `diffmem study` as a person runs them."""

import csv
import json
import re

import pytest
from studies.tiny import TINY

from diffmem.cli import _run, main
from diffmem.cli.terminal import signals
from diffmem.data import load_images, write_npz
from diffmem.studies import Setting
from diffmem.studies.presets import SCALES

TINY_RUN = [
    "--data", "builtin:digits", "--resize", "4", "--images", "48", "--num-channels", "4", "--channel-mult", "1",
    "--num-blocks", "1", "--precond", "edm", "--dropout", "0", "--batch", "8", "--lr", "1e-3", "--warmup-epochs", "0",
    "--samples", "20", "--snapshots", "2", "--solver", "unipc",
]  # fmt: skip


@pytest.fixture
def run(capfd, one_thread):
    """Runs a command in this process: (status, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def own_study(tmp_path):
    values = {
        "name": "rates",
        "title": "Learning rates",
        "factor": "learning rate",
        "setting": TINY.to_json(),
        "variants": [
            {"name": "slow"},
            {"name": "fast", "changes": {"training.lr": 1e-2}},
            {"name": "wrong", "changes": {"network.model_channels": 3}},
        ],
        "sizes": [20, 30],
        "claims": [{"text": "fast learning memorizes more", "higher": "fast", "lower": "slow"}],
    }
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(values))
    return path


def test_emm_searches_says_what_is_unresolved_and_goes_on_where_it_stopped(run, tmp_path):
    out = tmp_path / "emm"
    arguments = ["emm", *TINY_RUN, "--size-range", "20:80", "--max-runs", 2, "--out", out]
    status, stdout, stderr = run(*arguments, "--json")
    assert status == 0, stderr
    found = json.loads(stdout)
    assert [each["size"] % 10 for each in found["runs"]] == [0, 0]
    assert found["interval"][0] < found["emm"] < found["interval"][1]
    assert any("may lie below 20" in line for line in found["unresolved"])
    assert stderr.count("R_mem") == 2
    assert json.loads((out / "emm.json").read_text()) == found
    with (out / "runs.csv").open() as stream:
        assert [int(row["size"]) for row in csv.DictReader(stream)] == [each["size"] for each in found["runs"]]
    page = (out / "report.html").read_text()
    assert "Unresolved" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is fetched

    status, stdout, stderr = run(*arguments, "--dry-run")
    assert status == 0, stderr
    assert "sizes from 20 to 80, up to 5 runs per size and 2 in all" in stdout
    assert re.search(r"one full run: about [\d.]+ \w+ at N = 20, [\d.]+ \w+ at N = 80", stdout)
    assert json.loads((out / "emm.json").read_text()) == found  # nothing was run, and nothing written

    # Ends that are no multiples of the number of classes: the sizes within them that a search would try.
    status, stdout, stderr = run(*["3:79" if each == "20:80" else each for each in arguments], "--dry-run")
    assert status == 0, stderr
    assert "sizes from 10 to 70" in stdout

    arguments[arguments.index(2)] = 3
    status, stdout, stderr = run(*arguments)
    assert status == 0, stderr
    assert stderr.count("R_mem") == 1  # the first two are known
    assert "EMM at ζ = 0.1 is probably below 20, the smallest allowed size" in stdout
    assert "unresolved: " in stdout
    assert len(json.loads((out / "emm.json").read_text())["runs"]) == 3


def test_a_study_of_ones_own_from_run_to_report(run, own_study, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = run("study", "run", own_study, "--out", out)
    assert status == 1  # some runs failed, and the others are there
    assert "4 of 6 runs are done" in stdout
    assert stderr.count("R_mem") == 4
    assert "slow, N = 20, repetition 0: R_mem" in stderr
    assert "model_channels is 3" in stdout
    assert "Traceback" not in stderr
    page = (out / "report" / "report.html").read_text()
    for words in ("fast learning memorizes more", "model_channels is 3", "data:image/png", "training.lr"):
        assert words in page
    with (out / "report" / "runs.csv").open() as stream:
        assert [(row["variant"], row["size"]) for row in csv.DictReader(stream)] == [
            ("slow", "20"), ("slow", "30"), ("fast", "20"), ("fast", "30"),
        ]  # fmt: skip

    status, stdout, stderr = run("study", "run", own_study, "--out", out, "--sizes", "20")
    assert "R_mem" not in stderr  # nothing is run twice
    status, stdout, stderr = run("study", "report", "--runs", out, "--out", tmp_path / "elsewhere", "--json")
    assert status == 0, stderr
    (found,) = json.loads(stdout)
    assert [(cell["variant"], cell["size"]) for cell in found["cells"]] == [("slow", 20), ("fast", 20)]
    assert found["failures"][0]["variant"] == "wrong"
    assert (tmp_path / "elsewhere" / "report.html").exists()


def test_an_interrupted_study_says_what_is_left(own_study, tmp_path, monkeypatch, capfd):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffmem.studies.folder.run_studies", interrupted)
    with signals() as ending:  # `main` would end this process
        status = _run(["study", "run", str(own_study), "--out", str(tmp_path / "out")], ending)
    stderr = " ".join(capfd.readouterr().err.split())
    assert status == 130
    assert f"interrupted; finished runs stay in {tmp_path / 'out'}, and how far the others were" in stderr
    assert "the same command resumes them" in stderr


def test_list_and_show(run, own_study):
    status, stdout, _ = run("study", "list", "--json")
    assert status == 0
    listed = json.loads(stdout)
    names = [each["name"] for each in listed]
    assert all(set(each["runs"]) == set(each["core_seconds"]) == set(SCALES) for each in listed)
    assert listed[0]["core_seconds"]["digits"] > 0
    assert listed[0]["core_seconds"]["cifar10"] is None
    assert {"resolution", "classes", "diversity", "width", "depth", "embedding", "skips", "batch", "weight-decay"} <= {
        *names
    }
    status, stdout, _ = run("study", "show", own_study, "--sizes", "20", "--plan", "1,3")
    assert status == 1  # a network that cannot be
    status, stdout, stderr = run("study", "show", "ema", "--plan", "1,3")
    assert status == 0, stderr
    assert "12 distinct runs" in stdout
    assert "3 devices" in stdout
    status, stdout, _ = run("study", "show", "width", "--criterion", "m3", "--json")
    assert {each["setting"]["criterion"] for each in json.loads(stdout)["variants"]} == {"m3"}
    status, stdout, _ = run("study", "show", "width", "--scale", "cifar10", "--json")
    assert json.loads(stdout)["variants"][3]["setting"]["network"]["model_channels"] == 320


def test_a_home_folder_is_found_and_named_as_given(run, tmp_path, monkeypatch):
    """bash leaves ~ alone in --data=~/images.npz, and keys must not depend on whose home it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_npz(load_images("builtin:digits").select(range(20)), tmp_path / "images.npz")
    status, stdout, _ = run("study", "show", "size", "--scale", "cifar16", "--data=~/images.npz", "--json")
    assert status == 0
    setting = json.loads(stdout)["variants"][0]["setting"]
    assert setting["data"]["source"] == "~/images.npz"
    assert Setting.from_json(setting).training_set(10).image_shape == (1, 16, 16)
    assert run("study", "show", "size", "--data=~/none.npz")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["study", "run", "widht", "--out", "o"], 1, "no study 'widht': did you mean width? There are"),
        (
            ["study", "run", "width", "--epochs", "70", "--read-at", "500", "--sizes", "20", "--out", "o"],
            1,
            "read_at is 500 epochs, but runs of 4 channels, N = 20, are audited after",
        ),
        (["study", "report", "--runs", "."], 1, "no study was run there"),
        (["emm", *TINY_RUN, "--size-range", "20-50", "--out", "o"], 2, "not a range of sizes"),
        (["emm", *TINY_RUN, "--size-range", "20:5000", "--out", "o"], 1, "1,740 images in equal numbers"),
        (["emm", *TINY_RUN, "--half-width", "x", "--out", "o"], 2, "not a share"),
        (["emm", *TINY_RUN, "--criterion", "c_t", "--out", "o"], 1, "--criterion c_t decides about no single image"),
        (["emm", "--data", "builtin:digits", "--out", "o"], 1, "exactly one of --images N, --epochs N and --dur"),
    ],
)
def test_mistakes_end_in_one_line(arguments, status, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended, _, stderr = run(*arguments)
    assert ended == status
    assert words in " ".join(stderr.replace("│", " ").split())
    assert "Traceback" not in stderr
