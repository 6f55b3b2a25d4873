"""Which kind of method works on which architecture: it trains there, or is refused by name and leaves the model alone.

One or two methods of a kind stand for it: all of a kind find their places in one way.
"""

import pytest
import torch

import deltatune
from conformance.cases import EVERY, PROMPTS
from deltatune.errors import UserError
from deltatune.methods import METHODS
from deltatune.models.attach import trainable_parameters
from tiny import ARCHITECTURES, tiny_images, tiny_inputs, tiny_model

OF_EACH_KIND = ("lora", "houlsby", "parallel", "prompt", "prefix", "full", "bitfit", "norms", "last-k", "lora+prefix")
REFUSED = {
    ("llama", "bitfit"): "bitfit: 'biases' names no parameter",
    ("t5", "bitfit"): "bitfit: 'biases' names no parameter",
    ("vit", "prompt"): "ViTModel takes no",
}
"""Why, in words of the error; every other pair works."""


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "vit"])
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_method_trains_on_an_architecture_or_says_why_it_cannot(architecture: str, name: str) -> None:
    method = {**EVERY, **PROMPTS}[name] if name in METHODS else deltatune.make(name)
    model = tiny_model(architecture)
    before = model.state_dict().keys()
    if (architecture, name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[architecture, name]):
            deltatune.attach(model, method)
        assert model.state_dict().keys() == before
        return
    model = deltatune.attach(model, method).train()
    model.config.pad_token_id = 0
    inputs = tiny_images() if architecture == "vit" else tiny_inputs()
    model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    trains = trainable_parameters(model)
    assert [name for name, parameter in trains.items() if parameter.grad is None] == []
    own = [parameter for part in model.attachment.parts for parameter in part.trained()]
    assert any(parameter.grad.any() for parameter in own), "the head alone got a gradient"


def test_every_kind_is_in_the_table() -> None:
    parts = {part for name in OF_EACH_KIND for part in name.split("+")}
    assert {METHODS[part].kind for part in parts} == {method.kind for method in METHODS.values()}
