"""BranchLoRA against loops over samples, tokens and branches in float64; tasks, freezing, and the selector."""

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
from workloads.adapters import branch_lora, lora
from workloads.adapters.base import Trace
from workloads.adapters.branch_lora import BranchLinear, Config, Sample
from workloads.adapters.parts.placing import Spot
from workloads.adapters.parts.pooling import ROUTER_POOLS
from workloads.errors import UserError
from workloads.routing import ROUTER_GRADS

QUESTIONS = ("what is this ?", "how many are there ?")
TASKS = ["name", "count", "place"]


def softmax(values):
    powers = [(v - max(float(u.detach()) for u in values)).exp() for v in values]
    return [p / sum(powers) for p in powers]


def slow_gates(scores, top_k, mode):
    """One number a branch; what carries a gradient is a tensor."""
    probs = softmax(scores)
    best = sorted(range(len(scores)), key=lambda n: -float(scores[n].detach()))[:top_k]
    if mode == "dense":
        return probs
    if mode == "scaled":
        among = softmax([scores[n] for n in best])
        return [among[best.index(n)] if n in best else 0.0 for n in range(len(scores))]
    even = [1 / top_k if n in best else 0.0 for n in range(len(scores))]
    return even if mode == "hard" else [e + (p - p.detach()) for e, p in zip(even, probs, strict=True)]


class SlowBranch(nn.Module):
    """The equations, sample by sample, token by token and branch by branch."""

    def __init__(self, linear, pooled, tasks):
        """`pooled` holds the tokens that each sample's router sees, `tasks` the number of its router."""
        super().__init__()
        self.base, self.config, self.pooled, self.tasks = linear.base_layer, linear.config, pooled, tasks
        self.w = {k: v.detach().clone().requires_grad_() for k, v in linear.named_parameters(recurse=False)}

    def forward(self, x):
        config, w, out = self.config, self.w, []
        for sample, tokens, task in zip(x, self.pooled, self.tasks, strict=True):
            seen = sum(sample[t] for t in tokens) / len(tokens)
            scores = [(row * seen).sum() for row in w[f"router_{task}"]]
            gates = slow_gates(scores, config.top_k, config.router_grad)
            rows = []
            for token in sample:
                inner = w["trunk_A"] @ token
                row = self.base.weight @ token
                for n, gate in enumerate(gates):
                    if not (isinstance(gate, float) and gate == 0.0):
                        row = row + config.alpha / config.rank_total * gate * (w[f"branch_{n}_B"].T @ inner)
                rows.append(row)
            out.append(torch.stack(rows))
        return torch.stack(out)


def make_linear(seed=0, pooled=None, dtype=torch.float64, **settings_):
    """One linear with random weights whose pool is the mean over `pooled` tokens of each sample (all at first)."""
    torch.manual_seed(seed)

    def mean(x):
        tokens = pooled or [range(x.shape[1])] * len(x)
        return torch.stack([x[b, list(tokens[b])].mean(dim=0) for b in range(len(x))]).to(
            torch.promote_types(x.dtype, torch.float32)
        )

    config, trace = Config(**settings_), Trace()
    base = nn.Linear(5, 4, bias=False).to(dtype).requires_grad_(False)
    spot = Spot(path="x", layer=0, leads=True)
    linear = BranchLinear(base, config, spot, Sample(trace=trace, pool=mean))
    for weight in linear.parameters():
        nn.init.normal_(weight, std=0.6)
    return linear, trace


def attached(tiny_llava, tmp_path=None, seed=0, **settings_):
    """A tiny LLaVA with random BranchLoRA weights."""
    settings_ = {"num_branches": 3, "rank_total": 6, "alpha": 9.0, "min_tunable": 1, **settings_}
    if tmp_path is not None:
        settings_ |= {"task_routers": True, "tasks": TASKS, "encoder": write_encoder(tmp_path / "encoder")}
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    config = Config(**settings_)
    config.check()
    described = branch_lora.attach(model, config, trace)
    trace.watch(model)
    trace.begin(QUESTIONS, ("name", "place"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3)
    return model, trace, described


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BranchLinear)}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(ROUTER_GRADS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4),
    st.integers(0, 99),
)  # fmt: skip
def test_linear_equals_a_loop_forward_and_backward(mode, branches, rank, B, T, seed):
    top_k = 1 + seed % branches
    pooled = [range(1 + (seed + b) % T) for b in range(B)]
    linear, _ = make_linear(
        seed, pooled=pooled, num_branches=branches, rank_total=rank * branches, top_k=top_k, router_grad=mode
    )
    slow = SlowBranch(linear, pooled, [0] * B)
    x = torch.randn(B, T, 5, dtype=torch.float64, requires_grad=True)
    out, expected = linear(x), slow(x)
    close(out, expected)
    probe = torch.randn_like(out)
    named = {k: w for k, w in linear.named_parameters(recurse=False) if w.requires_grad}
    ours = torch.autograd.grad((out * probe).sum(), [x, *named.values()])
    theirs = torch.autograd.grad(
        (expected * probe).sum(), [x, *(slow.w[k] for k in named)], allow_unused=True
    )
    for key, a, b in zip(["x", *named], ours, theirs, strict=True):
        # The loop never touches a branch that nobody visits; mixed, its gradient is there and is 0.
        assert b is not None or "branch" in key, key
        close(a, torch.zeros_like(a) if b is None else b)


def slow_copy(tiny_llava, model, tasks, pooled):
    """Another model with a loop in the place of every adapted linear."""
    other = tiny_llava()
    slow = {}
    for path, linear in linears(model).items():
        parent, leaf = path.rsplit(".", 1)
        slow[path] = SlowBranch(linear, pooled, tasks)
        setattr(other.get_submodule(parent), leaf, slow[path])
    return other, slow


def test_model_with_task_routers_equals_a_loop_forward_and_backward(tiny_llava, batch, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    model.train()
    trace.prompt_lengths = (8, 7)
    other, slow = slow_copy(tiny_llava, model, [0, 2], [range(8), range(7)])
    ours, theirs = model(**batch).logits, other(**batch).logits
    mask = batch["attention_mask"].bool()
    close(ours[mask], theirs[mask])
    ours[mask].square().sum().backward()
    theirs[mask].square().sum().backward()
    for path, linear in linears(model).items():
        for name, weight in linear.named_parameters(recurse=False):
            expected = slow[path].w[name].grad
            if name == "router_1":  # no sample of the batch is of task 1
                assert expected is None
                assert weight.grad.abs().max() == 0
            else:
                close(weight.grad, torch.zeros_like(weight) if expected is None else expected)


def test_align_loss_is_the_mean_distance_from_the_own_tasks_keys(tiny_llava, batch, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path, align_weight=0.5)
    model.train()
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    selector = model.branch_memory.selector
    texts = selector.encoder.vectors(QUESTIONS).double()
    total = 0.0
    for b, k in enumerate((0, 2)):
        image = sum(seen[0][b]) / len(seen[0][b])
        for vector, kind in ((image, "image"), (texts[b], "text")):
            key = getattr(selector, f"{kind}_key_{k}").detach()
            total += 1 - float((vector * key).sum() / (vector.norm() * key.norm()))
    loss = described.losses(trace)["align_loss"]
    assert float(loss.detach()) == pytest.approx(0.5 * total / 2, rel=1e-9)
    loss.backward()
    assert selector.image_key_0.grad.abs().max() > 0
    assert selector.image_key_1.grad.abs().max() == 0


@pytest.mark.parametrize("mode", ROUTER_GRADS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_task_loss_reaches_the_router_exactly_as_declared(mode, top_k, tiny_llava, batch):
    model, _, described = attached(tiny_llava, router_grad=mode, top_k=top_k)
    model(**batch).logits.square().sum().backward()
    grads = [linear.router_0.grad for linear in linears(model).values()]
    heard = any(g is not None and float(g.abs().max()) > 1e-9 for g in grads)
    assert (
        heard
        == described.capabilities.router_hears_task_loss
        == (mode != "hard" and (mode, top_k) != ("scaled", 1))
    )


def test_a_branch_that_nobody_visits_changes_nothing_and_gets_a_zero_gradient():
    linear, _ = make_linear(num_branches=3, rank_total=6, top_k=1)
    with torch.no_grad():
        linear.router_0.zero_()
        linear.router_0[0] = 1.0
    x = torch.rand(2, 4, 5, dtype=torch.float64)
    before = linear(x)
    before.sum().backward()
    assert linear.branch_0_B.grad.abs().max() > 0
    for branch in (linear.branch_1_B, linear.branch_2_B):
        assert branch.grad.abs().max() == 0
    with torch.no_grad():
        linear.branch_2_B.fill_(77.0)
    assert torch.equal(linear(x), before)


def test_one_branch_equals_plain_lora(tiny_llava, batch):
    plain = tiny_llava()
    lora.attach(plain, lora.Config(rank=2, alpha=4.0), Trace())
    mixed, _, _ = attached(tiny_llava, num_branches=1, rank_total=2, alpha=4.0, top_k=1)
    for path, linear in linears(mixed).items():
        target = plain.get_submodule(path)
        target.lora_A.weight.data = linear.trunk_A.data.clone()
        target.lora_B.weight.data = linear.branch_0_B.data.T.clone()
    with torch.no_grad():
        close(plain(**batch).logits, mixed(**batch).logits)


@pytest.mark.parametrize("pool", ROUTER_POOLS)
def test_decoding_equals_the_full_forward_whatever_is_pooled(pool, tiny_llava, batch):
    model, trace, _ = attached(tiny_llava, router_pool=pool)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    trace.prompt_lengths = (7,)
    full = model(input_ids=ids, pixel_values=pixels).logits
    close(decoded(model, ids, pixels, 7), full)


@pytest.mark.parametrize("pool", ROUTER_POOLS)
def test_a_batch_of_one_without_padding_gives_the_same_answer(pool, tiny_llava, batch):
    model, _, _ = attached(tiny_llava, router_pool=pool)
    alone = {key: value[1:, :9] if key != "pixel_values" else value[1:] for key, value in batch.items()}
    close(model(**batch).logits[1, :9], model(**alone).logits[0])


def test_the_first_token_routes_every_sample_alike(tiny_llava, batch):
    model, _, _ = attached(tiny_llava, router_pool="first")
    batch["input_ids"][:, 0] = 1
    model(**batch)
    for linear in linears(model).values():
        close(linear.gates_BN[0], linear.gates_BN[1])
    pooled, _, _ = attached(tiny_llava, router_pool="mean_valid")
    pooled(**batch)
    assert any(not torch.allclose(*linear.gates_BN) for linear in linears(pooled).values())


def test_routers_compute_in_fp32_under_bf16():
    linear, trace = make_linear(dtype=torch.bfloat16, num_branches=3, rank_total=6, router_grad="dense")
    x = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    out = linear(x)
    assert out.dtype == torch.bfloat16
    scores = x.mean(dim=1).float() @ linear.router_0.detach().float().T
    torch.testing.assert_close(linear.gates_BN, scores.softmax(dim=-1), rtol=1e-5, atol=1e-6)
    assert trace.routes[0].probs_BTE.dtype == torch.float32
    out.float().sum().backward()
    assert all(w.grad is not None for w in linear.parameters() if w.requires_grad)


def test_each_block_reports_one_route_over_branches(tiny_llava, batch):
    model, trace, _ = attached(tiny_llava)
    model(**batch)
    assert [route.layer for route in trace.routes] == [0, 1]
    first = next(iter(linears(model).values()))
    assert trace.routes[0].probs_BTE.shape == (2, 12, 3)
    assert torch.equal(trace.routes[0].choice_BT[:, 0], first.gates_BN.argmax(dim=-1))


def llava_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def test_weights_equal_the_published_count_at_7b_size():
    described = branch_lora.attach(llava_7b(), Config(num_branches=8, rank_total=128, alpha=256.0), Trace())
    d, f, N, r = 4096, 11008, 8, 16
    sizes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    assert described.num_weights == 32 * sum(r * i + N * r * o + N * i for i, o in sizes)
    assert round(described.num_weights / 1e6, 1) == 201.4
    assert described.num_active == 32 * sum(r * i + 2 * r * o + N * i for i, o in sizes)


def test_task_routers_and_keys_are_counted_for_every_task(tiny_llava, tmp_path):
    one, three = attached(tiny_llava)[2], attached(tiny_llava, tmp_path)[2]
    routers = 2 * 3 * (6 * 16 + 24)
    keys = 3 * (8 + 8)
    assert three.num_weights == one.num_weights + 2 * routers + keys
    assert three.num_active == one.num_active + keys
    assert three.capabilities.needs_task_id_train
    assert not three.capabilities.needs_task_id_infer


def mass(model, values):
    """Say that every linear's branches received `values`."""
    model.branch_memory.mass_LN.copy_(torch.tensor(values).expand_as(model.branch_memory.mass_LN))


def tunable(model):
    return [[b.requires_grad for b in linear.named("branch_")] for linear in linears(model).values()]


def test_a_tasks_end_freezes_the_branches_that_it_used_most(tiny_llava, batch):
    model, trace, described = attached(tiny_llava, num_branches=4, rank_total=8, top_k=2)
    memory = model.branch_memory
    memory.on_task_start("a")
    model.train()
    expected = [torch.zeros(4, dtype=torch.float64) for _ in linears(model)]
    for _ in range(2):
        model(**batch)
        described.losses(trace)
        described.after_step(lambda tensor: 2 * tensor)  # another worker saw the same
        for total, linear in zip(expected, linears(model).values(), strict=True):
            for gates in linear.gates_BN:
                total += 2 * gates
    memory.on_task_end("a")
    for total, flags in zip(expected, tunable(model), strict=True):
        top = sorted(range(4), key=lambda n: -float(total[n]))[:2]
        assert [n for n in range(4) if not flags[n]] == sorted(top)


def test_frozen_branches_keep_routing_and_get_no_gradient(tiny_llava, batch):
    model, _, _ = attached(tiny_llava)
    before = model(**batch).logits.detach()
    memory = model.branch_memory
    memory.on_task_start("a")
    mass(model, [5, 9, 1])
    memory.on_task_end("a")
    memory.on_task_start("b")
    out = model(**batch).logits
    assert torch.equal(out.detach(), before)
    out.square().sum().backward()
    for linear in linears(model).values():
        assert linear.branch_0_B.grad is None
        assert linear.branch_1_B.grad is None
        assert linear.branch_2_B.grad is not None
        assert linear.trunk_A.grad is not None


@pytest.mark.parametrize(("min_tunable", "left"), [(0, 0), (1, 1), (3, 3), (5, 5)])
def test_freezing_stops_when_only_the_last_tunable_branches_are_left(min_tunable, left, tiny_llava):
    model, _, _ = attached(tiny_llava, num_branches=5, rank_total=5, top_k=2, min_tunable=min_tunable)
    for task in range(4):
        model.branch_memory.on_task_start(str(task))
        mass(model, [(3 * n + 2 * task) % 5 for n in range(5)])
        model.branch_memory.on_task_end(str(task))
    assert all(sum(flags) == left for flags in tunable(model))


def test_without_freezing_all_branches_stay_tunable_and_the_trunk_can_be_frozen_alone(tiny_llava):
    model, _, described = attached(tiny_llava, freeze_branches=False, freeze_A_after_task=True)
    model.branch_memory.on_task_start("a")
    assert all(linear.trunk_A.requires_grad for linear in linears(model).values())
    described.losses(Trace())
    described.after_step(lambda tensor: tensor)
    model.branch_memory.on_task_end("a")
    assert all(all(flags) for flags in tunable(model))
    assert not any(linear.trunk_A.requires_grad for linear in linears(model).values())


def test_routing_mass_does_not_depend_on_how_a_batch_is_cut_or_on_workers(tiny_llava, batch):
    def mass_after(cuts, workers):
        model, trace, described = attached(tiny_llava)
        model.branch_memory.on_task_start("a")
        model.train()
        for cut in cuts:
            model(**{key: value[cut] for key, value in batch.items()})
            described.losses(trace)
        described.after_step(lambda tensor: tensor * workers)
        return model.branch_memory.mass_LN

    whole = mass_after([slice(0, 2)], 1)
    assert whole.sum(dim=1).sub(2 * 2**20).abs().max() <= 4  # every sample's gates add up to 1
    assert torch.equal(mass_after([slice(0, 1), slice(1, 2)], 1), whole)
    assert torch.equal(mass_after([slice(0, 2)], 2), 2 * whole)


def test_recomputation_under_checkpointing_notes_nothing_twice_and_changes_no_gradient(
    tiny_llava, batch, tmp_path
):
    results = []
    for checkpointing in (False, True):
        model, trace, described = attached(tiny_llava, tmp_path / str(checkpointing))
        model.branch_memory.on_task_start("name")
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        logits = model(**batch, use_cache=False).logits
        (logits.square().mean() + described.losses(trace)["align_loss"]).backward()
        trace.clear()
        described.after_step(lambda tensor: tensor)
        grads = {k: w.grad for k, w in model.named_parameters() if w.requires_grad}
        results.append((grads, model.branch_memory.mass_LN))
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].keys() == results[1][0].keys()
    for key, gradient in results[0][0].items():
        assert gradient is not None, key
        close(gradient, results[1][0][key])


def test_a_task_trains_its_own_routers_and_keys_alone(tiny_llava, tmp_path):
    model, _, _ = attached(tiny_llava, tmp_path)
    model.branch_memory.on_task_start("count")
    for name, weight in model.named_parameters():
        if ".router_" in name or "_key_" in name:
            assert weight.requires_grad == name.endswith("_1"), name


def keys_at(model, k, image, text):
    selector = model.branch_memory.selector
    with torch.no_grad():
        getattr(selector, f"image_key_{k}").copy_(image)
        getattr(selector, f"text_key_{k}").copy_(text)


def test_evaluation_selects_the_seen_task_with_the_closest_keys(tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path)
    memory = model.branch_memory
    model(**batch)
    images, texts = memory.selector.pool.images(8), memory.selector.encoder.vectors(QUESTIONS)
    for k, b in ((0, 1), (1, 0), (2, 0)):  # tasks 1 and 2 look like sample 0, task 0 like sample 1
        keys_at(model, k, images[b] * 3, texts[b] * 0.1)
    for task in ("name", "place"):
        memory.on_task_start(task)
    trace.begin(QUESTIONS, ())  # no task is told
    model(**batch)
    assert memory.selector.selected() == ["place", "name"]
    router = next(iter(linears(model).values()))
    trace.begin(QUESTIONS[::-1], ())
    model(**{key: value.flip(0) for key, value in batch.items()})
    assert memory.selector.selected() == ["name", "place"]
    assert router.gates_BN.shape == (2, 3)


def test_decoding_keeps_the_task_that_the_prompt_selected(tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path)
    trace.begin(QUESTIONS[:1], ())
    trace.prompt_lengths = (7,)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    full = model(input_ids=ids, pixel_values=pixels).logits
    close(decoded(model, ids, pixels, 7), full)


def test_state_restores_routing_freezing_and_seen_tasks(tiny_llava, batch, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    memory = model.branch_memory
    memory.on_task_start("name")
    mass(model, [5, 9, 1])
    memory.on_task_end("name")
    memory.on_task_start("count")
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in described.state}
    assert saved.keys() == described.state
    other, _, again = attached(tiny_llava, tmp_path, seed=8)
    assert again.state == described.state
    other.load_state_dict(saved, strict=False)
    trace.begin(QUESTIONS, ())
    expected = model(**batch).logits
    close(other(**batch).logits, expected)
    assert other.branch_memory.selector.seen_K.tolist() == [True, True, False]
    other.branch_memory.on_task_start("count")
    assert tunable(other) == tunable(model)
    assert described.exported["sentence_encoder"]["hash"] == again.exported["sentence_encoder"]["hash"]


def test_all_that_trains_is_state(tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path)
    assert {name for name, w in model.named_parameters() if w.requires_grad} <= described.state


def test_a_sample_of_an_unknown_task_is_refused_in_training(tiny_llava, batch, tmp_path):
    model, trace, _ = attached(tiny_llava, tmp_path)
    model.train()
    trace.begin(QUESTIONS, ("name", "colour"))
    with pytest.raises(UserError, match="'colour'"):
        model(**batch)
    with pytest.raises(UserError, match="'colour'"):
        model.branch_memory.on_task_start("colour")


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"num_branches": 0}, "adapter.num_branches"),
        ({"num_branches": 3, "rank_total": 8}, r"adapter\.rank_total: 8 is not allowed; a multiple"),
        ({"top_k": 9}, r"adapter\.top_k: 9 is not allowed; from 1 to adapter\.num_branches \(8\)"),
        ({"min_tunable": -1}, "adapter.min_tunable"),
        ({"align_weight": -0.5}, "adapter.align_weight"),
        ({"task_routers": True}, r"adapter\.tasks: \[\] is not allowed"),
        ({"targets": ["qproj"]}, "did you mean 'q_proj'"),
    ],
)
def test_settings_out_of_range_are_told(settings_, match):
    with pytest.raises(UserError, match=match):
        Config(**settings_).check()


def test_dropout_is_off_in_evaluation_and_on_in_training():
    linear, _ = make_linear(dropout=0.5)
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    linear.eval()
    assert torch.equal(linear(x), linear(x))
    linear.train()
    assert not torch.equal(linear(x), linear(x))
