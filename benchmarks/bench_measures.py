"""Measures of copying: `diffmem.measure` against the peers' code, and against the computation that their code makes.

On the golden sets (tests/golden/criteria) and on 10,000 × 50,000 images of CIFAR-10 where its archives lie in
../shared/data, else patches. torchmetrics, prdc and sdmetrics are used where they are installed; dgm-eval, fld and the
code of C_T are no packages, so what they compute is written out here as they do it: `torch.cdist` of all pairs, and
scikit-learn's NearestNeighbors. Where a matrix of all pairs does not fit into memory there is no row of theirs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import diffmem
from benchmarks.bench_nearest import pictures
from benchmarks.harness import Bench, Contender

MINUTES = 15
GOLDEN = Path(__file__).parents[1] / "tests/golden/criteria"
LARGEST_MATRIX = 1 << 27  # pairs of float32 distances that a peer may hold at once


def run(bench: Bench) -> None:
    for name in ("digits_planted", "features_honest"):
        with np.load(GOLDEN / f"{name}.npz") as sets:
            vectors = [sets[each].reshape(len(sets[each]), -1) for each in ("generated", "training", "test")]
        against_peers(bench, name, *(each.astype(np.float32) for each in vectors))
    training, queries, name = pictures(50_000 // (20 if bench.quick else 1), 10_000 // (20 if bench.quick else 1))
    against_audit(bench, f"{name}, all measures", queries, training)
    against_peers(bench, f"{name}, 10,000 x 50,000", queries, training, queries[: len(queries) // 2], repeats=1)


def against_audit(bench: Bench, workload: str, generated: np.ndarray, training: np.ndarray) -> None:
    """All measures in times of the plain audit: at most four."""
    if not bench.wants(workload):
        return
    side = int(np.sqrt(training.shape[1] // 3))
    images = [np.ascontiguousarray(each).reshape(len(each), 3, side, side) for each in (generated, training)]
    contenders = [
        Contender("diffmem.audit", lambda: diffmem.audit(*images)),
        Contender("diffmem.measure", lambda: diffmem.measure(*images), "all that need no holdout set"),
    ]
    bench.compare(workload, contenders, repeats=3)


def against_peers(
    bench: Bench, workload: str, generated: np.ndarray, training: np.ndarray, holdout: np.ndarray, repeats: int = 5
) -> None:
    """Each measure that a peer computes."""
    pairs = len(training) * max(len(training), len(generated))
    for measure, peers in _peers(generated, training, holdout).items():
        ours = Contender("diffmem", lambda measure=measure: _ours(measure, generated, training, holdout))
        fitting = [peer for peer, whole in peers if not whole or pairs <= LARGEST_MATRIX]
        bench.compare(f"{workload}, {measure}", [ours, *fitting], _agree, repeats)


def _ours(measure: str, generated: np.ndarray, training: np.ndarray, holdout: np.ndarray) -> float:
    needs_holdout = measure in ("c_t_global", "dcr_closer_to_training")
    return diffmem.measure(generated, training, holdout if needs_holdout else None, measures=measure)[measure]


def _agree(answers: dict[str, Any]) -> None:
    ours = answers["diffmem"]
    for name, value in answers.items():
        if abs(value - ours) > 1e-5 * max(1, abs(ours)):
            raise AssertionError(f"{name} gives {value}, diffmem {ours}")


def _peers(generated: np.ndarray, training: np.ndarray, holdout: np.ndarray) -> dict[str, list[tuple[Contender, bool]]]:
    """By the name of our value: contenders, and whether they hold a matrix of all pairs."""
    floats = [each.astype(np.float32) for each in (generated, training, holdout)]
    ours, real, unseen = (torch.from_numpy(each) for each in floats)
    peers: dict[str, list[tuple[Contender, bool]]] = {
        "authenticity": [
            (Contender("torch.cdist", lambda: _authenticity(ours, real), "as dgm-eval and fld"), True),
        ],
        "c_t_global": [
            (Contender("scikit-learn neighbors", lambda: _z(*floats), "as the code of C_T", "scikit-learn"), False),
        ],
        "mifid_distance_generated": [
            (Contender("cosine of all pairs", lambda: _cosine(ours.double(), real.double()), "as Kaggle's code"), True),
        ],
        "dcr_closer_to_training": [
            (Contender("torch.cdist", lambda: _closer(ours, real, unseen)), True),
        ],
    }
    if (torchmetrics := _package("torchmetrics.image.mifid")) is not None:
        found = torchmetrics._compute_cosine_distance

        def theirs() -> float:
            return float(found(ours.double(), real.double(), cosine_distance_eps=1.0 + 1e-9))

        peers["mifid_distance_generated"].append(
            (Contender("torchmetrics", theirs, "sets exchanged", "torchmetrics"), True)
        )
    if (prdc := _package("prdc")) is not None:
        sets = {"real_features": floats[1], "fake_features": floats[0], "nearest_k": 5}
        peers["density"] = [(Contender("prdc", lambda: float(prdc.compute_prdc(**sets)["density"]), "", "prdc"), True)]
    return peers


def _package(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _authenticity(generated: torch.Tensor, training: torch.Tensor) -> float:
    within = torch.cdist(training, training).fill_diagonal_(torch.inf).min(dim=0).values
    nearest = torch.cdist(training, generated).min(dim=0)
    return float((within[nearest.indices] < nearest.values).double().mean())


def _z(generated: np.ndarray, training: np.ndarray, holdout: np.ndarray) -> float:
    from scipy.stats import mannwhitneyu
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=1).fit(training)
    ours, theirs = (index.kneighbors(each)[0].ravel() for each in (generated, holdout))
    m, n = len(ours), len(theirs)
    u = mannwhitneyu(ours, theirs, alternative="less").statistic
    return float((u - (n * m / 2 - 0.5)) / np.sqrt(n * m * (n + m + 1) / 12))


def _cosine(generated: torch.Tensor, training: torch.Tensor) -> float:
    unit = [each / each.norm(dim=1, keepdim=True) for each in (generated, training)]
    return float((1 - (unit[0] @ unit[1].T).abs()).min(dim=1).values.mean())


def _closer(generated: torch.Tensor, training: torch.Tensor, holdout: torch.Tensor) -> float:
    to_training, to_holdout = (torch.cdist(generated, each).min(dim=1).values for each in (training, holdout))
    return float((to_training < to_holdout).double().mean())
