"""The numbers that the README of the committed studies quotes are those of the data beside it."""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"


def test_the_readme_quotes_the_data():
    text = (FOLDER / "README.md").read_text()
    page = (FOLDER / "report.html").read_text()
    spread = re.search(r"standard deviation of ([0-9.]+) in logit R_mem", page)[1]
    assert f"({spread} in logit R_mem)" in text
    cells = {
        (study["study"]["name"], cell["variant"], cell["size"]): cell
        for study in json.loads((FOLDER / "studies.json").read_text())
        for cell in study["cells"]
    }
    for key, words in (
        (("size", "reference", 30), "{:.1%} of two"),
        (("conditioning", "no labels", 30), "{:.1%} of three"),
    ):
        assert words.format(cells[key]["r_mem"]).replace("%", " %") in text
        assert len(cells[key]["runs"]) == {"two": 2, "three": 3}[words.split()[-1]]
    found = json.loads((FOLDER / "emm.json").read_text())
    assert f"{found['emm']:.0f} ({found['interval'][0]:.0f} to {found['interval'][1]:.0f}) by the search" in text
