"""ModalPrompt against a language model given the prompts by hand: which are taken, where they stand, the loss."""

import pytest
import torch
from transformers import DynamicCache

from tests.adapters.streams import QUESTIONS, TASKS, batch_of, begin, learn, step
from tests.llava.sentences import write_encoder
from workloads import adapters
from workloads.adapters import modal_prompt
from workloads.adapters.base import Trace
from workloads.errors import UserError

P = 2


def attached(tiny_llava, tmp_path, seed=0, **settings_):
    model, trace = tiny_llava(), Trace()
    torch.manual_seed(seed)
    fields = {"tasks": list(TASKS), "prompt_length": P, "top_k": 2, **settings_}
    config = modal_prompt.Config(encoder=write_encoder(tmp_path / "encoder"), **fields)
    config.check()
    described = modal_prompt.attach(model, config, trace)
    trace.watch(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.modal_prompts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.5)
    return model, trace, described


def parts(model, k):
    """Prompts of one task and the weights of its MLP."""
    task = model.modal_prompts.get_submodule(f"task_{k}")
    first, _, second = task.transform
    return task.vectors, (first.weight, first.bias, second.weight, second.bias)


def slow_prototype(model, k):
    """The mean over prompts of W2 silu(W1 p + b1) + b2."""
    vectors, (W1, b1, W2, b2) = parts(model, k)
    made = []
    for vector in vectors:
        hidden = W1 @ vector + b1
        made.append(W2 @ (hidden / (1 + (-hidden).exp())) + b2)
    return sum(made) / len(made)


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def features(tiny_llava, model, task):
    """Image and text vector of each sample of a task's batch."""
    seen = []
    base = tiny_llava()
    base.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    base(**batch_of(task))
    texts = model.modal_prompts.encoder.vectors(QUESTIONS[task]).double()
    return [(sum(patches) / len(patches), text) for patches, text in zip(seen[0], texts, strict=True)]


def slow_closeness(model, sample, k):
    image, text = sample
    prototype = slow_prototype(model, k)
    return (cosine(image, prototype[: len(image)]) + cosine(text, prototype[len(image) :])) / 2


def slow_taken(model, sample, seen, top_k, current=None):
    """Tasks in the order of their prompts: the closest one stands last; in training the current one does."""
    others = [k for k in seen if k != current]
    ordered = sorted(others, key=lambda k: float(slow_closeness(model, sample, k).detach()))
    if current is None:
        return ordered[-top_k:]
    return [*(ordered[-(top_k - 1) :] if top_k > 1 else []), current]


def by_hand(tiny_llava, model, batch, taken_Bn):
    """Logits of each sample alone, its prompts concatenated in front of its own valid embeddings."""
    base = tiny_llava()
    rows = []
    for b, taken in enumerate(taken_Bn):
        ids = batch["input_ids"][b : b + 1]
        embeds = base.model.get_input_embeddings()(ids)
        images = base.model.get_image_features(
            batch["pixel_values"][b : b + 1],
            vision_feature_layer=base.config.vision_feature_layer,
            vision_feature_select_strategy=base.config.vision_feature_select_strategy,
        ).pooler_output[0]
        embeds = embeds.clone()
        embeds[0, ids[0] == 3] = images
        own = embeds[0][batch["attention_mask"][b].bool()]
        sequence = torch.cat([*(parts(model, k)[0] for k in taken), own]).unsqueeze(0)
        hidden = base.model.language_model(inputs_embeds=sequence).last_hidden_state[0, len(taken) * P :]
        rows.append(base.lm_head(hidden))
    return rows


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_seen", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_those_of_prompts_put_there_by_hand_forward_and_backward(
    training, num_seen, top_k, tiny_llava, tmp_path
):
    model, trace, described = attached(tiny_llava, tmp_path, top_k=top_k)
    for task in TASKS[:num_seen]:
        described.on_task_start(task)
    current = num_seen - 1
    task = TASKS[1]
    samples = features(tiny_llava, model, task)
    taken = [slow_taken(model, s, range(num_seen), top_k, current if training else None) for s in samples]
    model.train(training)
    batch = batch_of(task)
    begin(trace, task)
    ours, theirs = model(**batch).logits, by_hand(tiny_llava, model, batch, taken)
    assert model.modal_prompts.taken_Bn.tolist() == taken
    assert described.selected() == [TASKS[each[-1]] for each in taken]
    total_ours, total_theirs = 0.0, 0.0
    for b, expected in enumerate(theirs):
        valid = batch["attention_mask"][b].bool()
        torch.testing.assert_close(ours[b][valid], expected, rtol=1e-9, atol=1e-11)
        total_ours = total_ours + ours[b][valid].square().sum()
        total_theirs = total_theirs + expected.square().sum()
    if training:
        total_ours = total_ours + described.losses(trace)["prototype_loss"]
        distances = [2 - 2 * slow_closeness(model, sample, current) for sample in samples]
        total_theirs = total_theirs + sum(distances) / len(distances)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        vectors, rest = parts(model, current)
        assert {id(w) for w in trained} == {id(w) for w in (vectors, *rest)}
        ours, theirs = (torch.autograd.grad(total, trained) for total in (total_ours, total_theirs))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_task_changes_its_own_prompts_alone(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    for number, task in enumerate(TASKS):
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        described.on_task_start(task)
        model.train()
        step(model, trace, described, task)
        described.on_task_end(task)
        changed = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
        assert changed == {name for name in before if f"modal_prompts.task_{number}." in name}


def test_training_reads_earlier_prompts_without_changing_them(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    described.on_task_start(TASKS[0])
    described.on_task_start(TASKS[1])
    begin(trace, TASKS[1])
    before = model.train()(**batch_of(TASKS[1])).logits
    with torch.no_grad():
        parts(model, 0)[0].add_(1.0)
    begin(trace, TASKS[1])
    assert not torch.allclose(model(**batch_of(TASKS[1])).logits, before)


@pytest.mark.parametrize("padded", [False, True])
def test_generation_equals_a_loop_without_a_cache(padded, tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described)
    batch = batch_of(TASKS[2])
    if padded:
        for key in ("input_ids", "attention_mask"):
            batch[key][1] = batch[key][1].roll(3)
    else:
        batch = {key: value[:1] for key, value in batch.items()}
    num_samples = len(batch["input_ids"])
    begin(trace, TASKS[2])
    trace.questions = trace.questions[:num_samples]
    with torch.no_grad():
        ours = model.generate(
            **batch, do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0, eos_token_id=2
        )[:, 12:]
        for b in range(num_samples):
            start = 3 if b else 0
            ids = batch["input_ids"][b : b + 1, start:]
            for _ in range(4):
                begin(trace, TASKS[2], prompt_lengths=(12 - start,))
                trace.questions, trace.tasks = trace.questions[:1], trace.tasks[:1]
                shown = model(input_ids=ids, pixel_values=batch["pixel_values"][b : b + 1], use_cache=False)
                scores = shown.logits[0, -1]
                scores[2] = float("-inf")
                ids = torch.cat([ids, scores.argmax().view(1, 1)], dim=1)
            assert ours[b].tolist() == ids[0, -4:].tolist()


def test_the_trace_counts_the_samples_own_tokens_alone(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    learn(model, trace, described)
    batch, cache = batch_of(TASKS[0]), DynamicCache()
    begin(trace, TASKS[0])
    model(**batch, past_key_values=cache, use_cache=True)
    assert (trace.phase, trace.past_length, trace.prefix_length) == ("prefill", 0, 2 * P)
    assert cache.get_seq_length() == 12 + 2 * P
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    model(input_ids=batch["input_ids"][:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert (trace.phase, trace.past_length) == ("decode", 12)
    assert cache.get_seq_length() == 13 + 2 * P
    # Two prompts each, whose tasks share the route; one route a forward pass.
    assert [route.layer for route in trace.routes] == [0, 0]
    assert trace.routes[0].probs_BTE.shape == (2, 12, 3)
    assert trace.routes[1].probs_BTE.shape == (2, 1, 3)
    assert sorted(trace.routes[0].probs_BTE[0, 0].tolist()) == [0.0, 0.5, 0.5]


def test_only_wanted_positions_reach_the_output_layer(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path)
    described.on_task_start(TASKS[0])
    batch = batch_of(TASKS[0])
    begin(trace, TASKS[0])
    whole = model(**batch).logits
    keep = torch.zeros(2, 12, dtype=torch.bool)
    keep[0, 7:] = True
    keep[1, 5] = True
    begin(trace, TASKS[0])
    torch.testing.assert_close(
        model(**batch, logits_to_keep=keep).logits, whole[keep], rtol=1e-12, atol=1e-14
    )


def test_prompts_that_do_not_fit_the_models_context_are_refused(tiny_llava, tmp_path):
    model, trace, described = attached(tiny_llava, tmp_path, prompt_length=60)
    begin(trace, TASKS[0])
    with pytest.raises(UserError, match=r"adapter\.prompt_length: 60 .*72 positions, the model 64"):
        model(**batch_of(TASKS[0]))


def test_weights_equal_the_formula(tiny_llava, tmp_path):
    d, image, text = 16, 8, 8
    _, _, described = attached(tiny_llava, tmp_path)
    guide = image + text
    assert described.num_weights == P * d + d * d + d + d * guide + guide
    assert described.num_active == P * d


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"tasks": []}, "tasks"), ({"tasks": ["a", "a"]}, "tasks"), ({"prompt_length": 0}, "prompt_length"),
     ({"top_k": 0}, "top_k"), ({"prototype_weight": -1.0}, "prototype_weight")],
)  # fmt: skip
def test_values_out_of_range_are_named(fields, key):
    modal_prompt.Config(tasks=["a", "b"]).check()
    with pytest.raises(UserError, match=rf"adapter\.{key}: "):
        modal_prompt.Config(**{"tasks": ["a", "b"], **fields}).check()


def test_an_unknown_task_names_the_nearest_and_merging_says_why_not(tiny_llava, tmp_path):
    model, _, described = attached(tiny_llava, tmp_path)
    with pytest.raises(UserError, match="did you mean 'document'"):
        described.on_task_start("documents")
    with pytest.raises(UserError, match="cannot be merged: prompts are part of the sequence"):
        adapters.merge(model, described)


def test_bf16_prompts_enter_in_the_models_dtype(tiny_llava, tmp_path):
    def make():
        return tiny_llava().bfloat16()

    model, trace, described = attached(make, tmp_path)
    learned = {**batch_of(TASKS[0]), "pixel_values": batch_of(TASKS[0])["pixel_values"].bfloat16()}
    described.on_task_start(TASKS[0])
    begin(trace, TASKS[0])
    out = model.train()(**learned).logits
    assert out.dtype == torch.bfloat16
    loss = described.losses(trace)["prototype_loss"]
    assert loss.dtype == torch.float32
    (out.float().square().mean() + loss).backward()
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)
    assert logits_are_finite(model, trace, learned)


def logits_are_finite(model, trace, batch):
    with torch.no_grad():
        return bool(model.eval()(**batch).logits.isfinite().all())
