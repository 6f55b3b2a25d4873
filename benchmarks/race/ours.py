"""Our own entry: the library as its README shows it."""

from pathlib import Path
from typing import Any

from race.contestants import Contestant
from race.turns import Turn


def run(work: dict[str, Any], entry: Contestant, turn: Turn) -> None:
    """Trains through `deltatune.tune`; a listener hands over the turn after each step."""
    import deltatune
    from deltatune.training.events import Event, Started, Step

    folder, seen = Path(work["folder"]), [0, 0]

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            facts["trainable"] = event.trainable
        if isinstance(event, Step):
            turn.done(examples=event.examples - seen[0], tokens=event.tokens - seen[1], loss=event.loss)
            seen[:] = event.examples, event.tokens

    facts: dict[str, Any] = {}
    data = deltatune.load_data(str(folder / "data"))
    labels = {"labels": data.labels} if data.task == "classification" else {}
    base = deltatune.load(str(folder / "base"), storage=entry.settings.get("storage", ""), **labels)
    method = deltatune.make(entry.settings["method"], entry.settings["options"])
    settings = deltatune.Training(
        epochs=1,
        batch_tokens=work["batch_tokens"],
        max_length=work["max_length"],
        learning_rate=work["learning_rate"],
        evaluations=1,
    )
    tuned = deltatune.tune(base, data, method, settings, seed=work["seed"], listen=listen)
    facts["quality"] = {name: tuned.validation.figures[name] for name in work["quality"]}
    turn.say(finished=True, **facts)
