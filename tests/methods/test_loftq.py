"""LoftQ: LoRA begins with the largest components of what storing the weights in fewer bits lost."""

from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import bits
from deltatune import LoRA, UserError
from deltatune.models.attach import adapted_layers
from deltatune.models.base import Base
from tiny import save_tiny, tiny_inputs

LABELS = ("a", "b")
STORAGE = "nf2:block=16"
METHOD = LoRA(rank=3, alpha=5.0, init="loftq")


def load(folder: Path, storage: str = STORAGE) -> Base:
    return deltatune.load(str(folder), labels=LABELS, storage=storage)


@pytest.fixture(params=["bert", "gpt2", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / request.param, request.param)


def test_training_starts_with_the_best_product_over_codes_that_stay(folder: Path) -> None:
    base, whole = load(folder), deltatune.load(str(folder), labels=LABELS).model
    before = bits(base.model)
    model = deltatune.attach(base.model, METHOD, originals=deltatune.originals(base))
    layers = adapted_layers(model)
    assert layers
    for path, layer in layers.items():
        stored = layer.frozen.dense()
        plain = whole.get_submodule(path)
        original = plain.weight.T if folder.name == "gpt2" else plain.weight
        lost = original.detach() - stored
        U, S, Vh = torch.linalg.svd(lost)  # the usual names
        torch.testing.assert_close(
            layer.delta.merged(stored) - stored, (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5, rtol=1e-4
        )
        assert (original - layer.delta.merged(stored)).norm() < lost.norm()
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_file_is_a_plain_lora_of_the_stored_base(folder: Path, tmp_path: Path) -> None:
    base = load(folder)
    model = deltatune.attach(base.model, METHOD, originals=deltatune.originals(base))
    deltatune.save_adapter(model, tmp_path / "adapter", base=base.id, revision=base.revision)
    loaded = deltatune.load_adapter(load(folder).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs()).logits, model.eval()(**tiny_inputs()).logits)
    assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").init_lora_weights is True
    with pytest.raises(UserError, match=r"storage|stored"):
        deltatune.load_adapter(load(folder, "").model, tmp_path / "adapter")


def test_what_has_lost_nothing_or_forgotten_it_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    plain = load(folder, "")
    with pytest.raises(UserError, match=r"bert\.encoder\S+ is stored as it is") as refused:
        deltatune.attach(plain.model, METHOD, originals=deltatune.originals(plain))
    assert "storage such as nf4" in refused.value.hint
    with pytest.raises(UserError, match="no weights as they were"):
        deltatune.attach(load(folder).model, METHOD)
    base = load(folder)
    base.model.save_pretrained(tmp_path / "codes")
    base.tokenizer.save_pretrained(tmp_path / "codes")
    codes = load(tmp_path / "codes", "")
    with pytest.raises(UserError, match="no weights as they were"):
        deltatune.attach(codes.model, METHOD, originals=deltatune.originals(codes))
    assert not adapted_layers(codes.model)
