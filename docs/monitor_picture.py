"""Makes images/monitor-looks.png: what the monitor of examples/watch_training.ipynb shows after some of its looks.

python docs/monitor_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path

from diffmem.plotting import plot

DOCS = Path(__file__).parent
LOOKS = (0, 1, 3, 5)  # after 1, 2, 4 and 6 epochs


def main() -> None:
    notebook = json.loads((DOCS.parent / "examples" / "watch_training.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = []
    names = {"__name__": "__main__", "keep": lambda result: pictures.append(result.picture())}
    exec(code[0], names)
    exec(code[1].replace("samples=64", "samples=64, loggers=keep"), names)
    exec(code[2], names)
    with plot(7.2, 4.6) as figure:
        for axes, look in zip(figure.subplots(1, len(LOOKS)), LOOKS, strict=True):
            result = names["monitor"].results[look]
            axes.imshow(pictures[look], interpolation="nearest")
            axes.axis("off")
            axes.set_title(f"{look + 1} epoch{'s' if look else ''}: R_mem {result.ratio:.0%}", fontsize=9)
        figure.savefig(DOCS / "images" / "monitor-looks.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
