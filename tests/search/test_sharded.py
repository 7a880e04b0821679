"""The training set divided among processes: the answer is that of one process, ties included."""

import json

import numpy as np
import pytest
from processes import as_ranks, start_command, start_script

import diffmem
from diffmem.data import write_edm_zip
from diffmem.search import TrainingIndex

WORKER = """
import sys
import numpy as np
import torch.distributed as dist
from diffmem.search import ShardedIndex

dist.init_process_group("gloo")
images, queries, out = np.load(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3]
for k in (1, 2, 7):
    found = ShardedIndex(images, device="cpu").query(queries, k)
    np.savez(f"{out}/{dist.get_world_size()}-{dist.get_rank()}-{k}.npz", i=found.indices, d=found.squared_distances)
index = ShardedIndex(images, device="cpu")
assert index.holds(images) and not index.holds(images[::-1]) and not index.holds(images[:-1])
images[-1] = 255 - images[-1]  # the last rank's part only: all must say so
assert not index.holds(images)
tiny = ShardedIndex(images[:1], device="cpu").query(queries, 1)  # one of the ranks has nothing to search
assert (tiny.indices == 0).all() and len(tiny) == len(queries)
dist.destroy_process_group()
"""


def test_two_and_three_processes_answer_as_one(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 3, (101, 1, 3, 3), dtype=np.uint8)  # many ties and duplicates
    queries = random.integers(0, 3, (40, 1, 3, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "queries.npy", queries)
    for ranks in (2, 3):
        result = as_ranks(ranks, start_script, WORKER, tmp_path / "images.npy", tmp_path / "queries.npy", tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        for k in (1, 2, 7):
            expected = TrainingIndex(images).query(queries, k)
            for rank in range(ranks):
                with np.load(tmp_path / f"{ranks}-{rank}-{k}.npz") as found:
                    np.testing.assert_array_equal(found["i"], expected.indices)
                    np.testing.assert_array_equal(found["d"], expected.squared_distances)


def test_audit_by_two_ranks_just_works(tmp_path):
    """As torchrun starts them; the README's test runs torchrun itself."""
    digits = diffmem.load_images("builtin:digits")
    write_edm_zip(digits.select(slice(0, 301)), tmp_path / "training.zip")
    write_edm_zip(digits.select(slice(280, 340)), tmp_path / "generated.zip")
    arguments = ["audit", tmp_path / "generated.zip", tmp_path / "training.zip"]
    options = ["--flip", "--duplicate-radius", "3", "--json", "full", "--out", tmp_path / "report"]
    result = as_ranks(2, start_command, *arguments, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    one = diffmem.audit(tmp_path / "generated.zip", tmp_path / "training.zip", flip=True, duplicate_radius=3)
    assert json.loads(result.stdout) == json.loads(json.dumps(one.to_dict()))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.json",
        "samples.csv",
    ]

    mistaken = as_ranks(2, start_command, *arguments, "--resize", "0")
    assert mistaken.returncode != 0


def test_needs_a_process_group():
    from diffmem.search import ShardedIndex

    with pytest.raises(diffmem.InputError, match="torchrun"):
        ShardedIndex(np.zeros((3, 1, 2, 2), np.uint8))
