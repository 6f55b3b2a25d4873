"""SHiRA: as many entries as LoRA has parameters, at PEFT's places, and files both ways."""

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import LoRA, SHiRA
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.shira import SHiRADelta
from deltatune.models.adapters import TENSORS
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's sparse tensors


def fresh(method: SHiRA, out: int, in_: int) -> SHiRADelta:
    return method.delta(Site(out, in_), weight_of(nn.Linear(in_, out)), None, torch.Generator())


def first_rows(base_layer: nn.Module, r: int, **_) -> torch.Tensor:
    mask = torch.zeros_like(base_layer.weight)
    mask.view(-1)[: r * sum(mask.shape)] = 1
    return mask


@pytest.mark.parametrize(
    ("architecture", "options", "mask"),
    [
        ("bert", {"r": 3, "target_modules": ["query", "value"]}, None),
        ("bert", {"r": 5, "random_seed": 8, "target_modules": "all-linear"}, None),
        ("bert", {"r": 2, "target_modules": ["key"]}, first_rows),
        ("t5", {"r": 4, "target_modules": ["q", "wo"]}, None),
        ("qwen2", {"r": 4, "target_modules": ["k_proj", "down_proj"]}, None),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(
    architecture: str, options: dict, mask, tmp_path: Path
) -> None:
    config = peft.ShiraConfig(task_type="SEQ_CLS", **options)
    config.mask_fn = mask or config.mask_fn
    expected = peft_adapter(tmp_path, architecture, config)
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_places_are_those_of_pefts_random_mask() -> None:
    delta = fresh(SHiRA(rank=3, mask_seed=5), 20, 12)
    mask = random_mask(nn.Linear(12, 20), 3, random_seed=5)
    assert torch.equal(delta.places, mask.flatten().nonzero().flatten())


def test_it_trains_as_many_numbers_as_lora_of_that_rank_and_its_update_is_of_higher_rank() -> None:
    site = Site(64, 48)
    assert SHiRA(rank=2).parameters(site) == LoRA(rank=2).parameters(site) == 224
    update = shaken(fresh(SHiRA(rank=2), 64, 48)).merged(torch.zeros(64, 48))
    assert (update != 0).sum() == 224
    assert torch.linalg.matrix_rank(update) > 30


def test_the_file_holds_what_is_stated() -> None:
    method, site = SHiRA(rank=3), Site(20, 12)
    stored = method.stored(site, fresh(method, 20, 12))
    assert sum(tensor.numel() for tensor in stored.values()) == method.stored_parameters([site])
    assert stored["shira_indices"].dtype == torch.int32


@pytest.mark.parametrize("damage", ["outside", "twice"])
def test_places_that_the_weight_does_not_have_are_refused(damage: str, tmp_path: Path) -> None:
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), SHiRA(rank=2, targets="query")), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    indices = next(tensor for name, tensor in tensors.items() if name.endswith("shira_indices"))
    indices[:, 1] = 99 if damage == "outside" else indices[:, 0]
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / "deltatune.json").unlink()
    with pytest.raises(UserError, match="shira_indices are no different places of a 32×32 weight"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def test_a_rank_that_asks_for_more_than_there_is_is_refused_with_the_largest() -> None:
    assert SHiRA().rank == 32
    with pytest.raises(UserError, match="rank 32 asks for 1024 entries, but a 20×12 weight has 240") as caught:
        SHiRA().check(Site(20, 12))
    assert "7" in caught.value.hint
    SHiRA(rank=7).check(Site(20, 12))
    with pytest.raises(UserError, match="rank must be at least 1, not 0"):
        SHiRA(rank=0)
    with pytest.raises(UserError) as caught:
        SHiRA(rank=1).check(Site(1, 12))
    assert "leave this layer out" in caught.value.hint
