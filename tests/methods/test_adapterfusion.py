"""AdapterFusion mixes saved adapters as its formula says, leaves them as they are, and travels without them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import deltatune
from command import deltatune as command
from command import write_reviews
from conformance.cases import adapted, shaken
from deltatune import AdapterFusion, Houlsby, Pfeiffer
from deltatune.comparing.cell import run_cell
from deltatune.comparing.experiment import make_experiment
from deltatune.errors import UserError
from deltatune.methods import Site, make
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, attach, trainable_parameters
from deltatune.models.base import outline
from deltatune.models.places import find_base
from tiny import save_tiny, tiny_inputs, tiny_model

PARTS = (Pfeiffer(reduction=8), Pfeiffer(reduction=4, activation="gelu", scale=2.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two adapters of one base, as if they had been trained."""
    places = [tmp_path_factory.mktemp("adapter") for _ in PARTS]
    for seed, (place, part) in enumerate(zip(places, PARTS, strict=True)):
        deltatune.save_adapter(shaken(deltatune.attach(tiny_model("bert"), part), seed), place)
    return tuple(map(str, places))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def test_the_output_is_that_of_the_formula_with_every_product_written_out() -> None:
    layer = adapted(AdapterFusion(parts=PARTS), "linear").double()
    shaken(layer)
    x = torch.randn(6, 12, dtype=torch.float64)
    h, fusion, z, start = layer.base(x), layer.delta, [], 0
    for n, (part, m) in enumerate(zip(PARTS, fusion.widths, strict=True)):
        end = start + m
        nonlinearity = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[part.activation]
        narrow = nonlinearity(h @ fusion.down[start:end].T + fusion.down_bias[start:end])
        z.append(part.scale * (narrow @ fusion.up[:, start:end].T + fusion.up_bias[n]))
        start = end
    z = torch.stack(z, 1)
    scores = torch.einsum("td,tnd->tn", h @ fusion.Q.T + fusion.a, z @ fusion.K.T)
    wanted = h + torch.einsum("tn,tnd->td", scores.softmax(1), z @ fusion.V.T)
    torch.testing.assert_close(layer(x), wanted)


def test_it_starts_as_the_mean_of_its_adapters_and_trains_what_the_formula_counts(folders: tuple[str, ...]) -> None:
    model = deltatune.attach(tiny_model("bert"), AdapterFusion(adapters=folders, regularisation=0.0))
    added = {}
    for name, folder in zip("ab", folders, strict=True):
        alone = deltatune.load_adapter(tiny_model("bert"), folder)
        added[name] = {path: layer.delta for path, layer in adapted_layers(alone).items()}
    h = 0.01 * torch.randn(5, 32)  # so small that the scores are alike
    for path, layer in adapted_layers(model).items():
        mean = (added["a"][path].added(h) + added["b"][path].added(h)) / 2
        torch.testing.assert_close(layer.delta.added(h), mean, rtol=0.1, atol=0.1 * mean.abs().max().item())
    own = sum(p.numel() for name, p in trainable_parameters(model).items() if ".deltas." in name)
    assert own == 2 * (3 * 32**2 + 32) == 2 * AdapterFusion().parameters(Site(32, 64, role="down"))


def test_training_leaves_the_adapters_as_they_are_and_the_file_needs_no_other(
    folders: tuple[str, ...], tmp_path: Path
) -> None:
    model = deltatune.attach(tiny_model("bert"), AdapterFusion(adapters=folders))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model.train()(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss + deltatune.penalty(model)
        loss.backward()
        optimizer.step()
    deltatune.save_adapter(model.eval(), tmp_path / "fused")
    first, saved = load_file(Path(folders[0]) / TENSORS), load_file(tmp_path / "fused" / TENSORS)
    key = "base_model.model.bert.encoder.layer.1.output.dense"
    assert torch.equal(saved[f"{key}.fusion_adapters.down.weight"][:4], first[f"{key}.adapter_down.weight"])
    loaded = deltatune.load_adapter(tiny_model("bert"), tmp_path / "fused")
    assert loaded.attachment.method.adapters == ()
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(UserError, match="another base"):
        deltatune.load_adapter(tiny_model("bert", seed=1), tmp_path / "fused")


def test_the_penalty_draws_v_to_the_identity(folders: tuple[str, ...]) -> None:
    model = deltatune.attach(tiny_model("bert"), AdapterFusion(adapters=folders, regularisation=0.5))
    assert deltatune.penalty(model) < 1e-6
    for layer in adapted_layers(model).values():
        torch.nn.init.zeros_(layer.delta.V)
    assert deltatune.penalty(model).item() == pytest.approx(0.5 * 2 * 32)
    model = deltatune.attach(tiny_model("bert"), AdapterFusion(adapters=folders, regularisation=0.0))
    assert deltatune.penalty(model) is None


def test_what_cannot_be_fused_is_refused_and_the_model_left_alone(folders: tuple[str, ...], tmp_path: Path) -> None:
    def refused(why: str, *adapters: str, base: PreTrainedModel | None = None) -> None:
        model = base or tiny_model("bert")
        before = set(model.state_dict())
        with pytest.raises(UserError, match=why):
            deltatune.attach(model, AdapterFusion(adapters=adapters))
        assert set(model.state_dict()) == before

    refused("there are 0")
    refused("there are 1", folders[0])
    refused("another base", *folders, base=tiny_model("bert", seed=1))
    refused("holds no adapter", folders[0], str(tmp_path))
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), Houlsby()), tmp_path / "houlsby")
    refused("DELTATUNE_HOULSBY, not of pfeiffer", folders[0], str(tmp_path / "houlsby"))
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), Pfeiffer(leave_out=(1,))), tmp_path / "few")
    refused(r"layer.1.output.dense: adapterfusion: .*few has no adapter", folders[0], str(tmp_path / "few"))
    tensors = load_file(tmp_path / "few" / TENSORS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "few" / TENSORS)
    refused("few.* is damaged", folders[0], str(tmp_path / "few"))


def test_an_experiment_names_the_folders_of_adapters_that_tune_has_trained(tmp_path: Path) -> None:
    base, data = save_tiny(tmp_path / "base", "bert"), write_reviews(tmp_path / "reviews.csv")
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first, second)):
        words = ("--base", base, "--data", data, "--method", "pfeiffer", "--set", "reduction=8", "--seed", seed)
        assert command("tune", *words, "--epochs", 1, "--out", folder).code == 0
    content = {"base": str(base), "data": str(data), "training": {"epochs": 1}}
    experiment = make_experiment({**content, "methods": [f"adapterfusion:adapters=[{first}, {second}]"]})
    found = find_base(str(base))
    # A comparison tries its methods on the base's outline first, which has no weights to know it by.
    assert attach(outline(found, labels=("0", "1")), make("adapterfusion", {"adapters": [str(first), str(second)]}))
    [cell] = experiment.cells()
    (tmp_path / "cell").mkdir()
    result = run_cell(cell, tmp_path / "cell")
    assert result.trainable == 2 * (3 * 32**2 + 32) + 2 * 32 + 2
    saved, trained = (load_file(folder / "adapter" / TENSORS) for folder in (tmp_path / "cell", second))
    key = "base_model.model.bert.encoder.layer.0.output.dense"
    assert torch.equal(saved[f"{key}.fusion_adapters.down.weight"][4:], trained[f"{key}.adapter_down.weight"])
    with pytest.raises(UserError, match="holds no adapter") as caught:
        make_experiment({**content, "methods": [f"adapterfusion:adapters=[{first}, {tmp_path / 'third'}]"]})
    assert caught.value.hint == "give folders that `tune --out` wrote"
