"""The mixed model of all runs of a study, by statsmodels: a comparison for the verdicts, and where spread is from.

Logit R_mem of a run is taken as a mean of its cell (variant × size), plus what its repetition has in common, plus what
its repetition and size have in common, plus its own; the noise of sampling is in the last. Where all runs are there the
errors of differences between variants are those of `diffmem.studies.analysis` before it looks at the question's own
pairs. Where the model finds no variance of repetition and size, it counts the sizes as independent, and its errors are
up to a tenth smaller; it gives no degrees of freedom. So verdicts do not rest on it, and need no extra.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.errors import InputError, MissingExtraError
from diffmem.studies.analysis import Cells, Effect, logit_of
from diffmem.studies.study import Place


@dataclass(frozen=True)
class MixedModel:
    """A fitted model.

    Attributes:
        repetition: Standard deviation of what runs of one repetition have in common, in logit R_mem.
        repetition_size: Of what those of one repetition and size have in common; None where there is one size.
        run: Of the rest.
        places: The cells.
        means: Of each, its mean.
        covariances: Of the means, [cells, cells].
    """

    repetition: float
    repetition_size: float | None
    run: float
    places: tuple[Place, ...]
    means: np.ndarray
    covariances: np.ndarray

    def effect(self, weights: Mapping[Place, float], freedom: float) -> Effect:
        """A contrast (`Study.contrast`), with degrees of freedom from elsewhere."""
        w = np.array([weights.get(place, 0.0) for place in self.places])
        return Effect(float(w @ self.means), math.sqrt(float(w @ self.covariances @ w)), freedom)

    def to_json(self) -> dict[str, Any]:
        """The spread as plain JSON values."""
        return {"repetition": self.repetition, "repetition_size": self.repetition_size, "run": self.run}


def mixed_model(cells: Cells) -> MixedModel:
    """Fits the model to all results of a study, by restricted maximum likelihood.

    Raises:
        MissingExtraError: statsmodels is not installed.
        InputError: The runs are too few, or the fit is singular.
    """
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec
    except ImportError:
        raise MissingExtraError("statsmodels", "studies", "the mixed model of a study") from None
    places = tuple(cells)
    rows = [
        (repetition, index, logit_of(result)[0])
        for index, place in enumerate(places)
        for repetition, result in cells[place].items()
    ]
    rows.sort(key=lambda row: row[0])
    repetitions = sorted({row[0] for row in rows})
    sizes = sorted({size for _, size in places})
    if len(repetitions) < 2 or len(rows) < len(places) + len(repetitions):
        raise InputError("the mixed model of a study needs two repetitions or more, and more runs than cells")
    design = np.zeros((len(rows), len(places)))
    design[np.arange(len(rows)), [row[1] for row in rows]] = 1
    specification = None
    if len(sizes) > 1:
        at = [[sizes.index(places[row[1]][1]) for row in rows if row[0] == r] for r in repetitions]
        matrices = [np.eye(len(sizes))[each] for each in at]
        names = [[f"{size}" for size in sizes]] * len(repetitions)
        specification = VCSpec(["size"], [names], [matrices])
    y, groups = np.array([row[2] for row in rows]), np.array([row[0] for row in rows])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of variances at zero, which are as good as others
            model = MixedLM(y, design, groups=groups, exog_re=np.ones((len(rows), 1)), exog_vc=specification)
            fit = model.fit(reml=True, method=["powell", "lbfgs"])
            covariances = np.asarray(fit.cov_params())[: len(places), : len(places)]
    except (np.linalg.LinAlgError, ValueError) as error:
        raise InputError(f"the mixed model of a study cannot be fitted to these runs ({error})") from None
    return MixedModel(
        math.sqrt(max(0.0, float(np.asarray(fit.cov_re)[0, 0]))),
        None if specification is None else math.sqrt(max(0.0, float(fit.vcomp[0]))),
        math.sqrt(float(fit.scale)),
        places,
        np.asarray(fit.fe_params),
        covariances,
    )
