"""One trial of a search, run in this process: train, score on validation. It has no test split that it could read.

FOLDER/spec.json      what to run (in)
FOLDER/events.jsonl   what happened, line by line
FOLDER/result.json    what came out; there only when all is done
"""

import time
from dataclasses import replace
from pathlib import Path

from deltatune.comparing.cell import EVENTS, RESULT, load_base, read_data
from deltatune.comparing.experiment import TrialCell
from deltatune.comparing.results import Trained
from deltatune.data import DialogueData, TextData
from deltatune.errors import DivergedError
from deltatune.files import write_json
from deltatune.training.events import Event, EventFile, Finished, Listener, Step
from deltatune.training.tune import ignore, tune


def run_trial(cell: TrialCell, folder: Path, listen: Listener = ignore) -> Trained:
    """Trains one trial and leaves its record in `folder`; `result.json` is written last.

    A run that diverges is a result, too: its settings are no good.
    """
    began = time.perf_counter()
    data = without_test(read_data(cell))
    base = load_base(cell, data)
    last = Finished(0, 0.0, 0)

    def note(event: Event) -> None:
        nonlocal last
        file(event)
        listen(event)
        if isinstance(event, Step):
            last = Finished(event.step, event.seconds, 0)
        elif isinstance(event, Finished):
            last = event

    with EventFile(folder / EVENTS) as file:
        try:
            scores = tune(base, data, cell.method.make(), cell.training, seed=cell.seed, listen=note).validation
            reason = ""
        except DivergedError as error:
            scores, reason = None, error.message
    result = Trained(
        label=cell.method.label,
        number=cell.trial,
        metric=scores.metric if scores else "",
        value=scores.rank[0] if scores else None,
        validation=dict(scores.figures) if scores else {},
        steps=last.steps,
        best_step=last.best_step,
        train_seconds=last.seconds,
        seconds=time.perf_counter() - began,
        reason=reason,
    )
    write_json(folder / RESULT, result.model_dump(mode="json"))
    return result


def without_test(data: TextData | DialogueData) -> TextData | DialogueData:
    """The same data with an empty test split."""
    if isinstance(data, TextData):
        return replace(data, test=data.test.take(()))
    return replace(data, test=data.test.take(()))
