"""The race's fairness: one works at a time, and unequal work is found."""

from pathlib import Path

import pytest
from race.contestants import Contestant
from race.organiser import checks
from race.turns import Racer

CHILD = """
from race.turns import Turn
turn = Turn()
print("what a library prints is no message")
for number in (1, 2):
    turn.done(examples=number, tokens=10, loss=0.5)
turn.say(finished=True)
"""


def test_a_contestant_steps_when_it_has_its_turn_and_its_own_output_is_apart(tmp_path: Path) -> None:
    with Racer(["-c", CHILD], {}, tmp_path / "child.log") as racer:
        assert racer.hear()["examples"] == 1
        assert racer.peak() > 1_000_000
        second = racer.turn()
        assert (second["examples"], second["loss"]) == (2, 0.5)
        assert 0 < second["seconds"] < racer.since_command()
        assert racer.turn() == {"finished": True}
    assert "what a library prints" in (tmp_path / "child.log").read_text()


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    child = Racer(["-c", "raise SystemExit('out of fuel')"], {}, tmp_path / "child.log")
    with child as racer, pytest.raises(RuntimeError, match="out of fuel"):
        racer.hear()


ENTRIES = (
    Contestant("deltatune", "", "ours"),
    Contestant("probe", "", "probe", kind="probe"),
    Contestant("peer", "", "trainer"),
    Contestant("random", "", "trainer", same_batches=False),
)


def ran(*steps: tuple[int, int, float], trainable: int = 100, loss: float = 0.6, **more: dict) -> dict:
    return {
        "steps": [dict(zip(("examples", "tokens", "loss"), step, strict=True)) for step in steps],
        "trainable": trainable,
        "quality": {"loss": loss},
        **more,
    }


PLAIN = [(4, 30, 0.7), (4, 28, 0.65)]


@pytest.mark.parametrize(
    ("peer", "fails"),
    [
        (ran(*PLAIN), set()),
        (ran((4, 29, 0.7), (4, 28, 0.65)), {"the same examples and tokens in every step"}),
        (ran(*PLAIN, trainable=101), {"lora: as many parameters train"}),
        (ran((4, 30, 0.8), (4, 28, 0.75)), {"lora: mean loss, same batches"}),
        (ran(*PLAIN, loss=0.9), {"lora: loss on the validation examples after training, same batches"}),
    ],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["", "once more"])
def test_unequal_work_is_found(peer: dict, fails: set[str], swapped: bool) -> None:
    """Of one that raced with other batches, by what it learnt from the same ones afterwards."""
    again, trainable = (peer, peer["trainable"]) if swapped else (ran(*PLAIN), 100)
    found = {
        "deltatune": ran(*PLAIN),
        "probe": ran((4, 30, 0.0)),
        "peer": ran(*PLAIN) if swapped else peer,
        "random": ran((5, 30, 0.7), (3, 30, 0.7), trainable=trainable, loss=0.75, alike=again),
    }
    assert {check["check"] for check in checks(found, ENTRIES) if not check["holds"]} == fails
