"""The figures that are taught, as the code computes them."""

from pathlib import Path

import claims as experiments
import pytest

from deltatune.planning.claims import Claim, check_claims, page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return check_claims()


def test_the_page_of_claims_is_current(claims: list[Claim]) -> None:
    assert (DOCS / "claims.md").read_text(encoding="utf-8") == page(claims) + experiments.page(), "run `make docs`"


def test_every_experiment_for_a_claim_says_what_is_claimed_and_how_it_is_tested() -> None:
    text = experiments.page()
    for path in sorted(experiments.CLAIMS.glob("*.yaml")):
        part = text.partition(f"### `{path.stem}`")[2].partition("\n### ")[0]
        assert len(part.partition("**Claimed:**")[2].partition("**Tested here:**")[0].strip()) > 20, path.stem
        assert len(part.partition("**Tested here:**")[2]) > 20, path.stem
        if (experiments.FOUND / f"{path.stem}.json").exists():
            assert len(part.partition("**Found:**")[2].partition("|")[0].strip()) > 20, path.stem
        else:
            assert "**Not run yet.**" in part


def test_the_closed_forms_hold_and_the_wrong_total_is_named(claims: list[Claim]) -> None:
    verdicts = {one.claim.split(":")[0]: one.verdict for one in claims}
    assert verdicts["768×768 weight"] == verdicts["1000×1000, r=8"] == "holds"
    [klue] = [one for one in claims if one.claim.startswith("klue")]
    assert klue.verdict == "does not hold"
    assert "589,824" in klue.computed
    assert "1,339,392" in klue.computed
