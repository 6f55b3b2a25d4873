"""Which layers words name, and what is said when they name none."""

import pytest
from torch import nn

from deltatune.errors import UserError
from deltatune.models.attach import find_head
from deltatune.models.roles import linear_roles
from deltatune.models.targets import adaptable, match
from tiny import ARCHITECTURES, tiny_model

COUNTS = {  # layers of two blocks: all-linear, attention, attention-qv, mlp
    "bert": (13, 8, 4, 4),  # one more: the pooler
    "roberta": (12, 8, 4, 4),
    "distilbert": (12, 8, 4, 4),
    "gpt2": (8, 4, 2, 4),  # query, key and value in one
    "llama": (14, 8, 4, 6),
    "qwen2": (14, 8, 4, 6),
    "t5": (32, 24, 12, 8),
}


def paths(model: nn.Module, targets) -> list[str]:
    return match(model, adaptable(model, find_head(model)), targets).paths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aliases_name_the_layers_of_their_roles(architecture: str) -> None:
    model = tiny_model(architecture)
    found = tuple(len(paths(model, alias)) for alias in ("all-linear", "attention", "attention-qv", "mlp"))
    assert found == COUNTS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_never_a_target(architecture: str) -> None:
    model = tiny_model(architecture)
    head = find_head(model)
    assert head
    assert not [path for path in paths(model, "all-linear") if path.startswith(head)]


def test_names_and_regular_expressions_are_ends_of_paths() -> None:
    model = tiny_model("bert")
    assert len(paths(model, "query")) == 2
    assert len(paths(model, ("query", "value"))) == 4
    assert paths(model, "layer.1.attention.self.query") == ["bert.encoder.layer.1.attention.self.query"]
    assert len(paths(model, r"layer\.0\..*dense")) == 3
    assert len(paths(model, "(query|key)")) == 4
    assert paths(model, ("query", "attention"))[:2] == paths(model, "query"), (
        "a layer that two entries name counts once"
    )


def test_what_matched_is_told_entry_by_entry() -> None:
    model = tiny_model("bert")
    told = str(match(model, adaptable(model), ("query", "mlp")))
    assert told.splitlines() == [
        "query: 2 layers: bert.encoder.layer.*.attention.self.query",
        "mlp: 4 layers: bert.encoder.layer.*.intermediate.dense, bert.encoder.layer.*.output.dense",
    ]
    paths = match(model, adaptable(model), "query").paths
    assert str(match(model, adaptable(model), tuple(paths))) == "2 layers: bert.encoder.layer.*.attention.self.query"


@pytest.mark.parametrize(
    ("targets", "message", "hint"),
    [
        ("qurey", "target 'qurey' matches no layer", "query"),
        (("query", "atention"), "target 'atention' matches no layer", "attention"),
        ("query,value", "matches no layer", "targets=[query,value]"),
        ("LayerNorm", "matches no linear layer that can be adapted", "linear layers end in"),
        ("(query", "no valid regular expression", ""),
        ((), "targets is empty", "all-linear"),
        ("classifier", "matches no linear layer", ""),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error_with_the_nearest_names(targets, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        paths(tiny_model("bert"), targets)
    assert message in caught.value.message
    assert hint in caught.value.hint


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing_attn = nn.ModuleDict({"w1": nn.Linear(8, 8), "w2": nn.Linear(8, 8)})
        self.expand = nn.Linear(8, 32)
        self.shrink = nn.Linear(32, 8)


def test_layers_with_unknown_names_get_their_roles_from_shape() -> None:
    blocks = nn.ModuleList([Block(), Block()])
    model = nn.ModuleDict({"embed": nn.Linear(4, 8), "blocks": blocks, "classifier": nn.Linear(8, 2)})
    roles = linear_roles(model)
    assert roles["blocks.0.mixing_attn.w1"] == "attention"
    assert roles["blocks.0.expand"] == "up"
    assert roles["blocks.1.shrink"] == "down"
    assert roles["embed"] == roles["classifier"] == "other"
    assert len(match(model, adaptable(model, ("classifier",)), "mlp").paths) == 4
    with pytest.raises(UserError, match="'attention-qv' matches no layer of this ModuleDict") as caught:
        match(model, adaptable(model), "attention-qv")
    assert "roles" in caught.value.hint
