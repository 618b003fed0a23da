"""Strict configuration: every mistake is one line that names the key, the value and what is allowed."""

import dataclasses

import pytest

from workloads.config import from_tree, load, to_tree
from workloads.errors import UserError

GOOD = {"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0, "document": 2.0}}}


def changed(**parts):
    return {**GOOD, **parts}


def test_tree_and_config_are_inverse():
    config = from_tree(changed(seed=3, optim={"lr": 0.01}))
    assert from_tree(to_tree(config)) == config
    assert (config.seed, config.optim.lr, config.adapter.name) == (3, 0.01, "lora")


def test_what_only_ewc_is_refused_for_goes_with_lwf():
    method = {"name": "cl_moe", "tasks": ["a", "b"]}
    assert from_tree(changed(continual={"regulariser": "lwf"}, adapter=method)).continual.regulariser == "lwf"


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_tree(GOOD).seed = 2


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (changed(sead=1), ["sead", "did you mean 'seed'"]),
        (changed(optim={"rl": 1}), ["optim.rl", "known keys"]),
        (changed(optim={"global_bach": 8}), ["optim.global_bach", "did you mean 'global_batch'"]),
        (changed(adapter={"name": "mol"}), ["adapter.name", "'mol'", "did you mean 'mole'"]),
        (changed(adapter={}), ["adapter.name"]),
        (changed(adapter={"name": "lora", "rank": 0}), ["adapter.rank", "0"]),
        (changed(adapter={"name": "mole", "num_experts": 0}), ["adapter.num_experts", "0"]),
        (changed(adapter={"name": "mole", "router_grad": "soft"}), ["adapter.router_grad", "soft"]),
        (changed(data={"mixture": {}}), ["data.mixture"]),
        (changed(data={"mixture": {"general": -1.0}}), ["data.mixture.general", "-1.0"]),
        (changed(data={"mixture": {"general": 0.0}}), ["data.mixture", "above 0"]),
        (changed(data={"mixture": {"general": float("nan")}}), ["data.mixture.general", "nan", "finite"]),
        (changed(optim={"lr": float("inf")}), ["optim.lr", "inf"]),
        (changed(continual={"tsk": "a"}), ["continual.tsk", "did you mean 'task'"]),
        (changed(continual={"regulariser": "ewcc"}), ["continual.regulariser", "ewcc"]),
        (changed(continual={"weight": -1.0}), ["continual.weight", "-1.0"]),
        (changed(continual={"fisher_samples": 0}), ["continual.fisher_samples", "0"]),
        (changed(continual={"temperature": 0.0}), ["continual.temperature", "above 0"]),
        (changed(continual={"replay_share": 1.5}), ["continual.replay_share", "1.5", "from 0 to 1"]),
        (
            changed(continual={"replay": "balanced"}),
            ["continual.replay_share", "0.0", "above 0", "'balanced'"],
        ),
        (
            changed(continual={"regulariser": "ewc"}, execution={"zero_stage": 3}),
            ["execution.zero_stage: 3", "'ewc'"],
        ),
        (
            changed(continual={"regulariser": "lwf"}, execution={"zero_stage": 3}),
            ["execution.zero_stage: 3", "'lwf'"],
        ),
        (
            changed(continual={"regulariser": "ewc"}, adapter={"name": "cl_moe", "tasks": ["a", "b"]}),
            ["continual.regulariser: 'ewc' is not allowed; none or lwf with cl_moe"],
        ),
        (changed(optim={"lr": "fast"}), ["optim.lr", "fast"]),
        (changed(execution={"zero_stage": 4}), ["execution.zero_stage", "4"]),
        (changed(execution={"workers": 3}), ["optim.global_batch", "multiple"]),
        (changed(schema_version=99), ["schema_version", "99"]),
        (changed(optim=[1]), ["optim", "mapping"]),
        (changed(seed="one"), ["seed", "one"]),
        (changed(seed=2**70), ["seed", "2**63"]),
        (changed(optim=0), ["optim", "mapping"]),
        (changed(optim={"lr": "inf"}), ["optim.lr", "inf", "finite"]),
        (changed(adapter={"name": "lora", "alpha": "nan"}), ["adapter.alpha", "nan", "finite"]),
        (changed(adapter={"name": "mole", "alpha": 0}), ["adapter.alpha", "above 0"]),
        (changed(data={"mixture": {"general": "inf"}}), ["data.mixture.general", "finite"]),
        (changed(data={"mixture": [1]}), ["data.mixture", "[1]", "a mapping"]),
        (changed(eval={"domains": {"a": 1}}), ["eval.domains", "a list"]),
        (changed(data={"domains": [1]}), ["data.domains", "[1]", "a mapping"]),
        (changed(data={"domains": {"d": {"columns": 3}}}), ["data.domains.d.columns", "3", "a mapping"]),
        (changed(init_from="../../x"), ["init_from", "16 hex digits"]),
    ],
)
def test_a_mistake_is_told_in_one_line(tree, words):
    with pytest.raises(UserError) as error:
        from_tree(tree)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_interpolation_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: ${oc.env:HOME}\nadapter: {name: lora}\n")
    with pytest.raises(UserError, match="interpolation"):
        load(path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "a: b: c\n"])
def test_malformed_files_are_told_in_one_line(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.yaml")


def test_overrides_win_and_are_checked(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("adapter: {name: lora, rank: 4}\ndata: {mixture: {general: 1}}\n")
    assert load(path, ["adapter.rank=16", "optim.lr=1e-4"]).adapter.rank == 16
    with pytest.raises(UserError, match="key=value"):
        load(path, ["adapter.rank"])
    with pytest.raises(UserError, match="did you mean 'rank'"):
        load(path, ["adapter.rnk=2"])
    with pytest.raises(UserError, match="override"):
        load(path, ["adapter.targets=[q_proj"])
    with pytest.raises(UserError, match="every value has to be given"):
        load(path, ["optim.lr=???"])
