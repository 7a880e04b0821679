"""What a study is: a grid of trials, each with its place in a figure, and what the paper says of the outcome."""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.studies.trial import Setting, Trial


@dataclass(frozen=True)
class Variant:
    """One level of the factor: its name, and what it changes.

    Attributes:
        name: For the report.
        setting: All of it but sizes and repetitions.
        x: Where it stands on an axis; None where levels have no order.
        sizes: Training-set sizes; None for the study's.
    """

    name: str
    setting: Setting
    x: float | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Claim:
    """A direction that the paper reports: R_mem under the variant `higher` is above that under `lower`.

    Attributes:
        text: The paper's finding in words.
        higher: A variant's name.
        lower: Another's.
        sizes: At which N; None: wherever both were measured.
        about_equal: The paper finds no difference worth speaking of.
    """

    text: str
    higher: str
    lower: str
    sizes: tuple[int, ...] | None = None
    about_equal: bool = False


@dataclass(frozen=True)
class Study:
    """A grid: every variant at every size, `repetitions` times.

    Attributes:
        name: For the command line.
        title: For the report.
        factor: What the variants are levels of.
        variants: Its levels.
        sizes: N, training-set sizes.
        repetitions: Runs per cell.
        axis: Axis of the figure, "size" (a curve of R_mem over N per variant) or "factor" (a curve over the factor per
            size).
        log_axis: Whether the factor's axis is logarithmic.
        claims: What the paper reports.
        published: The key of `published.json` that holds the paper's numbers.
        notes: What a reader should know, one line each.
    """

    name: str
    title: str
    factor: str
    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    repetitions: int = 1
    axis: str = "size"
    log_axis: bool = False
    claims: tuple[Claim, ...] = ()
    published: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise InputError(f"study {self.name}: two variants have one name")
        if not names or self.repetitions < 1 or not (self.sizes or all(v.sizes for v in self.variants)):
            raise InputError(f"study {self.name}: needs variants, sizes and repetitions, at least one of each")
        if self.axis not in ("size", "factor"):
            raise InputError(f"study {self.name}: axis is {self.axis!r}, but must be 'size' or 'factor'")
        for claim in self.claims:
            if unknown := {claim.higher, claim.lower} - set(names):
                raise InputError(f"study {self.name}: a claim names {', '.join(unknown)}, which is not a variant")

    def trials(self) -> list[Trial]:
        """All trials, the first repetitions of everything first."""
        return [trial for _, trial in self.cells()]

    def cells(self) -> list[tuple[Variant, Trial]]:
        """Each trial with its variant, in the order of `trials`."""
        return [
            (variant, Trial(variant.setting, size, repetition))
            for repetition in range(self.repetitions)
            for variant in self.variants
            for size in variant.sizes or self.sizes
        ]

    def to_json(self) -> dict[str, Any]:
        """The study as plain JSON values."""
        variants = [{**vars(variant), "setting": variant.setting.to_json()} for variant in self.variants]
        claims = [vars(claim) for claim in self.claims]
        return json.loads(json.dumps({**vars(self), "variants": variants, "claims": claims}))

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Study:
        """The study that `to_json` gave, or that a person wrote; raises InputError naming what is wrong.

        A person's variant may hold `changes` instead of a `setting`: dotted names of fields of the study's own
        `setting`, as in {"name": "wide", "changes": {"network.model_channels": 32}}.
        """
        try:
            values = dict(values)
            base = values.pop("setting", None)
            variants = []
            for each in values["variants"]:
                each = dict(each)
                changes = each.pop("changes", {})
                setting = Setting.from_json(changed(each.pop("setting", base), changes))
                variants.append(Variant(setting=setting, **{**each, "sizes": _tuple(each.get("sizes"))}))
            claims = [Claim(**{**each, "sizes": _tuple(each.get("sizes"))}) for each in values.pop("claims", ())]
            sequences = {name: tuple(values.pop(name, ())) for name in ("sizes", "notes")}
            return Study(**{**values, **sequences, "variants": tuple(variants), "claims": tuple(claims)})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"a study: a field is missing, unknown or of the wrong type ({error})") from None


def changed(setting: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A setting in JSON values with the fields of dotted names changed."""
    if setting is None:
        raise InputError("a study: give it a setting, or give each variant one")
    result = json.loads(json.dumps(setting))
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InputError(f"a study: {name}: {parent} holds no fields")
        place[last] = value
    return result


def load_study(path: str | Path) -> Study:
    """The study in a file of your own.

    Args:
        path: JSON, or Python that leaves a `Study` (or a dict of the same) in `study`; a Python file is executed.

    Raises:
        InputError: There is no study in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such study: `diffmem study list` lists the built-in ones")
    if path.suffix == ".py":
        found = runpy.run_path(str(path)).get("study")
        if found is None:
            raise InputError(f"{path}: defines no variable named study")
    else:
        found = read_json(path)
    with parsing(path, "the description of a study"):
        return found if isinstance(found, Study) else Study.from_json(found)


def at_sizes(
    study: Study,
    sizes: Sequence[int] | None,
    repetitions: int | None,
    threads: int | None = None,
    criterion: str | None = None,
) -> Study:
    """The study with other sizes, for all of its variants, another number of repetitions, or of threads per run, or by
    another criterion; None leaves them."""
    if sizes is not None:
        variants = tuple(replace(variant, sizes=None) for variant in study.variants)
        study = replace(study, sizes=tuple(sizes), variants=variants)
    given: dict[str, Any] = {"threads": threads, "criterion": criterion}
    if chosen := {name: value for name, value in given.items() if value is not None}:
        settings = [replace(variant.setting, **chosen) for variant in study.variants]
        variants = tuple(replace(v, setting=each) for v, each in zip(study.variants, settings, strict=True))
        study = replace(study, variants=variants)
    return study if repetitions is None else replace(study, repetitions=repetitions)


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
