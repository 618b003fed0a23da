"""Methods as one plain LoRA: merged into the base, exported for PEFT, and PEFT's own folders read back."""

import re

import pytest
import torch

from tests.adapters.folder_tools import in_language_model, peft_folder
from tests.adapters.minimal import TASKS, cases, draw, drawn
from workloads import adapters
from workloads.adapters import mtl_lora
from workloads.adapters.base import Attached, Capabilities
from workloads.errors import UserError


def is_one_lora(described):
    """Whether the method computes one LoRA for a task; where routers choose among LoRAs, merging takes one of them."""
    return described.capabilities.mergeable and described.capabilities.routing in ("none", "task")


@pytest.mark.parametrize("case", cases())
def test_merged_it_gives_equal_logits_or_refuses_with_its_reason(config, tiny_llava, batch):
    model, trace, described = drawn(tiny_llava, config)
    if isinstance(described.as_lora, str):
        assert not described.capabilities.mergeable
        with pytest.raises(UserError, match=re.escape(f"cannot be merged: {described.as_lora}")):
            adapters.merge(model, described)
        return
    assert described.capabilities.mergeable
    for task in TASKS:
        model, trace, described = drawn(tiny_llava, config, tasks=(task, task))
        routed, plain = model(**batch).logits, tiny_llava()
        with torch.no_grad():
            for path, (A, B, scale) in described.as_lora(task).items():
                linear = plain.get_submodule(path)
                for r in range(len(A)):
                    linear.weight += scale * torch.outer(B[:, r], A[r])
        adapters.merge(model, described, task)
        merged = model(**batch).logits
        torch.testing.assert_close(merged, plain(**batch).logits, rtol=0, atol=1e-9)
        assert not any(hasattr(module, "base_layer") for module in model.modules())
        if is_one_lora(described):
            torch.testing.assert_close(merged, routed, rtol=0, atol=1e-5)
            assert (merged - tiny_llava()(**batch).logits).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", cases())
def test_exported_peft_gives_equal_logits_and_so_does_our_lora(config, tiny_llava, batch, tmp_path):
    from peft import PeftModel

    model, trace, described = drawn(tiny_llava, config, tasks=TASKS[:1] * 2)
    if isinstance(described.as_lora, str):
        with pytest.raises(UserError, match="cannot be exported"):
            adapters.export(tmp_path / "plain", model, described, "tiny")
        return
    model.model.multi_modal_projector.requires_grad_(True)
    draw(model, {name for name, w in model.named_parameters() if w.requires_grad}, seed=5)
    adapters.export(tmp_path / "plain", model, described, "tiny", TASKS[0])
    routed = model(**batch).logits
    adapters.merge(model, described, TASKS[0])
    merged = model(**batch).logits
    theirs = PeftModel.from_pretrained(tiny_llava(), tmp_path / "plain").double().eval()(**batch).logits
    torch.testing.assert_close(theirs, merged, rtol=0, atol=1e-5)
    if is_one_lora(described):
        torch.testing.assert_close(theirs, routed, rtol=0, atol=1e-5)
    again = tiny_llava()
    restored, _ = adapters.load(again, tmp_path / "plain")
    assert restored.num_weights > 0
    torch.testing.assert_close(again(**batch).logits, merged, rtol=0, atol=1e-9)


def test_linears_of_different_rank_and_scale_export_as_one_lora(tiny_llava, batch, tmp_path):
    from peft import PeftModel

    dice = torch.Generator().manual_seed(0)
    model, folded = tiny_llava(), tiny_llava()
    plain = {}
    for i, (rank, scale) in enumerate(((1, 0.5), (3, 2.0), (2, 1.0))):
        path = f"model.language_model.layers.{i % 2}.self_attn.{'qkv'[i]}_proj"
        A, B = (torch.randn(shape, generator=dice, dtype=torch.float64) for shape in ((rank, 16), (16, rank)))
        plain[path] = (A, B, scale)
        with torch.no_grad():
            folded.get_submodule(path).weight += scale * B @ A
    attached = Attached(
        capabilities=Capabilities(mergeable=True), num_weights=0, num_active=0, as_lora=lambda task: plain
    )
    adapters.export(tmp_path, model, attached, "tiny")
    theirs = PeftModel.from_pretrained(tiny_llava(), tmp_path).double().eval()
    torch.testing.assert_close(theirs(**batch).logits, folded(**batch).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}])
def test_a_lora_that_peft_trained_loads_as_ours_with_equal_logits(settings, tiny_llava, batch, tmp_path):
    theirs = peft_folder(tiny_llava(), tmp_path, seed=1, r=3, lora_alpha=5, **settings)
    ours = tiny_llava()
    attached, _ = adapters.load(ours, tmp_path)
    assert attached.num_weights > 0
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-5)


def test_a_projector_that_peft_trained_comes_along(tiny_llava, batch, tmp_path):
    theirs = peft_folder(tiny_llava(), tmp_path, seed=1, r=2, modules_to_save=["multi_modal_projector"])
    ours = tiny_llava()
    adapters.load(ours, tmp_path)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-5)
    assert all(weight.requires_grad for weight in ours.model.multi_modal_projector.parameters())


def test_a_folder_whose_lora_lacks_a_block_is_refused(tiny_llava, tmp_path):
    peft_folder(tiny_llava(), tmp_path, leaves=("q_proj",), layers_to_transform=None, r=2)
    weights = {name: w for name, w in adapters.read(tmp_path).items() if ".layers.0." not in name}
    tree = {**adapters.settings(tmp_path), "target_modules": in_language_model(("q_proj",))}
    adapters.write(tmp_path, weights, tree)
    with pytest.raises(UserError, match=r"lacks .*layers\.0\.self_attn\.q_proj\.lora_A"):
        adapters.load(tiny_llava(), tmp_path)


def test_a_folder_without_an_adapter_is_told(tiny_llava, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: has no readable adapter_config.json")):
        adapters.load(tiny_llava(), tmp_path)
    (tmp_path / adapters.CONFIG).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        adapters.load(tiny_llava(), tmp_path)


def test_merging_for_an_unknown_task_is_refused(tiny_llava):
    from workloads.adapters.base import Trace

    model = tiny_llava()
    attached = mtl_lora.attach(model, mtl_lora.Config(tasks=list(TASKS)), Trace())
    with pytest.raises(UserError, match="did you mean 'general'"):
        adapters.merge(model, attached, "generals")


def test_merging_in_half_precision_rounds_once(tiny_llava):
    from workloads.adapters.base import Trace

    model = tiny_llava().bfloat16()
    base = {name: w.clone() for name, w in model.named_parameters()}
    attached = mtl_lora.attach(model, mtl_lora.Config(tasks=list(TASKS)), Trace())
    draw(model, adapters.saved_names(model, attached), seed=1)
    plain = {p: (A.float(), B.float(), scale) for p, (A, B, scale) in attached.as_lora(TASKS[0]).items()}
    adapters.merge(model, attached, TASKS[0])
    for path, (A, B, scale) in plain.items():
        wanted = (base[f"{path}.weight"].float() + scale * (B @ A)).bfloat16()
        assert torch.equal(model.get_submodule(path).weight, wanted)
