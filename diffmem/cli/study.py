"""`diffmem study`: list, show, plan, run, report, rerun, import."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from diffmem.cli.execution import executing, executor_options, repetitions_option, tell_outcome, threads_option
from diffmem.cli.options import (
    Color,
    CommandWithJson,
    Source,
    criterion_option,
    debug_option,
    json_option,
    moved_option,
)
from diffmem.cli.sampling_options import device_option, folder_option
from diffmem.cli.training_options import NUMBER, Numbers

if TYPE_CHECKING:
    from diffmem.studies import Study
    from diffmem.studies.findings import Findings
    from diffmem.studies.power import Planned
    from diffmem.studies.reproduction import Reproduction
    from diffmem.studies.run import Outcome

FAILURE = 1


def _choice_options(command):
    """What the studies are, for `show` and `run`."""
    for option in reversed(
        [
            click.argument("studies", nargs=-1, required=True),
            click.option(
                "--scale",
                type=click.Choice(["digits", "digits-fast", "cifar16", "cifar10"]),
                default="digits",
                show_default=True,
                help=(
                    "digits: a small network, trained until R_mem has leveled off; digits-fast: the same, for 1000"
                    " steps whatever N is; cifar16: CIFAR-10 at 16×16, for one core; cifar10: the paper's."
                ),
            ),
            click.option(
                "--data",
                "source",
                type=Source(as_given=True),
                help="The training images: they replace the scale's own.",
            ),
            click.option(
                "--other",
                type=Source(as_given=True),
                help="The images that the study of intra-class diversity mixes in.",
            ),
            click.option("--color", type=Color(), help="Convert all images to gray or to RGB."),
            click.option("--sizes", type=Numbers(), help="Training-set sizes instead of the study's."),
            repetitions_option("per cell."),
            moved_option("--seeds", "runs per cell are --repetitions, since --seeds are those of images"),
            threads_option,
            criterion_option,
            click.option("--epochs", type=NUMBER, help="Training length in epochs: instead of the study's."),
            click.option(
                "--read-at",
                type=NUMBER,
                metavar="EPOCHS",
                help="Read R_mem after so many epochs, at an audit, for cells and questions.  [default: the study's; "
                "with --epochs, the highest over a run's audits]",
            ),
            click.option(
                "--level-off",
                is_flag=True,
                help="End a run once its R_mem has leveled off: over a doubling of its length it has not risen beyond "
                "noise. It has its full length at most, and is audited up to nine times, from a sixteenth of it on.",
            ),
            click.option(
                "--until",
                type=click.Choice(["decided"]),
                help="decided: go on after --repetitions, one at a time, with the cells of open questions, until all "
                "are decided or have --max-repetitions. The error of the verdicts holds for all looks together.",
            ),
            click.option("--max-repetitions", type=click.IntRange(min=2), metavar="K", help="With --until: at most."),
        ]
    ):
        command = cast(Any, option)(command)
    return command


def _chosen(studies, scale, source, other, color, until, max_repetitions, **changes) -> list[Study]:
    """Studies by name or file."""
    from diffmem.studies.presets import NAMES, WITHOUT_IMAGES, build
    from diffmem.studies.study import at_sizes, load_studies

    if (until is None) != (max_repetitions is None):
        raise click.UsageError("--until decided and --max-repetitions K belong together: give both")
    found = []
    # "all" are those that an option about images is for.
    about_images = any((source, other, color, changes["criterion"], changes["level_off"]))
    every = [name for name in NAMES if not (about_images and name in WITHOUT_IMAGES)]
    for name in every if studies == ("all",) else studies:
        own = name.endswith((".json", ".py"))
        loaded = load_studies(name) if own else [build(name, scale, source, other, color)]
        found += [at_sizes(study, **changes, max_repetitions=max_repetitions) for study in loaded]
    return found


@click.group("study")
@debug_option
def study_command() -> None:
    """Run the paper's factor studies, or your own.

    \b
    Examples:
      diffmem study list
      diffmem study show width --plan 1,8
      diffmem study plan width --runs studies
      diffmem study run size width --out studies
      diffmem study run width --until decided --max-repetitions 8 --out studies
      diffmem study run resolution --scale cifar10 --data cifar10.zip --workers 8 --device cuda --out studies
      diffmem study report --runs studies
      diffmem study rerun 1ab14034 --runs studies
    """


@study_command.command("list", cls=CommandWithJson)
@json_option("the studies")
@debug_option
def list_command(as_json: bool) -> None:
    """List the built-in studies with their number of runs at each scale, and about what they cost."""
    from diffmem.studies.presets import NAMES, SCALES, build, core_seconds

    rows: list[dict[str, Any]] = []
    for name in NAMES:
        studies = {scale: build(name, scale) for scale in SCALES}
        rows.append(
            {
                "name": name,
                "title": studies["digits"].title,
                "runs": {scale: len(study.trials()) for scale, study in studies.items()},
                "core_seconds": {scale: core_seconds(study, scale) for scale, study in studies.items()},
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'study':16}" + "".join(f"{scale:>16}" for scale in SCALES))
    for row in rows:
        places = []
        for scale in SCALES:
            runs, seconds = row["runs"][scale], row["core_seconds"][scale]
            places.append(f"{runs}" if seconds is None else f"{runs} ({seconds / 3600:.1f} h)")
        click.echo(f"{row['name']:16}" + "".join(f"{place:>16}" for place in places) + f"   {row['title']}")
    click.echo("Runs, and about how many hours of one core they take at most; cifar10 needs a GPU.")


@study_command.command("show", cls=CommandWithJson)
@_choice_options
@click.option(
    "--runs", type=click.Path(path_type=Path), help="Folder of runs; finished runs in it are not counted in the cost."
)
@moved_option("--out", "the folder of runs is --runs here; nothing is written")
@click.option(
    "--plan", "workers", type=Numbers(), metavar="W,W,…",
    help="Measure the cost of the runs on this machine, and simulate a schedule on these numbers of devices.",
)  # fmt: skip
@device_option
@json_option("the studies, which `run` reads as studies of your own")
@debug_option
def show_command(runs, workers, device, as_json, **choice) -> None:
    """Show the runs of studies, and what they would cost."""
    import torch

    from diffmem.progress import progress_bars
    from diffmem.studies.folder import all_trials
    from diffmem.studies.laws import SENTENCES, SOURCES
    from diffmem.studies.schedule import costs, schedule

    torch.set_flush_denormal(True)
    chosen = _chosen(**choice)
    if as_json:
        click.echo(
            json.dumps([study.to_json() for study in chosen] if len(chosen) > 1 else chosen[0].to_json(), indent=1)
        )
        return
    for study in chosen:
        click.echo(f"{study.name}: {study.title}; {len(study.trials())} runs, {study.repetitions} per cell")
        for variant in study.variants:
            sizes = ", ".join(f"{size:,}" for size in variant.sizes or study.sizes)
            click.echo(f"  {variant.name:24} N = {sizes}")
        asked = [question.text for question in study.questions]
        if study.law is not None:
            asked.append(f"{SENTENCES[study.law]} ({SOURCES[study.law]})")
        for line in (*(f"asks: {text}" for text in asked), *study.notes):
            click.echo(f"  {line}")
    trials = all_trials(chosen)
    click.echo(f"{len(trials)} distinct runs")
    if workers:
        _tell_busy()
        with progress_bars() as progress:
            estimates = costs(trials, runs, device, progress)
        done = sum(cost.done for cost in estimates)
        click.echo(f"{done} of them done; the others, on this {device if device != 'auto' else 'machine'}'s measure:")
        for count in workers:
            plan = schedule(estimates, count)
            click.echo(
                f"  {count:4} {'device' if count == 1 else 'devices':8} {plan.seconds / 3600:9.2f} hours, "
                f"{plan.work / 3600:.2f} device-hours of work, {plan.utilization:.0%} busy"
            )


@study_command.command("plan", cls=CommandWithJson)
@_choice_options
@click.option(
    "--runs", type=click.Path(path_type=Path, exists=True),
    help="Folder of runs; or a report. The spread and the cost of the runs in it are taken.",
)  # fmt: skip
@click.option(
    "--effect", type=click.FloatRange(min=0, min_open=True), metavar="L",
    help="The difference, in logit R_mem, that is to be found.  [default: twice a question's margin, 0.8: 20 points in "
    "the middle, 7 at 90 %]",
)  # fmt: skip
@device_option
@json_option("the plan")
@debug_option
def plan_command(runs, effect, device, as_json, **choice) -> None:
    """Show which question is decided by how many repetitions, with which power, and at which cost.

    Nothing is written. Costs are those of finished runs in RUNS, else measured on a few steps; how much runs differ is
    taken from RUNS too, else assumed.
    """
    import torch

    from diffmem.progress import progress_bars
    from diffmem.studies.folder import find_in
    from diffmem.studies.laws import expected_reach
    from diffmem.studies.power import plan
    from diffmem.studies.schedule import costs
    from diffmem.studies.study import Place
    from diffmem.studies.trial import Trial

    torch.set_flush_denormal(True)
    chosen = _chosen(**choice)
    tell_busy = cache(_tell_busy)  # once
    found = [] if runs is None else find_in(chosen, runs)
    seconds: dict[str, dict[Place, float]] = {study.name: {} for study in chosen}
    for each in found:
        for cell in each.cells:
            place = cell.variant.name, cell.size
            seconds[each.study.name][place] = sum(result.seconds for result in cell.results) / len(cell.results)
    with progress_bars() as progress:
        for study in chosen:
            asked = {place for question in study.questions for place in study.contrast(question)}
            settings = {variant.name: variant.setting for variant in study.variants}
            open_places = [place for place in study.places() if place in asked and place not in seconds[study.name]]
            trials = [Trial(settings[name], size) for name, size in open_places]
            if trials:
                tell_busy()
            for place, cost in zip(open_places, costs(trials, None, device, progress), strict=True):
                seconds[study.name][place] = cost.training + cost.sampling
    planned = plan(chosen, seconds, found, effect)
    if as_json:
        click.echo(json.dumps([each.to_json() for each in planned]))
        return
    for study in chosen:
        if study.law == "onset":
            reach = expected_reach(study.sizes, study.repetitions)
            click.echo(
                f"{study.name}: {study.repetitions} repetitions tell the exponent to ±{reach:.2f}, if log times vary "
                "by 0.15; one shown to lie in 0.8 … 1.25 counts as 1"
            )
        elif study.law is not None:
            click.echo(
                f"{study.name}: asks about a law, whose power is not computed; `diffmem study show --plan 1` measures "
                "what its runs cost"
            )
    if planned:
        _print_plan(chosen, planned)
    elif all(study.law is None for study in chosen):
        click.echo("these studies ask no question")


def _tell_busy() -> None:
    """A line where other work takes the cores on which costs are about to be measured."""
    from diffmem.system import running_processes, usable_cores

    load, cores = running_processes() or 0.0, usable_cores()
    if load > cores / 2:
        what = f"other work is going on ({load:.1f} processes on {cores} cores)"
        click.echo(f"{what}: costs that are measured on the CPU now are too high", err=True)


def _print_plan(chosen: list[Study], planned: list[Planned]) -> None:
    from diffmem.studies.power import MOST, POWER
    from diffmem.text import counted

    def repetitions(needed: int | None) -> str:
        return f"over {MOST}" if needed is None else str(needed)

    click.echo(f"{counted(len(planned), 'question')}, wrong together in 5 %; repetitions for a power of {POWER:.0%}")
    click.echo(f"{'effect':>7} {'spread':>7} {'needs':>8} {'if none':>8} {'one costs':>10} {'all':>10} {'power':>6}")
    for each in planned:
        total = "" if each.total is None else f"{each.total / 3600:.2f} h"
        effect = "none" if not each.effect else f"{each.effect:.2f}"
        click.echo(
            f"{effect:>7} {each.spread:7.2f} {repetitions(each.repetitions):>8} {repetitions(each.equivalence):>8} "
            f"{each.seconds / 3600:8.2f} h {total:>10} {each.power:6.0%}  {each.study}: {each.question.text}"
            f" ({each.source})"
        )
    click.echo(
        "effect, spread: of the difference between paired runs, in logit R_mem; needs: repetitions, if there is that "
        "effect; if none: repetitions that show an equivalence; costs: hours of one device"
    )
    once = {study.repetitions for study in chosen if study.max_repetitions is None and study.questions}
    if once:
        low, high = min(once), max(once)
        number = counted(high, "repetition") if low == high else f"each study's {low} to {high} repetitions"
        click.echo(f"the power is that of {number}; --repetitions and --max-repetitions change it")
    for study in chosen:
        if study.max_repetitions is not None:
            mean = [each.expected for each in planned if each.study == study.name and each.expected is not None]
            between = f"{min(mean):.1f} to {max(mean):.1f}" if mean else "-"
            click.echo(
                f"{study.name}: the power is that of looks after {study.repetitions} to {study.max_repetitions} "
                f"repetitions; {between} are made on average"
            )


@study_command.command("run")
@_choice_options
@folder_option("a folder for the runs, the ledger and the reports.", required=True)
@click.option("--retry", is_flag=True, help="Retry runs that have failed for good.")
@executor_options
@debug_option
def run_command(out, retry, workers, ray, gpus_per_run, device, **choice) -> int:
    """Run studies: names from `diffmem study list`, "all", or files of your own (.json; .py, which is executed).

    Runs finished in OUT are not repeated, interrupted runs resume, and a failed run does not stop the others. Several
    of these commands may share one OUT on one machine. Writes a report at the end.
    """
    import torch

    from diffmem.progress import progress_bars
    from diffmem.studies.folder import report_studies, run_studies

    torch.set_flush_denormal(True)
    chosen = _chosen(**choice)
    cells = [cell for study in chosen for cell in replace(study, repetitions=1).cells()]
    names = {trial.key: variant.name for variant, trial in reversed(cells)}

    def tell(outcome: Outcome) -> None:
        tell_outcome(outcome, names.get(replace(outcome.trial, repetition=0).key, ""))

    try:
        with progress_bars() as progress, executing(workers, ray, gpus_per_run, device) as executor:
            outcomes = run_studies(
                chosen, out, executor, retry=retry, on_trial=tell, on_look=_tell_look, progress=progress
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"finished runs stay in {out}, and how far the others were: the same command resumes them"
        ) from None
    failed = [outcome for outcome in outcomes if outcome.result is None]
    click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs are done")
    for outcome in failed:
        click.echo(f"N = {outcome.trial.size:,}, repetition {outcome.trial.repetition}: {outcome.error}")
    _tell_report(report_studies(out))
    return FAILURE if failed else 0


def _tell_report(page: Path) -> None:
    """A line for every verdict of a report, or of a page over several, and where it is."""
    from diffmem.studies.results import verdicts_at

    for name, verdicts in verdicts_at(page).items():
        for each in verdicts:
            click.echo(f"{name and name + ': '}{each['study']}: {each['text']}: {each['verdict']}")
    click.echo(f"report: {page}")


def _tell_look(found: list[Findings]) -> None:
    """Lines about the questions that are open, on standard error."""
    answers = [(each.study, answer) for each in found for answer in each.answers]
    click.echo(f"{sum(answer.decided for _, answer in answers)} of {len(answers)} questions are decided", err=True)
    for study, answer in answers:
        if not answer.decided and study.max_repetitions is not None:
            pairs = 0 if answer.latest is None else answer.latest.repetitions
            limit = f"after {pairs} of at most {study.max_repetitions} repetitions"
            click.echo(f"  open {limit}: {study.name}: {answer.question.text}", err=True)


@study_command.command("import")
@click.argument("report", type=click.Path(path_type=Path, exists=True, file_okay=False))
@folder_option("the folder of the runs.", required=True)
@debug_option
def import_command(report, out) -> None:
    """Import the runs of a report, so that `run` does not repeat them: their numbers, without networks and images.

    REPORT is a folder with studies.json and runs.csv.
    """
    from diffmem.studies.report import import_report

    taken, runs = import_report(report, out)
    click.echo(f"{taken} of {runs} runs were imported" + ("" if taken == runs else "; the others lie there already"))


@study_command.command("report", cls=CommandWithJson)
@click.argument("studies", nargs=-1)
@click.option(
    "--runs", type=click.Path(path_type=Path, exists=True), multiple=True,
    help="Folder of runs; or a report. Several: one page over their reports, each in a folder of its own.",
)  # fmt: skip
@folder_option("the folder of the report.  [default: RUNS/report, or the report itself]")
@moved_option("--to", "the folder of the report is --out; that of the runs is --runs")
@click.option(
    "--mixed-model", is_flag=True, help="Fit the mixed model of statsmodels too, beside the verdicts (extra: studies)."
)
@json_option("what studies.json holds")
@debug_option
def report_command(studies, runs, out, mixed_model, as_json) -> None:
    """Write report.html, runs.csv and studies.json from the runs in RUNS, also while some are still running.

    RUNS may also be a report, or the output of diffmem emm: its pages are then rebuilt from its own tables by this
    version of diffmem.

    \b
    Examples:
      diffmem study report --runs studies
      diffmem study report width --runs studies --out width
      diffmem study report --runs runs/digits --runs runs/cifar16 --out results
      diffmem study report --runs results
    """
    from diffmem.studies.folder import report_studies
    from diffmem.studies.report import RESULTS, is_results
    from diffmem.studies.results import results_again, write_results

    if not runs:
        raise click.UsageError("--runs is missing: name the folder of the runs with it; --out is that of the report")
    if len(runs) > 1 or is_results(runs[0]):
        if studies or (len(runs) > 1 and out is None):
            raise click.UsageError("of several folders: give --out, and no names of studies")
        try:
            if len(runs) > 1:
                several = write_results(runs, out, mixed_model)
            else:
                several = results_again(runs[0], out, mixed_model)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("each report is complete, but not all are new: run the command again") from None
        page, tables = several, [several.with_name(RESULTS)]
    else:
        page = report_studies(runs[0], out, studies, mixed=mixed_model)
        tables = [page.with_name("studies.json"), page.with_name("emm.json")]
    if as_json:
        click.echo(next(table for table in tables if table.is_file()).read_text(encoding="utf-8"), nl=False)
        return
    _tell_report(page)


@study_command.command("rerun", cls=CommandWithJson)
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option(
    "--runs", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of runs; or a report."
)
@click.option("--data", "source", type=Source(), help="The training images: where they are now, if they were moved.")
@folder_option("a folder for the new runs, in which interrupted ones resume.  [default: a temporary one]")
@device_option
@json_option("the comparison of every run")
@debug_option
def rerun_command(keys, runs, source, out, device, as_json) -> int:
    """Rerun finished runs, and compare every count with what was recorded.

    KEY is a run's key, or the first characters of it: the report's page and its runs.csv list them. On one machine,
    with one version of diffmem and PyTorch, all counts must be the same, and the exit status is 0; it is 1 where one
    differs.
    """
    import tempfile

    from diffmem.studies.measure import InterruptedTrialError
    from diffmem.studies.reproduction import recorded_trial, reproduce

    known = [recorded_trial(runs, key) for key in keys]  # before the first one runs
    found = []
    with tempfile.TemporaryDirectory(prefix="diffmem-") as temporary:
        for trial, recorded in known:
            click.echo(
                f"run {recorded.key}: N = {trial.size:,}, repetition {trial.repetition}; took {recorded.seconds:.0f} s",
                err=True,
            )
            folder = Path(temporary if out is None else out) / recorded.key
            try:
                found.append(reproduce(trial, recorded, folder, device, source))
            except InterruptedTrialError:
                raise KeyboardInterrupt from None
    if as_json:
        click.echo(json.dumps([each.to_json() for each in found]))
    else:
        for each in found:
            _tell_reproduction(each)
    return 0 if all(each.same for each in found) else FAILURE


def _tell_reproduction(found: Reproduction) -> None:
    different = [count for count in found.counts if not count.same]
    for count in different:
        click.echo(f"  {count.name}: recorded {count.recorded}, now {count.again}")
    if not different:
        click.echo(f"run {found.recorded.key}: all {len(found.counts)} counts are the same")
        return
    click.echo(f"run {found.recorded.key}: {len(different)} of {len(found.counts)} counts differ")
    changed = [each for each in found.circumstances if not each.same]
    unknown = ", ".join(each.name for each in changed if each.recorded == "-")
    told = [f"{each.name} {each.recorded}, now {each.again}" for each in changed if each.recorded != "-"]
    if told:
        click.echo(f"  recorded with {'; '.join(told)}: sums may be rounded otherwise")
    if unknown:
        click.echo(f"  not recorded: {unknown}: if it was another, sums may be rounded otherwise")
