"""Tile maximum (Carlini et al. 2023): the largest distance over corresponding tiles, least over the training images.

Formula. Images are cut into non-overlapping square tiles, all channels together; with x_t the values of tile t,

    tile_max(x) = min over training images y of max over tiles t of ‖x_t − y_t‖.

`tile_max` is its mean, `tile_max_median` the median (Euclidean distances, not divided by √values), `tile_max_below_10`
the share at most 10 gray levels, root mean square over a tile. The tile's side is a quarter of the image's shorter
side, at least 4 pixels; choose another by settings={"tile_max": {"tile": 128}}. Where it does not divide a side the
last tile is narrower. Ties go to the lower training index; exact in integers for uint8 images.

Source: Carlini et al., Extracting Training Data from Diffusion Models (arXiv 2301.13188), section 4.2: tiles of 128²
pixels at 512². There, two *generated* images are linked where the tile maximum between them is at most δ = 0.15 (root
mean square on values from 0 to 1), and an image is extracted where it is in a clique of at least 10 of the 500 images
of one prompt. `tile_max:cliques`, by its full name, is the share of generated images in such cliques; images of one
cell of `cells` are those of one prompt, and without cells all are.

What it cannot see: copies that are shifted by a pixel where there is texture, mirrored, or changed in a single tile.
The measure was made against false alarms on images with one large background, and pays with those.
"""

from __future__ import annotations

import numpy as np

from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.memorization.criteria.comparison import Comparison
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant
from diffmem.search.bounds import LowerBounds
from diffmem.search.index import TrainingIndex
from diffmem.search.rows import as_rows
from diffmem.search.tiles import cut_tiles, nearest_by_tiles, squared_tile_maxima

TILES = 4  # along a side, in the source
SMALLEST = 4  # pixels
GUESSES = 8  # nearest training images that begin the search
BELOW = 10.0  # gray levels
LINKED = 0.15
CLIQUE = 10
BLOCK = 512
MOST_STEPS = 200_000  # of the search for cliques in one group


def tile_side(height: int, width: int) -> int:
    """The tile's side in pixels: a quarter of the image's shorter side, at least 4."""
    return max(SMALLEST, min(height, width) // TILES)


def _tile(comparison: Comparison) -> int:
    height, width = comparison.training.values.shape[2:]
    tile = comparison.setting("tile_max", "tile", tile_side(height, width))
    if not isinstance(tile, int) or tile < 1:
        raise InputError(f"tile_max: tile must be a number of pixels, at least 1, got {tile!r}")
    return tile


def measure(comparison: Comparison) -> Measured:
    """`tile_max`, `tile_max_median` and `tile_max_below_10`."""
    training, searches, tile = comparison.training, comparison.searches, _tile(comparison)
    squared, nearest = nearest_by_tiles(
        comparison.generated.values,
        training.values,
        tile,
        comparison.nearest(GUESSES).indices,
        searches.index(training),
        progress=searches.progress,
    )
    distances = np.sqrt(squared.astype(np.float64))
    below = squared <= BELOW**2 * training.values.shape[1] * tile**2
    values = {
        "tile_max": float(distances.mean()),
        "tile_max_median": float(np.median(distances)),
        "tile_max_below_10": float(below.mean()),
    }
    per_image = {"tile_max": distances, "tile_max_nearest": nearest, "tile_max_below_10": below}
    return Measured(values, per_image, {"tile_max": "tile_max", "tile_max_below_10": "tile_max_below_10"})


def links(images: np.ndarray, tile: int, squared_limit: float) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of images whose squared tile maximum is at most the limit."""
    rows, tiles = as_rows(images), cut_tiles(images, tile)
    bounds = LowerBounds(TrainingIndex(images), rows)
    found: list[tuple[int, int]] = []
    for start in range(0, len(images), BLOCK):
        part = slice(start, start + BLOCK)
        limit = torch.full((len(rows[part]),), float(squared_limit) * tiles.shape[1], dtype=torch.float64)
        some, others = torch.nonzero(bounds.may_be_within(part, slice(0, len(rows)), limit), as_tuple=True)
        later = others > some + start
        some, others = some[later] + start, others[later]
        near = squared_tile_maxima(tiles, tiles, some, others) <= squared_limit
        found += zip(some[near].tolist(), others[near].tolist(), strict=True)
    return found


def in_cliques(count: int, edges: list[tuple[int, int]], size: int = CLIQUE) -> np.ndarray:
    """bool [count]: which vertices of a graph are in a clique of at least `size` vertices.

    Raises:
        InputError: The graph is so dense that this cannot be decided.
    """
    import networkx

    graph = networkx.Graph(edges)
    graph = networkx.k_core(graph, size - 1)  # a clique's vertices have so many neighbors among themselves
    found = np.zeros(count, bool)
    for steps, clique in enumerate(networkx.find_cliques(graph)):
        if len(clique) >= size:
            found[clique] = True
        if found.sum() == len(graph):
            break
        if steps >= MOST_STEPS:
            raise InputError("tile_max:cliques: too many images are linked: choose a smaller delta")
    return found


def measure_cliques(comparison: Comparison) -> Measured:
    """`tile_max:cliques`."""
    generated, tile = comparison.generated, _tile(comparison)
    delta = comparison.setting("tile_max", "delta", LINKED)
    scale = 255 if comparison.integer else 1
    limit = (delta * scale) ** 2 * generated.values.shape[1] * tile**2
    groups = np.zeros(len(generated), np.int64) if generated.cells is None else generated.cells
    extracted = np.zeros(len(generated), bool)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        edges = links(generated.values[members], tile, limit) if len(members) > 1 else []
        size = comparison.setting("tile_max", "clique", CLIQUE)
        extracted[members] = in_cliques(len(members), edges, size)
    name = "tile_max:cliques"
    return Measured({name: float(extracted.mean())}, {name: extracted}, {name: name})


TILE_MAX = Criterion(
    name="tile_max",
    formula="min over training images of the largest Euclidean distance over corresponding tiles",
    source="Carlini et al. 2023, arXiv 2301.13188",
    values={
        "tile_max": Value("mean", "higher"),
        "tile_max_median": Value("median", "higher"),
        "tile_max_below_10": Value("share at most 10 gray levels (rms over a tile)", "lower", True),
    },
    measure=measure,
    decides=("tile_max_below_10", True),
    blind="copies that are shifted, mirrored, or changed in one tile",
    needs=("images",),
    neighbors=GUESSES,
    variants={
        "cliques": Variant(
            Value("share of images in cliques of 10 linked generated images (δ = 0.15)", "lower", True),
            measure_cliques,
            "Carlini et al. 2023",
            ("images",),
        )
    },
)
