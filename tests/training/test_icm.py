"""ICM-LoRA's pipeline: the loss against a loop, standardising, and from collected LoRAs to a generated one."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from workloads import adapters
from workloads.adapters import icm_lora, lora
from workloads.adapters.base import Trace
from workloads.errors import UserError
from workloads.training import icm


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99))
def test_the_loss_equals_a_loop_forward_and_backward(rows, numbers, latent, kl_weight, seed):
    torch.manual_seed(seed)
    target = torch.randn(rows, numbers, dtype=torch.float64)
    output = torch.randn(rows, numbers, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(rows, latent, dtype=torch.float64, requires_grad=True)
    log_variance = torch.randn(rows, latent, dtype=torch.float64, requires_grad=True)
    slow = torch.zeros((), dtype=torch.float64)
    for b in range(rows):
        for n in range(numbers):
            slow = slow + (output[b, n] - target[b, n]) ** 2 / (rows * numbers)
        for z in range(latent):
            # KL of N(m, s^2) from N(0, 1): (s^2 + m^2 - 1) / 2 - ln s.
            deviation = (log_variance[b, z] / 2).exp()
            divergence = (deviation**2 + mean[b, z] ** 2 - 1) / 2 - deviation.log()
            slow = slow + kl_weight * divergence / rows
    ours = icm.vae_loss(target, output, mean, log_variance, kl_weight)
    torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-12)
    inputs = [output, mean, log_variance]
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_standardised_numbers_come_back_and_have_one_deviation_per_tensor():
    torch.manual_seed(0)
    numbers = torch.randn(5, 7) * torch.tensor([1.0, 1, 1, 100, 100, 100, 100]) + 3
    layout = icm_lora.Layout(names=("a", "b"), shapes=((3,), (2, 2)))
    rows, mean, deviation = icm.standardised(numbers, layout)
    torch.testing.assert_close(rows * deviation + mean, numbers, rtol=1e-5, atol=1e-4)
    assert deviation[:3].unique().numel() == deviation[3:].unique().numel() == 1
    for part in (rows[:, :3], rows[:, 3:]):
        assert math.isclose(float(part.square().mean()), 1, rel_tol=1e-4)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(7), rtol=0, atol=1e-5)
    same, _, ones = icm.standardised(torch.full((3, 7), 2.0), layout)
    assert torch.equal(same, torch.zeros(3, 7))
    assert torch.equal(ones, torch.ones(7))


@pytest.fixture
def loras(tiny_llava, tmp_path):
    """Eight LoRAs of each of two tasks: a centre of the task's own, and small steps around it."""
    model, config = tiny_llava(), lora.Config(rank=1, alpha=2.0)
    attached = lora.attach(model, config, Trace())
    names = [name for name, w in model.named_parameters() if w.requires_grad]
    shapes = {name: model.get_parameter(name).shape for name in names}
    dice = torch.Generator().manual_seed(0)
    for task in ("document", "general"):
        centre = {name: torch.randn(shape, generator=dice) * 0.3 for name, shape in shapes.items()}
        for i in range(8):
            near = {name: w + torch.randn(w.shape, generator=dice) * 0.03 for name, w in centre.items()}
            adapters.save(tmp_path / "loras" / task / f"{i:04d}", near, config, attached, "tiny")
        save_file({"vector": torch.randn(6, generator=dice)}, tmp_path / "loras" / task / "task.safetensors")
    return tmp_path / "loras"


def test_from_collected_loras_to_a_generated_one(loras, tiny_llava, batch, tmp_path):
    collected = icm.read_collected(loras)
    assert collected.tasks == ("document", "general")
    assert collected.owners.tolist() == [0] * 8 + [1] * 8
    size = collected.numbers.shape[1]
    shape = icm_lora.Shape(num_numbers=size, condition=6, latent=8, channels=(8, 16, 32, 16), kernel=5)
    plan = icm.Training(steps=200, batch=8, lr=5e-3)
    generator, losses = icm.train(collected, plan, shape)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    generator.save(tmp_path / "generator")
    centres = {
        task: collected.numbers[collected.owners == i].mean(0) for i, task in enumerate(collected.tasks)
    }
    for task, other in (("general", "document"), ("document", "general")):
        icm.generate(tmp_path / "generator", task, 0, tmp_path / task)
        model = tiny_llava()
        attached, _ = adapters.load(model, tmp_path / task)
        assert attached.num_weights == size
        drawn = collected.layout.flatten(adapters.read(tmp_path / task))
        assert (drawn - centres[task]).norm() < 0.5 * (drawn - centres[other]).norm()
        assert not torch.equal(model(**batch).logits, tiny_llava()(**batch).logits)


def test_a_generated_folder_loads_in_peft_with_equal_logits(loras, tiny_llava, batch, tmp_path):
    from peft import PeftModel

    collected = icm.read_collected(loras)
    shape = icm_lora.Shape(
        num_numbers=collected.numbers.shape[1], condition=6, latent=2, channels=(2, 2), kernel=3
    )
    generator, _ = icm.train(collected, icm.Training(steps=1), shape)
    generator.save(tmp_path / "generator")
    icm.generate(tmp_path / "generator", "general", 5, tmp_path / "out")
    model = tiny_llava()
    adapters.load(model, tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_llava(), tmp_path / "out").double().eval()
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-6)


def test_training_is_the_same_for_a_seed(loras):
    collected = icm.read_collected(loras)
    shape = icm_lora.Shape(
        num_numbers=collected.numbers.shape[1], condition=6, latent=2, channels=(2, 2), kernel=3
    )
    runs = [icm.train(collected, icm.Training(steps=3, seed=seed), shape)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_loras_of_another_kind_are_refused(loras):
    path = loras / "general" / "0003" / "adapter_config.json"
    tree = json.loads(path.read_text())
    tree["method"]["alpha"] = 7.0
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="0003.*another kind of LoRA"):
        icm.read_collected(loras)


def test_a_folder_without_tasks_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no tasks"):
        icm.read_collected(tmp_path)


def test_collecting_walks_on_from_a_trained_lora_and_states_the_task(tmp_path):
    from workloads.config import DataConfig, ModelConfig
    from workloads.data import pool
    from workloads.llava.build import build

    llava = build(ModelConfig(), "fp32")
    samples = pool.load(DataConfig(), "general", "train", llava.prompter)
    chosen = [samples.sample(samples.accepted[i]) for i in range(4)]
    single = torch.stack([icm.task_vector(llava, [sample]) for sample in chosen])
    config = lora.Config(rank=1)
    attached = lora.attach(llava.model, config, Trace())
    weights = {name: w for name, w in llava.model.named_parameters() if w.requires_grad}
    adapters.save(tmp_path / "start", weights, config, attached, "pocket")
    plan = icm.Collecting(num_loras=2, every=1, batch=2, num_samples=4)
    icm.collect(tmp_path / "start", ["general"], tmp_path / "loras" / "general", plan)
    collected = icm.read_collected(tmp_path / "loras")
    torch.testing.assert_close(collected.vectors[0], single.mean(dim=0), rtol=1e-4, atol=1e-5)
    start = collected.layout.flatten(adapters.read(tmp_path / "start"))
    assert len(collected.numbers) == 2
    moved = [float((row - start).abs().max()) for row in collected.numbers]
    assert 0 < moved[0] < 2e-4
    assert moved[0] < moved[1] < 3e-4


def test_an_adapter_with_a_projector_cannot_be_a_start(tiny_llava, tmp_path):
    model, config = tiny_llava(), lora.Config(rank=1)
    attached = lora.attach(model, config, Trace())
    model.model.multi_modal_projector.requires_grad_(True)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    adapters.save(tmp_path, weights, config, attached, "pocket")
    with pytest.raises(UserError, match="train_projector=false"):
        icm.collect(tmp_path, ["general"], tmp_path / "out", icm.Collecting())
