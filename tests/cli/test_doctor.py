import json

from command import assert_refused, deltatune


def test_doctor_says_what_runs_use_here_and_why(base):
    done = deltatune("doctor", "--base", base)
    assert done.code == 0, done.err
    assert all(word in done.out for word in ("precision", "attention", "decoding of weights", "why"))


def test_doctor_shows_where_a_step_of_a_base_of_the_users_own_goes(base):
    words = ("--base", base, "--method", "lora:rank=2", "--tokens", 64, "--length", 16)
    shown = deltatune("doctor", "--profile", *words)
    assert shown.code == 0, shown.err
    assert "attention of " in shown.out
    assert "a step of 64 tokens" in shown.out
    assert all(part in shown.out for part in ("linears", "method", "norms", "loss", "optimiser", "rest"))
    said = json.loads(deltatune("doctor", "--profile", *words, "--json").out)
    assert said["profile"]["tokens"] == 64
    assert 0 < said["profile"]["reached"] < 1
    assert sum(said["profile"]["parts"].values()) > 0


def test_a_step_that_cannot_be_is_refused_with_a_hint(base):
    refused = deltatune("doctor", "--profile", "--base", base, "--length", 4000, "--tokens", 8000)
    assert_refused(refused, "no step of 8000 tokens in texts of 4000")
