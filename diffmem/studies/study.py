"""What a study is: a grid of trials, each with its place in a figure, and the questions that it is to decide.

Repetition r of every variant is trained on the same images with the same seed, and sampled from the same latents: runs
are compared in pairs, and what a repetition has of its own cancels. Where a factor is the choice of images itself, only
seeds are shared (`Study.unpaired` says what differs). Pairs of one repetition are then no more alike than others, and
the analysis by pairs is still right, with less to gain. Runs of another width or depth share the seed, not the weights.
"""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffmem.errors import InputError
from diffmem.inert.boundary import parsing
from diffmem.inert.documents import read_json
from diffmem.studies.leveling import NOISE
from diffmem.studies.trial import Setting, Trial

DIRECTION, EQUIVALENCE, TREND = "direction", "equivalence", "trend"
READ_WITHIN = 0.02  # of a length: an audit so near to it is one at it
LAWS = ("onset", "early-warning", "spurious", "crossover", "halves")  # of which `diffmem.studies.laws` says more
LEVEL_SNAPSHOTS = 9  # of a run that ends once it has leveled off: from a sixteenth of its length on


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
class Question:
    """A finding of the paper, or a guess of one's own, as what the runs are to decide.

    Each is a weighted sum of logit R_mem over the study's cells (`contrast`): of a direction and an equivalence, the
    variant `higher` minus the variant `lower`, averaged over the sizes; of a trend, the change from the first level to
    the last of a straight line through all levels.

    Attributes:
        text: In words.
        higher: Of a direction, the variant of which R_mem is said to be higher; of an equivalence, one of the two.
        lower: The other.
        sizes: At which N; None: wherever both were measured.
        kind: "direction": R_mem is higher; "equivalence": there is no difference worth speaking of; "trend": R_mem
            rises along an ordered factor.
        variants: Of a trend: its levels, in order; none: all that have an x, by x.
        over: Of a trend: "factor", or "size", along ln N.
        falls: Of a trend: R_mem is said to fall.
        margin: In logit R_mem: what differs by less is equivalent. The default, 0.4, is nowhere more than 10 points of
            R_mem, and about what an eighth more or fewer training images do (the paper's curves fall by 2 to 4 per unit
            of ln N); runs of one setting differ by more (0.6 at the digits scale).
        points: The margin in R_mem itself, for where R_mem is near 0 or 1: an equivalence is contrary beyond it.
    """

    text: str
    higher: str | None = None
    lower: str | None = None
    sizes: tuple[int, ...] | None = None
    kind: str = DIRECTION
    variants: tuple[str, ...] = ()
    over: str = "factor"
    falls: bool = False
    margin: float = 0.4
    points: float = 0.1

    def __post_init__(self) -> None:
        what = f"the question “{self.text}”"
        if self.kind not in (DIRECTION, EQUIVALENCE, TREND):
            raise InputError(f"{what}: kind is {self.kind!r}, but must be one of {DIRECTION}, {EQUIVALENCE}, {TREND}")
        if self.kind != TREND and (self.higher is None or self.lower is None or self.higher == self.lower):
            raise InputError(f"{what}: needs two variants, higher and lower")
        if self.over not in ("factor", "size"):
            raise InputError(f"{what}: over is {self.over!r}, but must be 'factor' or 'size'")
        if not (self.margin > 0 and 0 < self.points < 1):
            raise InputError(f"{what}: margin is {self.margin} and points {self.points}, but both must be above 0")

    @property
    def names(self) -> set[str]:
        """The variants that it names."""
        return {name for name in (self.higher, self.lower, *self.variants) if name is not None}

    @property
    def compared(self) -> str:
        """What is compared, in words."""
        if self.kind != TREND:
            return f"{self.higher} against {self.lower}"
        first, last = ("smallest N", "largest") if self.over == "size" else ("first level", "last")
        noun = first.split()[1]
        ends = f"{first} against {last}" if self.falls else f"{last} {noun} against {first.split()[0]}"
        return f"{ends}, on the straight line through all of them"  # whose ends may lie beyond 0 and 100 %


Place = tuple[str, int]  # a cell of a study: the variant's name, N


@dataclass(frozen=True)
class Study:
    """A grid: every variant at every size, `repetitions` times, and further ones where questions are open.

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
        questions: What is to be decided.
        published: The key of `published.json` that holds the paper's numbers.
        notes: What a reader should know, one line each.
        max_repetitions: Where given, cells of questions that are still open after `repetitions` get more runs, up to so
            many; one may look after each (see `diffmem.studies.analysis`). None: the runs are analyzed once.
        law: A law of the field that is read off the runs; see `diffmem.studies.laws`.
        read_at: The training length, in epochs, at which R_mem is read for cells and questions: that of an audit. None:
            R_mem is the highest over a run's snapshots.
    """

    name: str
    title: str
    factor: str
    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    repetitions: int = 1
    axis: str = "size"
    log_axis: bool = False
    questions: tuple[Question, ...] = ()
    published: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    max_repetitions: int | None = None
    law: str | None = None
    read_at: float | None = None

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise InputError(f"study {self.name}: two variants have one name")
        if not names or self.repetitions < 1 or not (self.sizes or all(v.sizes for v in self.variants)):
            raise InputError(f"study {self.name}: needs variants, sizes and repetitions, at least one of each")
        if self.axis not in ("size", "factor"):
            raise InputError(f"study {self.name}: axis is {self.axis!r}, but must be 'size' or 'factor'")
        for question in self.questions:
            if unknown := question.names - set(names):
                raise InputError(f"study {self.name}: a question names {', '.join(unknown)}, which is not a variant")
        if self.law is not None:
            if self.law not in LAWS:
                raise InputError(f"study {self.name}: law is {self.law!r}, but must be one of {', '.join(LAWS)}")
            needed = {"crossover": "mixture", "halves": "halves"}.get(self.law, "watch")
            if any(getattr(variant.setting, needed) is None for variant in self.variants):
                raise InputError(f"study {self.name}: its law needs settings with a {needed}")
        if self.max_repetitions is not None and self.max_repetitions < self.repetitions:
            raise InputError(
                f"study {self.name}: max_repetitions is {self.max_repetitions}, below repetitions, {self.repetitions}"
            )

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

    def places(self) -> list[Place]:
        """All cells."""
        return [(variant.name, size) for variant in self.variants for size in variant.sizes or self.sizes]

    def contrast(self, question: Question, measured: Collection[Place] | None = None) -> dict[Place, float]:
        """What a question asks about, as weights of the cells; their sum is 0.

        Args:
            question: One of the study's.
            measured: Cells to do with; None: all.

        Returns:
            The weight of each cell that counts; none where the question cannot be asked of these cells.
        """
        places = [place for place in self.places() if measured is None or place in measured]
        if question.sizes is not None:
            places = [place for place in places if place[1] in question.sizes]
        if question.kind == TREND and question.over == "size":
            return self._trend_over_sizes(question, places)
        levels = (question.higher, question.lower) if question.kind != TREND else self._levels(question)
        sizes = [
            size for size in sorted({size for _, size in places}) if all((name, size) in places for name in levels)
        ]
        if len(levels) < 2 or not sizes:
            return {}
        if question.kind != TREND:
            weights = [1.0, -1.0]
        else:
            weights = _line(self._positions(levels), -1.0 if question.falls else 1.0)
        return {
            (name, size): weight / len(sizes)
            for name, weight in zip(levels, weights, strict=True)
            for size in sizes
            if name is not None
        }

    def _levels(self, question: Question) -> tuple[str, ...]:
        """The levels of a trend, in order."""
        if question.variants:
            return question.variants
        ordered = [variant for variant in self.variants if variant.x is not None]
        return tuple(variant.name for variant in sorted(ordered, key=lambda variant: variant.x or 0.0))

    def _positions(self, levels: Sequence[str | None]) -> list[float]:
        """Where levels stand on the factor's axis: by x, or its logarithm; by rank where that is not possible."""
        x = [next(variant.x for variant in self.variants if variant.name == name) for name in levels]
        if any(each is None or (self.log_axis and each <= 0) for each in x):
            return [float(rank) for rank in range(len(levels))]
        return [math.log(each) if self.log_axis else each for each in x if each is not None]

    def _trend_over_sizes(self, question: Question, places: Sequence[Place]) -> dict[Place, float]:
        named = question.variants or tuple(variant.name for variant in self.variants)
        weights: dict[Place, float] = {}
        for name in named:
            sizes = sorted(size for other, size in places if other == name)
            if len(sizes) > 1:
                line = _line([math.log(size) for size in sizes], -1.0 if question.falls else 1.0)
                weights |= {(name, size): weight for size, weight in zip(sizes, line, strict=True)}
        count = len({name for name, _ in weights})
        return {place: weight / count for place, weight in weights.items()}

    @property
    def unpaired(self) -> tuple[str, ...]:
        """In what the training images of one repetition and size differ between variants, as names of fields of
        `DatasetSpec`; pixels of the same pictures (resolution, color) and labels do not count."""
        recipes = [variant.setting.data.to_json() for variant in self.variants]
        same = {"resolution", "color", "center_crop", "labels"}
        return tuple(
            name
            for name in {name: None for recipe in recipes for name in recipe}
            if name not in same and any(recipe.get(name) != recipes[0].get(name) for recipe in recipes)
        )

    def to_json(self) -> dict[str, Any]:
        """The study as plain JSON values."""
        variants = [{**vars(variant), "setting": variant.setting.to_json()} for variant in self.variants]
        questions = [vars(question) for question in self.questions]
        return json.loads(json.dumps({**vars(self), "variants": variants, "questions": questions}))

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
            questions = tuple(map(_question, [*values.pop("claims", ()), *values.pop("questions", ())]))
            sequences = {name: tuple(values.pop(name, ())) for name in ("sizes", "notes")}
            return Study(**{**values, **sequences, "variants": tuple(variants), "questions": questions})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"a study: a field is missing, unknown or of the wrong type ({error})") from None


def _question(values: Mapping[str, Any]) -> Question:
    """A question in JSON values; those of earlier versions were claims, about equal or not."""
    values = dict(values)
    if values.pop("about_equal", False):
        values["kind"] = EQUIVALENCE
    return Question(**{**values, "sizes": _tuple(values.get("sizes")), "variants": tuple(values.get("variants", ()))})


def _line(x: Sequence[float], sign: float) -> list[float]:
    """Weights that give the change of a straight line from the smallest x to the largest."""
    mean = sum(x) / len(x)
    scale = sign * (max(x) - min(x)) / sum((each - mean) ** 2 for each in x)
    return [scale * (each - mean) for each in x]


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
        path: As for `load_studies`; of one study.

    Raises:
        InputError: There is no study in it, or several.
    """
    found = load_studies(path)
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} studies, not one")
    return found[0]


def load_studies(path: str | Path) -> list[Study]:
    """The studies in a file of your own, or in a report's `studies.json`.

    Args:
        path: JSON (of one study, a list of them, or a report's), or Python that leaves a `Study` (or a dict of the
            same) in `study`; a Python file is executed.

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
        if isinstance(found, Study):
            return [found]
        listed = found if isinstance(found, list) else [found]
        return [Study.from_json(each.get("study", each)) for each in listed]


def at_sizes(
    study: Study,
    sizes: Sequence[int] | None = None,
    repetitions: int | None = None,
    threads: int | None = None,
    criterion: str | None = None,
    epochs: float | None = None,
    level_off: bool = False,
    max_repetitions: int | None = None,
    read_at: float | None = None,
) -> Study:
    """The study with other sizes, for all of its variants, another number of repetitions, or of threads per run, by
    another criterion, with runs of so many epochs, or until R_mem has leveled off, and R_mem read after so many; None
    leaves them, but of runs of other lengths R_mem is the highest if it is not said where to read it."""
    if sizes is not None:
        variants = tuple(replace(variant, sizes=None) for variant in study.variants)
        study = replace(study, sizes=tuple(sizes), variants=variants)
    given: dict[str, Any] = {"threads": threads, "criterion": criterion}
    given["length"] = None if epochs is None else {"epochs": epochs}
    settings = []
    for variant in study.variants:
        setting = replace(variant.setting, **{name: value for name, value in given.items() if value is not None})
        if level_off and setting.level_off is None:
            setting = replace(setting, level_off=NOISE, snapshots=max(setting.snapshots, LEVEL_SNAPSHOTS))
        settings.append(setting)
    variants = tuple(replace(v, setting=each) for v, each in zip(study.variants, settings, strict=True))
    if read_at is None and (epochs is None or (study.read_at or 0) == epochs):
        read_at = study.read_at
    study = replace(study, variants=variants, repetitions=repetitions or study.repetitions, read_at=read_at)
    if read_at is not None:
        _check_read_at(study, read_at)
    return study if max_repetitions is None else replace(study, max_repetitions=max_repetitions)


def _check_read_at(study: Study, epochs: float) -> None:
    """Raises InputError where runs of the study are not audited after so many epochs."""
    for variant in study.variants:
        for size in variant.sizes or study.sizes:
            audits = variant.setting.audit_epochs(size)
            if not any(abs(each - epochs) <= READ_WITHIN * epochs for each in audits):
                listed = ", ".join(f"{each:,.0f}" for each in audits)
                raise InputError(
                    f"read_at is {epochs:,g} epochs, but runs of {variant.name}, N = {size:,}, are audited after "
                    f"{listed}: choose one of these, or another length of the runs"
                )


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
