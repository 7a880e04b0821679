"""A little of `fuzz.py`: changed files end in a declared error or are read, in bounded time and memory."""

from inert import fuzz


def test_changed_files():
    found = fuzz.run(300, 0.0, seed=1)
    assert not found.wrong, found.wrong[0]
    assert found.intact == len(fuzz.seeds()), "a file that nobody changed was not read"
    assert found.read > 5
    assert found.refused > 50
    assert found.slowest < 10
    assert found.memory < fuzz.MEMORY
