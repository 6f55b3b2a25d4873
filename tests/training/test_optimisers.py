"""Optimisers with small states beside AdamW: the same trajectory, less memory, exact resume, nothing left behind."""

import resource
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import deltatune
from conformance.cases import bits
from deltatune import Base, Full, LoRA, Training
from deltatune.data.tokens import Tokens
from deltatune.errors import UserError
from deltatune.training import paged
from deltatune.training.eight_bit import AdamW8bit
from deltatune.training.events import Step
from deltatune.training.loop import train
from deltatune.training.optimisers import make_optimiser
from deltatune.training.tasks import task_for
from tiny import tokenizer

NAMES = ("adamw", "adamw8bit", "paged")
EVERY = pytest.mark.parametrize("name", NAMES)
LABELS = 3


def examples(count: int) -> Tokens:
    """Token sequences whose label is the sort of their first token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 100, (count, 8), generator=generator)
    return Tokens(tuple({"input_ids": row} for row in ids.tolist()), tuple((ids[:, 0] % LABELS).tolist()), 0)


def model(method) -> nn.Module:
    """A small BERT whose matrices are large enough to have 8-bit moments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=100, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
            max_position_embeddings=16, num_labels=LABELS,
        )  # fmt: skip
        return deltatune.attach(BertForSequenceClassification(config), method)


def trained(name: str, method=None, **settings) -> tuple[nn.Module, list[float]]:
    """A model trained by the loop with that optimiser, and the loss of each step."""
    done, losses = model(method or Full()), []
    data = examples(240)
    settings = Training(**{"epochs": 2, "batch_tokens": 64, "keep": "last", "optimiser": name, **settings})
    train(
        task_for(Base(done, tokenizer("bert"), "", ""), "fp32"), data, examples(8), settings,
        learning_rate=1e-3, precision="fp32", seed=0,
        listen=lambda event: losses.append(event.loss) if isinstance(event, Step) else None,
    )  # fmt: skip
    return done, losses


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, list[float]]:
    return trained("adamw")


def distance(a: nn.Module, b: nn.Module) -> float:
    ours, theirs = bits(a), bits(b)
    return sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5


def test_paged_training_gives_the_bits_of_adamw(plain: tuple[nn.Module, list[float]]) -> None:
    ours, losses = trained("paged")
    assert losses == plain[1]
    theirs = bits(plain[0])
    assert all(torch.equal(value, theirs[name]) for name, value in bits(ours).items())


def test_8bit_training_stays_near_adamw(plain: tuple[nn.Module, list[float]]) -> None:
    """The stated bound: losses that differ by 0.003 on average, and parameters by 5% of the way that they went."""
    ours, losses = trained("adamw8bit")
    assert len(losses) == len(plain[1]) == 60
    assert sum(plain[1][-10:]) < 0.6 * sum(plain[1][:10])  # something was learnt
    assert 0 < sum(abs(a - b) for a, b in zip(losses, plain[1], strict=True)) / len(losses) < 0.003
    assert distance(ours, plain[0]) < 0.05 * distance(model(Full()), plain[0])


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    """Gradients that a few steps of training could give: most of them small, and some rows without any."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        numbers = torch.randn(parameter.shape, generator=generator) ** 3 / 100
        parameter.grad = torch.empty_like(parameter).copy_(numbers)  # laid out as the parameter, as autograd's are
        parameter.grad[::3] = 0


def parameters() -> dict[str, nn.Parameter]:
    """Small and large tensors, some of whose last blocks are short, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (70, 70), "vector": (5000,), "long": (300, 256), "small": (20, 3), "bias": (20,)}
    made = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return {**made, "transposed": nn.Parameter(torch.randn(80, 90, generator=generator).T)}


RATES = {"matrix": 1.0, "vector": 1.0, "long": 16.0, "small": 16.0, "bias": 1.0, "transposed": 1.0}


def stepped(optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Steps with the gradients of these seeds, at each group's own rate as the loop sets it."""
    for seed in seeds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * group["factor"]
        gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], seed)
        optimizer.step()


def after(name: str, steps: int) -> dict[str, nn.Parameter]:
    """The parameters after some steps."""
    moved = parameters()
    stepped(make_optimiser(name, moved, RATES, decay=0.1), range(steps))
    return moved


def test_a_paged_step_is_that_of_adamw_in_each_group_and_layout() -> None:
    ours, theirs = after("paged", 5), after("adamw", 5)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_8bit_step_is_that_of_adamw_but_for_what_codes_lose() -> None:
    first, plain_first = after("adamw8bit", 1), after("adamw", 1)
    last, plain_last, start = after("adamw8bit", 10), after("adamw", 10), parameters()
    for name in start:  # the first step's moments have not been encoded yet
        torch.testing.assert_close(first[name], plain_first[name], atol=1e-6, rtol=1e-6)
        if start[name].numel() < 4096:
            assert torch.equal(last[name], plain_last[name])
        else:
            assert 0 < (last[name] - plain_last[name]).norm() < 0.1 * (plain_last[name] - start[name]).norm()


def test_paged_lora_plus_trains_with_its_own_rates() -> None:
    theirs, ours, slow = (
        trained(name, LoRA(rank=4, lr_ratio=ratio), epochs=0.2, clip=0.1)[0]
        for name, ratio in (("adamw", 16.0), ("paged", 16.0), ("paged", 1.0))
    )
    assert distance(ours, theirs) == 0 < distance(slow, theirs)


@EVERY
def test_a_saved_state_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = after(name, 6)
    moved = parameters()
    optimizer = make_optimiser(name, moved, RATES, decay=0.1)
    stepped(optimizer, range(3))
    saved = optimizer.state_dict()
    flat = {f"{key} {part}": tensor for key, state in saved["state"].items() for part, tensor in state.items()}
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in flat.items()}, tmp_path / "state")
    read: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(tmp_path / "state").items():
        read.setdefault(int(key.split()[0]), {})[key.split()[1]] = tensor
    again = {path: nn.Parameter(parameter.detach().clone()) for path, parameter in moved.items()}
    resumed = make_optimiser(name, again, RATES, decay=0.1)
    resumed.load_state_dict({**saved, "state": read})
    stepped(optimizer, range(3, 6))  # the first goes on: what was loaded has to be a copy
    stepped(resumed, range(3, 6))
    if name == "adamw":  # PyTorch's own reads a moment as if it were laid out as its parameter
        del whole["transposed"]
    assert all(torch.equal(again[path], whole[path]) and torch.equal(moved[path], whole[path]) for path in whole)


def test_8bit_states_stay_packed_when_they_are_loaded() -> None:
    weight = {"weight": nn.Parameter(torch.randn(64, 100))}
    optimizer, other = (make_optimiser("adamw8bit", weight, {"weight": 1.0}, decay=0.0) for _ in range(2))
    stepped(optimizer, range(1))
    other.load_state_dict(optimizer.state_dict())
    state = other.state[weight["weight"]]
    assert sum(tensor.nbytes for tensor in state.values()) == 2 * (6400 + 4 * 25) + 4
    assert isinstance(other, AdamW8bit)


def test_a_rare_gradient_makes_no_large_step() -> None:
    """A second moment that was rounded to 0 would: the first moment would be divided by eps alone."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW8bit([weight], lr=1e-3, weight_decay=0.0)
    rare = torch.full((4096,), 1e-4)
    rare[::256] = 1.0
    for gradient in (rare, torch.zeros(4096), torch.zeros(4096)):
        weight.grad = gradient
        optimizer.step()
    assert weight.abs().max() < 3e-3


def test_the_files_of_paged_moments_have_no_name_in_their_folder(tmp_path: Path) -> None:
    optimizer = make_optimiser("paged", parameters(), RATES, decay=0.1, paged_folder=tmp_path)
    stepped(optimizer, range(1))
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert list(tmp_path.iterdir()) == []
    del optimizer
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_folder_that_cannot_hold_the_moments_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing: No such file") as caught:
        make_optimiser("paged", parameters(), RATES, decay=0.1, paged_folder=tmp_path / "missing")
    assert "paged_folder" in caught.value.hint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"could not keep [\d,]+ bytes of moments in .*: File too large"):
            make_optimiser("paged", parameters(), RATES, decay=0.1, paged_folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_bitsandbytes_the_paged_optimiser_of_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        paged._on_cuda([])
    assert "pip install bitsandbytes" in caught.value.hint


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_the_paged_optimiser_is_that_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    ours, theirs = (
        {name: nn.Parameter(parameter.detach().cuda()) for name, parameter in parameters().items()} for _ in range(2)
    )
    for name, moved in (("paged", ours), ("adamw", theirs)):
        stepped(make_optimiser(name, moved, RATES, decay=0.1), range(5))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, atol=1e-5, rtol=1e-4)


def anonymous() -> int:
    """Bytes of this process' memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_paged_moments_are_no_anonymous_memory() -> None:
    stepped(make_optimiser("adamw", parameters(), RATES, decay=0.1), range(1))  # a first step imports a lot
    weight = {"weight": nn.Parameter(torch.ones(3000, 3000))}  # too large for the allocator to have room for it
    weight["weight"].grad = torch.ones(3000, 3000)
    grown = {}
    for name in ("paged", "adamw"):
        before = anonymous()
        optimizer = make_optimiser(name, weight, {"weight": 1.0}, decay=0.1)
        optimizer.step()
        grown[name] = anonymous() - before
        del optimizer
    moments = 2 * weight["weight"].nbytes
    assert grown["paged"] < 0.02 * moments
    assert grown["adamw"] > 0.98 * moments


def test_an_optimiser_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'adamw', 'adamw8bit' or 'paged'"):
        Training(optimiser="sgd")  # type: ignore[arg-type]
