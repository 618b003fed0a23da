"""Random generators come back to the bit: the CPU's, and a GPU's where there is one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from workloads.training import checkpoint


def draws():
    return torch.rand(5).tolist()


def test_random_numbers_go_on_where_they_were_saved(tmp_path):
    torch.manual_seed(3)
    draws()
    save_file(checkpoint.rng_state(), tmp_path / "rng.safetensors")
    wanted = [draws(), draws()]
    checkpoint.restore_rng(load_file(tmp_path / "rng.safetensors"))
    assert [draws(), draws()] == wanted


@pytest.fixture
def gpu(monkeypatch):
    """Stands for the generator of a GPU; a dict that holds its state."""
    state = {"now": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state["now"] + device.index)

    def put(value, device):
        state["now"] = value - device.index

    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    return state


def test_the_gpus_generator_is_saved_and_restored(gpu, tmp_path):
    before = gpu["now"].clone()
    save_file(checkpoint.rng_state(), tmp_path / "rng.safetensors")
    gpu["now"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.restore_rng(load_file(tmp_path / "rng.safetensors"))
    assert torch.equal(gpu["now"], before)


def test_a_checkpoint_without_a_gpus_state_leaves_its_generator(gpu):
    before = gpu["now"].clone()
    state = checkpoint.rng_state()
    cpu_alone = {name: value for name, value in state.items() if "cuda" not in name}
    assert len(cpu_alone) == 1 == len(state) - 1
    gpu["now"] = before + 1
    checkpoint.restore_rng(cpu_alone)
    assert torch.equal(gpu["now"], before + 1)
