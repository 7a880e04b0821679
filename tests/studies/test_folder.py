"""A folder of studies: repetitions are added until questions are decided, and no further."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from studies.test_findings import result, study
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.integrity import sealed
from diffmem.studies import Outcome, Question, Variant, folder, run_studies
from diffmem.studies.analysis import HOLDS, UNDECIDED
from diffmem.studies.folder import find_all, read_studies
from diffmem.studies.ledger import Ledger
from diffmem.studies.measure import RESULT
from diffmem.studies.run import trial_folder


@pytest.fixture
def simulated(monkeypatch):
    """Trials whose logit R_mem is a number per repetition and one per width; those that were run, by width and
    repetition. The second repetition of width 16 fails for good."""
    logits, ran = {4: 0.0, 8: 3.0, 16: 0.0}, []

    def run_trials(trials, root, executor, on_trial, progress):
        ledger, outcomes = Ledger(root), []
        ledger.add(trials)
        for trial in trials:
            place = trial_folder(root, trial)
            if (place / RESULT).exists():
                continue
            width = trial.setting.network["model_channels"]
            ran.append((width, trial.size, trial.repetition))
            if (width, trial.repetition) == (16, 1):
                ledger.claim([trial.key])
                ledger.fail(trial.key, "diverged", 1.0, attempts=9)
                outcomes.append(Outcome(trial, None, "diverged"))
                continue
            random = np.random.default_rng([width, trial.size, trial.repetition])
            logit = logits[width] + math.sin(trial.repetition) + random.normal(0, 0.3)
            found = result(trial, round(1000 / (1 + math.exp(-logit))))
            place.mkdir(parents=True)
            (place / RESULT).write_text(json.dumps(sealed(found.to_json())))
            ledger.claim([trial.key])
            ledger.finish(trial.key, 1.0)
            outcomes.append(Outcome(trial, found))
        return outcomes

    monkeypatch.setattr(folder, "run_trials", run_trials)
    return ran


def test_repetitions_are_added_until_questions_are_decided(tmp_path, simulated):
    wider = Variant("wider", replace(TINY, network={**TINY.network, "model_channels": 16}), 16)
    questions = (Question("easy", "wide", "narrow"), Question("hard", "wider", "narrow"))
    subject = study(max_repetitions=6)
    subject = replace(subject, variants=(*subject.variants, wider), questions=questions)
    looks = []
    run_studies([subject], tmp_path, on_look=looks.append)
    (found,) = find_all(read_studies(tmp_path), tmp_path)
    easy, hard = found.answers
    assert (easy.verdict, hard.verdict) == (HOLDS, UNDECIDED)
    assert easy.estimate.repetitions == 4  # by these it was decided, and had no more
    assert hard.estimate.repetitions == 5  # of six, one failed
    runs = Counter(width for width, _, _ in simulated)
    assert runs == {8: 2 * 4, 4: 2 * 6, 16: 2 * 6}
    assert len(looks) == 5
    assert [answer.verdict for answer in looks[-1][0].answers] == [HOLDS, UNDECIDED]
    assert len(found.failures) == 2

    simulated.clear()
    run_studies([replace(subject, repetitions=3, max_repetitions=None)], tmp_path)  # the plan it was begun with stays
    assert {width for width, _, _ in simulated} <= {16}  # what failed, which a real ledger would not run again
    assert read_studies(tmp_path)[0] == subject
    with pytest.raises(InputError, match=r"begun in .* with 6, by which its error is spent"):
        run_studies([replace(subject, max_repetitions=7)], tmp_path)
