"""SMoLoRA against loops over samples, tokens and experts in float64; what each router sees and who trains it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.adapters.decoding import decoded
from tests.llava.sentences import write_encoder
from workloads.adapters import lora, smolora
from workloads.adapters.base import MLP, Trace
from workloads.adapters.smolora import Config, Sample, SMoLoRALinear
from workloads.errors import UserError

MODES = ("frozen_hash", "straight_through", "scaled")
QUESTIONS = ("what is this ?", "how many are there ?")


def softmax(values):
    powers = [(v - max(float(u.detach()) for u in values)).exp() for v in values]
    return [p / sum(powers) for p in powers]


def slow_half(scores, outputs, mode):
    """Sum of the half's expert outputs (functions of nothing) for one token, each weighed as the mode says."""
    probs = softmax(scores)
    best = max(range(len(scores)), key=lambda n: float(scores[n].detach()))
    if mode == "frozen_hash":
        return outputs[best]()
    if mode == "scaled":
        return probs[best] * outputs[best]()
    total = outputs[best]()
    for prob, output in zip(probs, outputs, strict=True):
        total = total + (prob - prob.detach()) * output()
    return total


def slow_linear(linear, w, x, texts, pooled):
    """The equations, token by token and expert by expert, with the weights `w` by name."""
    config = linear.config
    M, rank_scale = config.num_visual, config.alpha / config.rank_total
    out = []
    for sample, text, tokens in zip(x, texts, pooled, strict=True):
        seen = sum(sample[t] for t in tokens) / len(tokens)
        rows = []
        for token in sample:

            def expert(n, token=token):
                return lambda: rank_scale * (w["experts_B"][n].T @ (w["experts_A"][n] @ token))

            halves = []
            if M:
                scores = [(row * seen).sum() for row in w["router_visual"]]
                halves.append(slow_half(scores, [expert(n) for n in range(M)], config.router_grad))
            if config.num_instruction:
                scores = [(row * text).sum() for row in w["router_instruction"]]
                experts = [expert(M + n) for n in range(config.num_instruction)]
                halves.append(slow_half(scores, experts, config.router_grad))
            shares = [1 / len(halves)] * len(halves)
            if len(halves) == 2 and config.fusion == "learned":
                shares = softmax([(i * half).sum() for i, half in zip(w["fusion_HO"], halves, strict=True)])
            row = linear.base_layer.weight @ token
            if linear.base_layer.bias is not None:
                row = row + linear.base_layer.bias
            rows.append(row + sum(share * half for share, half in zip(shares, halves, strict=True)))
        out.append(torch.stack(rows))
    return torch.stack(out)


class Texts:
    """Stands for an encoder: given vectors for the texts "0", "1", and so on."""

    def __init__(self, vectors):
        self.given, self.width = vectors, vectors.shape[1]

    def vectors(self, texts):
        return torch.stack([self.given[int(text)] for text in texts])


def weights_of(linear):
    """Copies of the adapter's weights and buffers."""
    own = {**dict(linear.named_parameters(recurse=False)), **dict(linear.named_buffers(recurse=False))}
    return {k: v.detach().clone().requires_grad_() for k, v in own.items() if k != "halves_nH"}


def make_linear(B=2, seed=0, pooled=None, dtype=torch.float64, **settings_):
    """One linear with random weights, and sentence vectors for `B` samples."""
    torch.manual_seed(seed)

    def mean(x):
        tokens = pooled or [range(x.shape[1])] * len(x)
        return torch.stack([x[b, list(tokens[b])].mean(dim=0) for b in range(len(x))]).to(
            torch.promote_types(x.dtype, torch.float32)
        )

    config = Config(**settings_)
    texts = torch.randn(B, 3, dtype=torch.promote_types(dtype, torch.float32))
    trace = Trace()
    trace.begin([str(b) for b in range(B)], [""] * B)
    encoder = Texts(texts) if config.num_instruction else None
    base = nn.Linear(5, 4, bias=False).to(dtype).requires_grad_(False)
    linear = SMoLoRALinear(base, config, Sample(trace=trace, pool=mean, encoder=encoder), 0, leads=True)
    for name, tensor in [*linear.named_parameters(recurse=False), *linear.named_buffers(recurse=False)]:
        if name != "halves_nH":
            nn.init.normal_(tensor, std=0.6)
    return linear, texts, trace


def attached(tiny_llava, tmp_path, seed=0, **settings_):
    """A tiny LLaVA with random SMoLoRA weights."""
    given_ = {"num_visual": 3, "num_instruction": 2, "rank_total": 10, "alpha": 15.0, **settings_}
    if given_["num_instruction"]:
        given_["encoder"] = write_encoder(tmp_path / "encoder")
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    config = Config(**given_)
    config.check()
    described = smolora.attach(model, config, trace)
    trace.watch(model)
    trace.begin(QUESTIONS, ("", ""))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.4)
    return model, trace, described


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SMoLoRALinear)}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(MODES), st.sampled_from(["learned", "mean"]), st.integers(0, 3), st.integers(0, 3),
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(mode, fusion, visual, instruction, rank, B, T, seed):
    if visual + instruction == 0:
        visual = 1
    pooled = [range(1 + (seed + b) % T) for b in range(B)]
    linear, texts, _ = make_linear(
        B, seed, pooled=pooled, num_visual=visual, num_instruction=instruction, alpha=7.0,
        rank_total=rank * (visual + instruction), router_grad=mode, fusion=fusion,
    )  # fmt: skip
    w = weights_of(linear)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, slow = linear(x), slow_linear(linear, w, x, texts, pooled)
    close(out, slow)
    probe = torch.randn_like(out)
    named = dict(linear.named_parameters(recurse=False))
    ours = torch.autograd.grad((out * probe).sum(), [x, *named.values()])
    theirs = torch.autograd.grad((slow * probe).sum(), [x, *(w[k] for k in named)], allow_unused=True)
    for key, a, b in zip(["x", *named], ours, theirs, strict=True):
        assert b is not None, key
        close(a, b)


def test_model_equals_a_loop_with_the_means_of_the_prompts_and_the_vectors_of_the_questions(
    tiny_llava, batch, tmp_path
):
    model, trace, _ = attached(tiny_llava, tmp_path, router_grad="scaled")
    trace.prompt_lengths = (8, 7)
    texts = smolora.sentence.load(str(tmp_path / "encoder"), "").vectors(QUESTIONS).double()
    other = tiny_llava()
    slow = {}
    for path, linear in linears(model).items():
        slow[path] = weights_of(linear)
        parent = other.get_submodule(path.rsplit(".", 1)[0])
        replaced = nn.Module()
        replaced.forward = lambda x, linear=linear, w=slow[path]: slow_linear(
            linear, w, x, texts, [range(8), range(7)]
        )
        setattr(parent, path.rsplit(".", 1)[1], replaced)
    mask = batch["attention_mask"].bool()
    ours, theirs = model(**batch).logits[mask], other(**batch).logits[mask]
    close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for path, linear in linears(model).items():
        for name, weight in linear.named_parameters(recurse=False):
            close(weight.grad, slow[path][name].grad)


def test_the_projector_pools_patches_and_hears_the_instruction(tiny_llava, batch, tmp_path):
    model, _, _ = attached(tiny_llava, tmp_path, projector=True)
    texts = smolora.sentence.load(str(tmp_path / "encoder"), "").vectors(QUESTIONS).double()
    projector, seen = model.model.multi_modal_projector, []
    for linear in (projector.linear_1, projector.linear_2):
        linear.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    model(**batch)
    assert len(seen) == 2
    for linear, x, out in seen:
        close(out, slow_linear(linear, weights_of(linear), x, texts, [range(4)] * 2))


@pytest.mark.parametrize("mode", MODES)
def test_task_loss_reaches_the_routers_exactly_as_declared(mode, tiny_llava, batch, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path, router_grad=mode)
    model(**batch).logits.square().sum().backward()
    trained = {name: w for name, w in model.named_parameters() if "router" in name}
    assert described.capabilities.router_hears_task_loss == (mode != "frozen_hash")
    assert bool(trained) == (mode != "frozen_hash")
    assert all(float(w.grad.abs().max()) > 0 for w in trained.values())


def test_released_routers_are_state_that_a_fresh_model_takes_over(tiny_llava, batch, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path, projector=True)
    assert len(described.state) == 2 * (2 * 3 + 2)
    model.model.multi_modal_projector.requires_grad_(True)
    assert not any("router" in name for name, w in model.named_parameters())
    wanted = described.state | {name for name, w in model.named_parameters() if w.requires_grad}
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in wanted}
    assert saved.keys() == wanted
    other, _, _ = attached(tiny_llava, tmp_path, seed=9, projector=True)
    assert (other(**batch).logits - model(**batch).logits).abs().max() > 1e-6
    other.load_state_dict(saved, strict=False)
    close(other(**batch).logits, model(**batch).logits)


def test_an_expert_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient():
    linear, _, _ = make_linear(num_visual=2, num_instruction=2, rank_total=8)
    with torch.no_grad():
        linear.router_visual.zero_()
        linear.router_visual[0] = 1.0
        linear.router_instruction.zero_()  # equal scores: the first expert of the half
    x = torch.rand(2, 4, 5, dtype=torch.float64)
    before = linear(x)
    before.sum().backward()
    for weight in (linear.experts_A, linear.experts_B):
        assert all(weight.grad[n].abs().max() > 0 for n in (0, 2))
        assert all(weight.grad[n].abs().max() == 0 for n in (1, 3))
    with torch.no_grad():
        linear.experts_A[1] = 77.0
        linear.experts_B[3] = 77.0
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("mode", MODES)
def test_one_expert_alone_equals_plain_lora_and_two_equal_ones_do_too(mode, tiny_llava, batch, tmp_path):
    plain = tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0, targets=list(MLP)), Trace())
    sizes = {"num_visual": 1, "num_instruction": 0, "rank_total": 2, "alpha": 4.0, "router_grad": mode}
    single, _, _ = attached(tiny_llava, tmp_path, **sizes)
    twins, _, _ = attached(
        tiny_llava, tmp_path, **{**sizes, "num_instruction": 1, "rank_total": 4, "alpha": 8.0}
    )
    for path, linear in linears(single).items():
        target = plain.get_submodule(path)
        target.lora_A.weight.data = linear.experts_A.data[0].clone()
        target.lora_B.weight.data = linear.experts_B.data[0].T.clone()
        for kind in ("experts_A", "experts_B"):
            getattr(twins.get_submodule(path), kind).data = getattr(linear, kind).data.repeat(2, 1, 1)
    with torch.no_grad():
        expected = plain(**batch).logits
        close(single(**batch).logits, expected)
        close(twins(**batch).logits, expected)


def test_fusion_starts_at_one_half_each():
    linear, texts, _ = make_linear(num_visual=1, num_instruction=1, rank_total=4, alpha=4.0)
    fixed, _, _ = make_linear(num_visual=1, num_instruction=1, rank_total=4, alpha=4.0, fusion="mean")
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        for name in ("experts_A", "experts_B"):
            getattr(fixed, name).copy_(getattr(linear, name))
        fixed.base_layer.weight.copy_(linear.base_layer.weight)
        fixed.experts_B.mul_(1e-9)
        linear.experts_B.mul_(1e-9)  # as at the start, where B is 0
        ours, halves = (m(x) - m.base_layer(x) for m in (linear, fixed))
    torch.testing.assert_close(ours, halves, rtol=1e-5, atol=1e-15)
    assert ours.abs().max() > 0


def test_equal_questions_meet_the_same_instruction_experts_whatever_is_shown(tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path)
    chosen = []
    for linear in linears(model).values():
        linear._choice = lambda x, choose=linear._choice: chosen.append(choose(x)) or chosen[-1]
    trace.begin((QUESTIONS[0], QUESTIONS[0]), ("", ""))
    model(**batch)
    assert all(c.expert_BH[0, 1] == c.expert_BH[1, 1] for c in chosen)
    assert all(3 <= int(c.expert_BH[0, 1]) < 5 for c in chosen)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_equals_the_full_forward(mode, tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path, router_grad=mode)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    trace.begin(QUESTIONS[:1], ("",))
    trace.prompt_lengths = (7,)
    full = model(input_ids=ids, pixel_values=pixels).logits
    close(decoded(model, ids, pixels, 7), full)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_without_padding_gives_the_same_answer(mode, tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path, router_grad=mode)
    padded = model(**batch).logits[1, :9]
    alone = {key: value[1:, :9] if key != "pixel_values" else value[1:] for key, value in batch.items()}
    trace.begin(QUESTIONS[1:], ("",))
    close(padded, model(**alone).logits[0])


def test_compat_pools_over_padding_and_over_the_decoded_token_alone():
    linear, texts, trace = make_linear(
        num_visual=2, num_instruction=2, rank_total=8, compat=True, pooled=[[0], [0]]
    )
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    close(linear(x), slow_linear(linear, weights_of(linear), x, texts, [range(5)] * 2))
    trace.phase = "decode"
    close(linear(x[:, :1]), slow_linear(linear, weights_of(linear), x[:, :1], texts, [[0]] * 2))


@pytest.mark.parametrize("mode", MODES)
def test_routers_and_fusion_compute_in_fp32_under_bf16(mode):
    linear, texts, trace = make_linear(
        dtype=torch.bfloat16, num_visual=3, num_instruction=2, rank_total=10, router_grad=mode
    )
    x = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    out = linear(x)
    assert out.dtype == torch.bfloat16
    expected = (x.mean(dim=1).float() @ linear.router_visual.detach().float().T).softmax(dim=-1)
    torch.testing.assert_close(trace.routes[0].probs_BTE[:, 0], expected, rtol=1e-5, atol=1e-6)
    inner = torch.randn(2, 4, len(linear.halves_nH), 2, dtype=torch.bfloat16)
    B = torch.randn(*inner.shape[-2:], 4, dtype=torch.bfloat16)
    assert linear._fusion(inner, B).dtype == torch.float32
    out.float().sum().backward()
    assert all(w.grad is not None for w in linear.parameters() if w.requires_grad)


def test_each_block_reports_its_visual_router(tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path)
    model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    assert trace.routes[0].probs_BTE.shape == (2, 12, 3)
    trace.clear()
    words_only, trace, _ = attached(tiny_llava, tmp_path, num_visual=0, rank_total=4)
    words_only(**batch)
    assert trace.routes[0].probs_BTE.shape == (2, 12, 2)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_gradient(mode, tiny_llava, batch, tmp_path):
    results = []
    for checkpointing in (False, True):
        model, _, _ = attached(tiny_llava, tmp_path / str(checkpointing), router_grad=mode)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch, use_cache=False).logits.square().mean().backward()
        results.append({name: w.grad for name, w in model.named_parameters() if w.requires_grad})
    for name, gradient in results[0].items():
        assert gradient is not None, name
        close(gradient, results[1][name])


def test_weights_equal_the_formula_at_7b_size(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    encoder = write_encoder(tmp_path, width=384)  # as MiniLM
    config = Config(rank_total=128, alpha=256.0, router_grad="scaled", projector=True, encoder=encoder)
    described = smolora.attach(model, config, Trace())
    d, f = 4096, 11008

    def size(i, o):
        return 8 * 16 * (i + o) + 4 * i + 4 * 384 + 2 * o

    blocks = [(d, f), (d, f), (f, d)]
    projector = [(1024, d), (d, d)]
    in_blocks = 32 * sum(size(i, o) for i, o in blocks)
    assert described.num_weights == in_blocks + sum(size(i, o) for i, o in projector)
    assert round(in_blocks / 1e6, 1) == 189.9
    assert round(sum(128 * (i + o) for i, o in projector) / 1e6, 1) == 1.7
    experts = sum(n * 16 * (i + o) for n, sizes in ((32, blocks), (1, projector)) for i, o in sizes)
    assert described.num_active == described.num_weights - 6 * experts


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"num_visual": -1}, "adapter.num_visual"),
        ({"num_visual": 0, "num_instruction": 0}, "one half needs an expert"),
        (
            {"rank_total": 9},
            r"adapter\.rank_total: 9 is not allowed; a multiple of the number of experts \(8\)",
        ),
        ({"alpha": 0.0}, "adapter.alpha"),
        ({"dropout": 1.0}, "adapter.dropout"),
    ],
)
def test_settings_out_of_range_are_told(settings_, match):
    with pytest.raises(UserError, match=match):
        Config(**settings_).check()


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_drawn_for_each_expert_in_training_alone(mode):
    linear, _, _ = make_linear(
        dropout=0.5, num_visual=1, num_instruction=1, rank_total=4, router_grad=mode, fusion="mean"
    )
    with torch.no_grad():
        # Equal experts of opposite sign cancel unless their draws differ.
        linear.experts_A[1] = linear.experts_A[0]
        linear.experts_B[1] = -linear.experts_B[0]
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    linear.eval()
    close(linear(x), linear.base_layer(x))
    linear.train()
    assert (linear(x) - linear.base_layer(x)).abs().max() > 0.01
