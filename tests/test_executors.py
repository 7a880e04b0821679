"""Processes of this machine: that they are the same program as this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
from diffmem.executors import Processes

def module(name, device):
    return __import__(name).__file__

if __name__ == "__main__":
    executor = Processes(1)
    print(executor.submit(module, "diffmem").result())
    executor.close()
    assert "PYTHONSAFEPATH" not in os.environ
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 looks in the current folder first")
def test_workers_import_no_package_of_the_current_folder(tmp_path):
    """As where the project was cloned: a folder that has the package's name."""
    here, script = tmp_path / "here", tmp_path / "elsewhere" / "script.py"
    (here / "diffmem").mkdir(parents=True)
    (here / "diffmem" / "__init__.py").write_text("raise SystemExit('another diffmem')")
    script.parent.mkdir()
    script.write_text(SCRIPT)
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, script], cwd=here, env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "diffmem" / "__init__.py"
