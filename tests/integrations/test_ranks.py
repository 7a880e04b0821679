"""Two ranks (gloo): counts are summed, a look is shared, a failure on one rank is every rank's, and a stop reaches all.

One pair of processes for all frameworks, which take seconds to import.
"""

import importlib.util
from pathlib import Path

import pytest
from processes import as_ranks, start_script

HERE = Path(__file__).parent
FRAMEWORKS = [name for name in ("torchmetrics", "lightning", "accelerate") if importlib.util.find_spec(name)]


@pytest.mark.skipif(not FRAMEWORKS, reason="none of the extras torchmetrics, lightning and diffusers is installed")
def test_two_ranks(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import rank_checks; rank_checks.run(sys.argv[3], sys.argv[4:])"
    result = as_ranks(2, start_script, code, HERE, HERE.parent, tmp_path, *FRAMEWORKS)
    assert result.returncode == 0, result.stderr[-3000:]
    done = {f"{name} {rank}" for name in ("monitor", *FRAMEWORKS) for rank in range(2)}
    assert {path.name for path in tmp_path.iterdir()} == done
