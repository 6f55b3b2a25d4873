from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from deltatune.data import load_data
from deltatune.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEATURES = Features(
    {"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "idx": Value("int32")}
)


def table(count, labels):
    rows = [{"sentence": f"{count} {i}", "label": labels[i % len(labels)], "idx": i} for i in range(count)]
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set; records what is asked of it."""
    asked = SimpleNamespace(info=[], load=[])
    tables = DatasetDict(train=table(60, (0, 1)), validation=table(20, (0, 1)), test=table(20, (-1,)))

    def dataset_info(self, repository, revision=None):
        asked.info.append((repository, revision))
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(*names, **options):
        asked.load.append((names, options))
        if names[1] is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']")
        return tables

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_id_is_resolved_once_to_a_commit_and_read_there(hub):
    data = load_data("nyu-mll/glue:sst2@main")
    assert data.revision == COMMIT
    assert hub.info == [("nyu-mll/glue", "main")]
    assert hub.load == [(("nyu-mll/glue", "sst2"), {"revision": COMMIT})]
    assert data.labels == ("negative", "positive")
    assert (data.text, data.label) == (("sentence",), "label")
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 20, 6)
    assert data.splitting.endswith("the test split that came along has no labels")


def test_a_commit_needs_no_resolving(hub):
    assert load_data(f"nyu-mll/glue:sst2@{COMMIT}").revision == COMMIT
    assert hub.info == []


def test_a_missing_configuration_is_asked_for(hub):
    with pytest.raises(UserError, match=r"available configs: .*'sst2'") as error:
        load_data("nyu-mll/glue")
    assert "nyu-mll/glue:CONFIGURATION" in error.value.hint


def test_without_a_network_the_hub_id_and_the_way_out_are_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="no file or folder 'owner/name' here, and the hub could not be reached"
    ) as error:
        load_data("owner/name@v1")
    assert "local file" in error.value.hint
