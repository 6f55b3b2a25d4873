"""What an experiment file or flags say becomes one experiment with every default, or an error that names the place."""

import pytest
import yaml

from deltatune import Training
from deltatune.comparing.experiment import make_experiment, read_experiment
from deltatune.errors import UserError

WRONG = {
    "a typo at the top": ("bse: minilm", "no setting 'bse'", "base"),
    "a typo in data": ("data: {name: x, txt: body}", "no setting 'data.txt'", "text"),
    "a typo in training": ("training: {epoch: 1}", "no setting 'training.epoch'", "epochs"),
    "a typo in a method": ("methods: [{method: lora, option: {}}]", "no setting 'methods.0.option'", "options"),
    "a typo for a method": ("methods: [{metod: lora}]", "no setting 'methods.0.metod'", "method"),
    "a typo in an option": ("methods: [{method: lora, options: {rnak: 8}}]", "no lora option named 'rnak'", "rank"),
    "a method that is none": ("methods: [{method: lroa}]", "no method named 'lroa'", "lora"),
    "a method without a name": ("methods: [{}]", "methods.0.method is missing", "deltatune methods"),
    "a word for a list": ("methods: lora", "methods should be a list, not 'lora'", "lora:rank=4"),
    "a number for a list": ("seeds: 3", "seeds should be a list, not 3", "seed"),
    "a number for a mapping": ("training: 5", "training should be a mapping, not 5", "share"),
    "a list for a mapping": ("methods: [{method: lora, options: [8]}]", "options should be a mapping", "rank: 8"),
    "nothing for a mapping": ("training:", "training should be a mapping, not None", "share"),
    "no methods": ("methods: []", "methods should have one entry at least", "Names"),
    "a word for a number": (
        "training: {epochs: many}",
        "training.epochs should be a valid number, not 'many'",
        "Passes",
    ),
    "a part of a seed": ("seeds: [1, 2.5]", "seeds.1 should be a valid integer, not 2.5", "seed"),
    "a negative seed": ("seeds: [-1]", "seeds.0 should be greater than or equal to 0, not -1", "seed"),
    "data without a name": ("data: {train: 5}", "data.name is missing", "file"),
    "an empty limit": ("data: {name: x, train: 0}", "data.train should be greater than or equal to 1", "training"),
    "nothing at all": ("", "holds no experiment", "methods: [full, lora]"),
    "a list": ("- full\n- lora", "holds no experiment", "methods: [full, lora]"),
    "a word": ("lora", "holds no experiment", "methods: [full, lora]"),
    "broken YAML": ("seeds: [0\nbase: x", "no valid YAML in line 2", "methods: [full, lora]"),
    "a tab": ("training:\n\tepochs: 1", "no valid YAML in line 2, column 1", "methods: [full, lora]"),
}


@pytest.mark.parametrize(("content", "error", "hint"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_wrong_is_refused_with_place_and_hint(tmp_path, content, error, hint):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        read_experiment(tmp_path / "wrong.yaml", {})
    assert error in refused.value.message
    assert hint in refused.value.hint


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "wrong.yaml").write_bytes(b"base: \xff")
    for path in (tmp_path / "wrong.yaml", tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(UserError, match="could not read " + str(path)):
            read_experiment(path, {})


def test_a_method_can_have_a_storage_of_its_own():
    by_target = {"method": "lora", "storage": {"mlp": "nf4:double=false", "attention": "int8"}}
    one, two, plain = make_experiment({"methods": ["lora:rank=4,storage=nf4", by_target, "lora"]}).methods
    assert (one.label, one.storage) == ("lora (rank=4, storage=nf4)", {"all-linear": "nf4:block=64,double=true"})
    assert two.label == "lora (storage=mlp:nf4:double=false+attention:int8)"
    assert two.storage == {"mlp": "nf4:block=64,double=false", "attention": "int8:block=64,double=true"}
    assert plain.storage == {}
    for wrong, error in (("nf5", "no storage named 'nf5'"), (5, "5 is no storage"), (["nf4"], "is no storage")):
        with pytest.raises(UserError, match=error):
            make_experiment({"methods": [{"method": "lora", "storage": wrong}]})


def test_every_default_is_written_out():
    [full, lora] = make_experiment({"methods": ["full", "lora:rank=4"]}).model_dump(mode="json")["methods"]
    assert (full["label"], full["options"]) == ("full", {"exclude": []})
    assert lora["label"] == "lora (rank=4)"
    assert lora["options"]["rank"] == 4
    assert lora["options"]["targets"] == "all-linear"


def test_what_was_written_out_reads_as_the_same_experiment(tmp_path):
    words = ["full", "lora:targets=[query, value]", {"method": "lora", "label": "큰 LoRA", "options": {"rank": 16}}]
    written = make_experiment({"methods": words, "seeds": [3, 1], "training": {"epochs": 0.5}})
    content = {**written.model_dump(mode="json"), "resolved": {"machine": "any"}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    again = read_experiment(tmp_path / "experiment.yaml", {})
    assert again == written
    assert [cell.id for cell in again.cells()] == [cell.id for cell in written.cells()]


def test_flags_take_the_place_of_what_a_file_says_key_by_key(tmp_path):
    (tmp_path / "e.yaml").write_text(
        "{base: a, data: {name: d, train: 9}, methods: [full], training: {epochs: 3, warmup: 0}}"
    )
    changes = {"base": "b", "data": {"label": "stars"}, "training": {"epochs": 1.0}}
    changed = read_experiment(tmp_path / "e.yaml", changes)
    assert (changed.base, [method.label for method in changed.methods]) == ("b", ["full"])
    assert (changed.data.name, changed.data.train, changed.data.label) == ("d", 9, "stars")
    assert (changed.training.epochs, changed.training.warmup) == (1, 0)


def test_a_limit_alone_is_one_of_the_default_data():
    changed = read_experiment(None, {"data": {"train": 5}, "training": {"epochs": 1}})
    assert (changed.data.name, changed.data.train, changed.data.test) == ("rotten-tomatoes", 5, None)
    assert (changed.training.epochs, changed.training.warmup) == (1, Training().warmup)


def test_a_plain_data_name_keeps_it_when_a_flag_adds_a_column(tmp_path):
    (tmp_path / "e.yaml").write_text("data: reviews.csv")
    data = read_experiment(tmp_path / "e.yaml", {"data": {"text": ["body"]}}).data
    assert (data.name, data.text) == ("reviews.csv", ("body",))


def test_cells_go_seed_by_seed_and_a_seed_counts_once():
    experiment = make_experiment({"methods": ["full", "lora"], "seeds": [0, 1, 0]})
    assert [(cell.seed, cell.method.label) for cell in experiment.cells()] == [
        (0, "full"),
        (0, "lora"),
        (1, "full"),
        (1, "lora"),
    ]


def test_a_method_trains_at_its_own_rate_then_the_experiments_then_its_default():
    words = ["head", "lora:learning_rate=0.01", {"method": "full", "learning_rate": 0.02}]
    rates = [cell.training.learning_rate for cell in make_experiment({"methods": words}).cells()]
    assert rates == [0.01, 0.01, 0.02]
    shared = make_experiment({"methods": words, "training": {"learning_rate": 0.5}}).cells()
    assert [cell.training.learning_rate for cell in shared] == [0.5, 0.01, 0.02]


def test_a_cells_name_changes_with_everything_that_decides_its_result():
    content = {"methods": ["lora"], "data": {"name": "reviews.csv"}}
    plain = make_experiment(content).cells("base", "1", "sha256:a")
    others = [
        make_experiment(content).cells("other", "1", "sha256:a"),
        make_experiment(content).cells("base", "2", "sha256:a"),
        make_experiment(content).cells("base", "1", "sha256:b"),
        make_experiment({**content, "seeds": [1]}).cells("base", "1", "sha256:a"),
        make_experiment({**content, "training": {"epochs": 1}}).cells("base", "1", "sha256:a"),
        make_experiment({**content, "methods": ["lora:rank=4"]}).cells("base", "1", "sha256:a"),
        make_experiment({**content, "data": {"name": "reviews.csv", "train": 9}}).cells("base", "1", "sha256:a"),
    ]
    names = [cell.id for [cell] in (plain, *others)]
    assert len(set(names)) == len(names)
    assert [cell.id for cell in make_experiment(content).cells("base", "1", "sha256:a")] == names[:1]


@pytest.mark.parametrize("label", ["../../up", "한국어 이름", "a/b\\c:d", "x" * 300, "."])
def test_a_label_of_any_letters_gives_a_plain_folder_name(label):
    [cell] = make_experiment({"methods": [{"method": "lora", "label": label}]}).cells()
    assert set(cell.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(cell.id) < 80
    assert cell.method.label == label
