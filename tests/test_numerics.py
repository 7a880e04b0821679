"""The rule of numerics.py refuses what it should, and is the only one that tests of ops, samplers and networks have."""

import re
from pathlib import Path

import numerics
import pytest
import torch

TESTS = Path(__file__).parent
ROOMS = ("ops", "models", "sampling", "optimum", "training", "gpu")
OWN = re.compile(r"\b[ra]tol\s*=|\bfinfo\b|\.norm\(\) *<|\.norm\(\) */")


def test_twice_the_error_of_pytorch_and_a_floor():
    exact = torch.linspace(-1, 2, 7, dtype=torch.float64)
    plain = exact.float()
    plain[3] += 1e-3
    floor = numerics.FLOORS["attention"] * torch.finfo(torch.float32).eps * 2
    for norm in (False, True):
        error = numerics._size(plain - exact, norm)
        for factor, good in ((1.9, True), (2.1, False)):
            found = exact.float()
            found[5] += factor * error * (7**0.5 if norm else 1)
            if good:
                numerics.assert_as_exact("attention", found, plain, exact, norm=norm)
            else:
                with pytest.raises(AssertionError, match="attention, result 0"):
                    numerics.assert_as_exact("attention", found, plain, exact, norm=norm)
    found = exact.float()
    found[0] += 0.9 * floor
    numerics.assert_as_exact("attention", [found], [exact.float()], [exact])
    numerics.assert_rounded("attention", found, exact)
    found[0] += 0.9 * floor
    with pytest.raises(AssertionError, match="result 1"):
        numerics.assert_as_exact("attention", [exact.float(), found], [exact.float()] * 2, [exact] * 2)
    with pytest.raises(AssertionError):
        numerics.assert_rounded("attention", found, exact)
    numerics.assert_as_exact("attention", found, exact.float(), exact, rounding=numerics.TF32)


@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_passes(hole):
    exact = torch.ones(3, dtype=torch.float64)
    found = exact.float()
    found[1] = hole
    for plain in (exact.float(), found):
        with pytest.raises(AssertionError):
            numerics.assert_as_exact("attention", found, plain, exact)
    with pytest.raises(AssertionError):
        numerics.assert_rounded("attention", found, exact)
    with pytest.raises(AssertionError):
        numerics.assert_relative("a network, golden", found[None], exact[None])


def test_tests_have_no_tolerances_of_their_own_and_use_all_of_the_table():
    sources = {path: path.read_text() for room in ROOMS for path in sorted((TESTS / room).glob("*.py"))}
    assert len(sources) > 20
    own = [
        f"{path.name}: {line.strip()}"
        for path, text in sources.items()
        for line in text.splitlines()
        if OWN.search(line)
    ]
    assert own == []
    everything = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path.name != "numerics.py")
    for name in (*numerics.FLOORS, *numerics.CLOSE, *numerics.RELATIVE):
        assert f'"{name}"' in everything or name.startswith(("losses of a device", "the optimal denoiser on a")), name
