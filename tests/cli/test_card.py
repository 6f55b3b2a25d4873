"""The model card that comes with each adapter: read as the hub reads it, its code run as it stands."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from deltatune.comparing.experiment import make_experiment
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import mean_interval
from deltatune.comparing.table import interval_text, percent
from deltatune.training.saved import open_adapter


@pytest.fixture(scope="module")
def card(tuned):
    return ModelCard.load(tuned.folder / "adapter" / "README.md")


@pytest.fixture(scope="module")
def result(tuned):
    return CellResult.model_validate_json((tuned.folder / "result.json").read_text())


def test_the_hub_finds_what_it_looks_for_and_no_local_path_as_an_id(card, result):
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert {"deltatune", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == result.test


def test_people_find_scores_with_their_interval_and_every_option(card, result):
    interval = interval_text(mean_interval([result]))
    validation = percent(result.validation["accuracy"])
    assert f"| Accuracy | {percent(result.quality)} | {interval} | {validation} |" in card.text
    assert "rank=4" in card.text
    assert "긍정" in card.text
    assert f"{result.trainable:,} trained parameters" in card.text


def test_its_code_loads_the_adapter_in_deltatune_and_in_peft(card, tuned):
    codes = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(codes) == 2
    ids = torch.arange(5, 12).view(1, -1)
    wanted = open_adapter(tuned.folder, precision="fp32").base.model(ids).logits
    for code in codes:
        names: dict = {}
        exec(code.replace("THIS-FOLDER", str(tuned.folder / "adapter")), names)
        assert torch.allclose(names["model"].eval()(ids).logits, wanted, atol=1e-5)


def test_its_experiment_is_the_run_that_made_it(card, tuned):
    [content] = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    [cell] = make_experiment(yaml.safe_load(content)).cells()
    ran = yaml.safe_load((tuned.folder / "spec.json").read_text())
    assert cell.model_dump(mode="json") == ran
