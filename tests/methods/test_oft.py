"""OFT: what PEFT made gives its logits, rotations are rotations, and what cannot turn is refused."""

from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import shaken
from deltatune import OFT
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.methods import Site
from deltatune.methods.oft import OFTDelta, cayley, skew
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model

SITE = Site(20, 12, "some.layer")


@pytest.mark.filterwarnings("ignore:Invalid `(oft_block_size|r)`")  # PEFT takes the nearest divisor
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"oft_block_size": 8, "use_cayley_neumann": False, "target_modules": ["query", "value"]}),
        ("bert", {"oft_block_size": 8, "num_cayley_neumann_terms": 3, "target_modules": ["query"]}),
        ("roberta", {"oft_block_size": 4, "num_cayley_neumann_terms": 7, "target_modules": "all-linear"}),
        ("distilbert", {"oft_block_size": 8, "block_share": True, "target_modules": ["q_lin", "lin2"]}),
        ("llama", {"r": 4, "oft_block_size": 0, "target_modules": ["q_proj", "down_proj"]}),
        ("qwen2", {"oft_block_size": 24, "use_cayley_neumann": False, "target_modules": ["up_proj", "down_proj"]}),
        ("t5", {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": ["q", "wo"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, architecture, peft.OFTConfig(task_type="SEQ_CLS", **options))
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"coft": True}, {"module_dropout": 0.5}])
def test_what_we_do_not_have_of_pefts_is_refused_by_name(options: dict, tmp_path: Path) -> None:
    peft_adapter(tmp_path, "bert", peft.OFTConfig(task_type="SEQ_CLS", target_modules=["query"], **options))
    with pytest.raises(UserError, match=next(iter(options))):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize("version", ["0.17.1", None])
def test_a_series_from_before_peft_changed_it_is_refused(version: str | None, tmp_path: Path) -> None:
    peft_adapter(tmp_path, "bert", peft.OFTConfig(task_type="SEQ_CLS", target_modules=["query"]))
    config = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", {**config, "peft_version": version})
    with pytest.raises(UserError, match=r"before 0\.18"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def trained(method: OFT) -> OFTDelta:
    return shaken(OFTDelta(SITE, method)).double()


def test_the_merged_rows_keep_their_lengths_and_angles() -> None:
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = trained(OFT(block_size=4)).merged(weight)
    torch.testing.assert_close(merged @ merged.T, weight @ weight.T)
    assert not torch.allclose(merged, weight)


def test_the_merged_weight_is_the_product_with_the_block_diagonal_matrix() -> None:
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = trained(OFT(block_size=4))
    R = torch.block_diag(*delta.rotations(delta.Q))
    torch.testing.assert_close(delta.merged(weight), weight @ R.T)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=torch.float64))


def test_shared_blocks_turn_alike() -> None:
    delta = trained(OFT(block_size=4, block_share=True))
    first, *others = delta.rotations(delta.Q)
    assert all(torch.equal(first, other) for other in others)


def test_the_series_nears_the_paper_s_inverse_as_it_gets_longer() -> None:
    Q = skew(torch.randn(3, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.05, 8)
    identity = torch.eye(8, dtype=torch.float64)
    paper = (identity + Q) @ torch.linalg.inv(identity - Q)
    errors = [(cayley(Q, terms) - paper).abs().max().item() for terms in (4, 5, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8
    torch.testing.assert_close(cayley(-Q, None), paper)


def test_the_count_is_that_of_the_skew_symmetric_blocks() -> None:
    assert OFT().parameters(Site(3072, 768)) == 768 * 31 // 2
    assert OFT(blocks=4).parameters(Site(768, 768)) == 768 * 191 // 2
    assert OFT(block_share=True).parameters(Site(768, 768)) == 32 * 31 // 2


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            {"block_size": 5},
            "block_size 5 does not divide 12, the inputs of some.layer",
            "the nearest that do: 4 and 6",
        ),
        ({"block_size": 32}, "block_size 32 does not divide 12", "the nearest that do: 12;"),
        ({"blocks": 8}, "blocks 8 does not divide 12", "the nearest that do: 6 and 12"),
        ({"blocks": 12}, "makes blocks of 1", "6 blocks of 2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_with_the_nearest_that_do(options: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        OFT(**options).check(SITE)
    assert hint in caught.value.hint


@pytest.mark.parametrize("options", [{"block_size": 1}, {"blocks": 0}, {"neumann_terms": 3}])
def test_values_that_mean_nothing_are_refused_by_name(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OFT(**options)


def test_adjusting_takes_the_nearest_divisor_and_of_two_the_smaller() -> None:
    sizes = {asked: OFT(block_size=asked, adjust=True).size(SITE) for asked in (5, 7, 10, 32)}
    assert sizes == {5: 4, 7: 6, 10: 12, 32: 12}
