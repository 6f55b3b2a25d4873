"""One cell, run in this process: train, score on test, save.

FOLDER/spec.json      what to run (in)
FOLDER/events.jsonl   what happened, line by line
FOLDER/adapter/       what was trained, with its model card
FOLDER/predictions.jsonl   what it said of each test example
FOLDER/result.json    what came out; there only when all is done
FOLDER/failed.json    why it did not
FOLDER/stderr.log     what libraries said, and where a failure happened

See worker.py for the process around it.
"""

import hashlib
import json
import logging
from pathlib import Path

from deltatune.comparing.card import write_card
from deltatune.comparing.experiment import Cell
from deltatune.comparing.latency import measure_latency
from deltatune.comparing.provenance import code_mark
from deltatune.comparing.results import CellResult
from deltatune.data import DialogueData, TextData, load_data
from deltatune.errors import UserError
from deltatune.files import write_json, write_text
from deltatune.models.adapters import save_adapter
from deltatune.models.attach import trainable_parameters
from deltatune.models.base import Base, load
from deltatune.models.count import count
from deltatune.models.places import find_base
from deltatune.models.quantise import total_parameters
from deltatune.models.vocabulary import add_tokens
from deltatune.planning.foresight import Foreseen, foresee, refuse_unfit
from deltatune.training.asking import asking
from deltatune.training.events import Event, EventFile, Listener, Planned, Step, Unplanned
from deltatune.training.memory import peak, resident
from deltatune.training.plain_text import drift, plain_text_loss, plain_text_states
from deltatune.training.tasks import task_for
from deltatune.training.tune import Tuned, ignore, tune

log = logging.getLogger("deltatune")

SPEC, EVENTS, RESULT, ADAPTER = "spec.json", "events.jsonl", "result.json", "adapter"
PREDICTIONS = "predictions.jsonl"
FAILED, LOG = "failed.json", "stderr.log"


def run_cell(
    cell: Cell, folder: Path, listen: Listener = ignore, *, force: bool = False, forked: bool = False
) -> CellResult:
    """Trains and tests one cell and leaves its record in `folder`; `result.json` is written last.

    Raises `UserError` before anything is loaded where the plan says that memory would not do; `force` tries all the
    same. `forked`: in a process that shares what another one has imported.
    """
    write_json(folder / SPEC, cell.model_dump(mode="json"))
    for name in (RESULT, FAILED):  # what an earlier try came to
        (folder / name).unlink(missing_ok=True)
    data = read_data(cell)
    baseline = resident()
    planned, unplanned = _planned(cell, data, forked)
    if unplanned:
        log.warning("no plan could be made: %s", unplanned)
    if planned is not None and not force:
        refuse_unfit(planned)
    base = load_base(cell, data)
    steps: list[Step] = []

    def note(event: Event) -> None:
        file(event)
        listen(event)
        if isinstance(event, Step):
            steps.append(event)

    with EventFile(folder / EVENTS) as file:
        if planned is not None:
            note(Planned(round(planned.plan.memory.peak), planned.plan.seconds or 0.0, planned.plan.machine))
        if unplanned:
            note(Unplanned(unplanned))
        tuned = tune(base, data, cell.method.make(), cell.training, seed=cell.seed, listen=note)
    trained = peak()
    task = task_for(base, tuned.precision)
    test = task.test(data.test, tuned.max_length, cell.decoding)
    after, states = plain_text_loss(base, tuned.precision), plain_text_states(base, tuned.precision)
    _save(tuned, data, cell, folder / ADAPTER)
    write_text(folder / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in test.outputs))
    last = steps[-max(1, len(steps) // 10) :]
    seconds = tuned.finished.seconds
    highest = peak()
    result = CellResult(
        label=cell.method.label,
        method=cell.method.method,
        options=cell.method.options,
        seed=cell.seed,
        metric=test.metric,
        test=dict(test.figures),
        variants=dict(test.variants),
        test_values=test.values,
        test_digest=hashlib.sha256(repr(data.test).encode()).hexdigest(),
        validation=dict(tuned.validation.figures),
        train_loss=sum(step.loss for step in last) / max(1, len(last)),
        plain_text=None if tuned.plain_text is None or after is None else (tuned.plain_text, after),
        drift=None if tuned.plain_states is None or states is None else drift(tuned.plain_states, states),
        train_examples=len(data.train),
        truncated=tuned.truncated,
        steps=tuned.finished.steps,
        train_seconds=seconds,
        examples_per_second=steps[-1].examples / seconds if steps else 0.0,
        tokens_per_second=steps[-1].tokens / seconds if steps else 0.0,
        peak_bytes=highest,
        baseline_bytes=baseline,
        training_peak_bytes=trained,
        planned_peak_bytes=None if planned is None else round(planned.plan.memory.peak),
        planned_seconds=None if planned is None else planned.plan.seconds,
        trainable=sum(p.numel() for p in trainable_parameters(base.model).values()),
        total=total_parameters(base.model),
        adapter_bytes=sum(file.stat().st_size for file in (folder / ADAPTER).iterdir()),
        model_bytes=sum(t.nbytes for t in (*base.model.parameters(), *base.model.buffers())),
        precision=tuned.precision,
        latency=measure_latency(base, data.test, tuned.max_length, tuned.precision),
        code=code_mark(),
    )
    write_card(folder / ADAPTER, cell, result)
    write_json(folder / RESULT, result.model_dump(mode="json"))
    return result


def _planned(cell: Cell, data: TextData | DialogueData, forked: bool) -> tuple[Foreseen | None, str]:
    """The plan of the cell; or none, and why, which is no reason not to run it."""
    if cell.new_tokens:
        return None, "its base has new tokens, which makes it another one"
    try:
        plan = foresee(
            find_base(cell.base, cell.base_revision),
            data,
            cell.method.make(),
            cell.training,
            storage=cell.method.storage,
            seed=cell.seed,
            forked=forked,
        )
    except UserError:  # which the run will raise
        return None, ""
    except Exception as error:  # a plan follows code that it does not know, such as an architecture's
        return None, " ".join(f"{type(error).__name__}: {error}".split())
    return plan, ""


def load_base(cell: Cell, data: TextData | DialogueData) -> Base:
    """The cell's base for these data. Raises `UserError` for a method that does not fit, before weights are read."""
    count(find_base(cell.base, cell.base_revision), cell.method.make(), data.labels)
    base = load(cell.base, revision=cell.base_revision, labels=data.labels, seed=cell.seed, storage=cell.method.storage)
    if cell.new_tokens:
        add_tokens(base, cell.new_tokens)
    return base


def read_data(cell: Cell) -> TextData | DialogueData:
    """The cell's data, cut to its limits; the same rows for every seed, so that seeds differ in training alone."""
    choice = cell.data
    data = load_data(
        choice.name,
        task=choice.task,
        text=choice.text,
        label=choice.label,
        system=choice.system,
        template=choice.template,
    )
    if cell.data_revision not in ("", data.revision):
        raise UserError(
            f"the data '{choice.name}' changed since the comparison began", "start it again in a new folder with --out"
        )
    return data.limited(choice.sizes[0], choice.validation, choice.test, seed=0)


def _save(tuned: Tuned, data: TextData | DialogueData, cell: Cell, folder: Path) -> None:
    save_adapter(
        tuned.base.model,
        folder,
        base=tuned.base.id,
        revision=tuned.base.revision,
        labels=list(data.labels),
        data={**cell.data.model_dump(mode="json"), "name": data.place, "revision": data.revision},
        training=tuned.settings.model_dump(mode="json"),
        max_length=tuned.max_length,
        seed=cell.seed,
        task=data.task,
        **(
            {"pairs": data.train.pairs is not None}
            if isinstance(data, TextData)
            else {"asking": asking(data), "decoding": cell.decoding.model_dump(mode="json")}
        ),
    )
