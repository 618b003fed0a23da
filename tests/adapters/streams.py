"""A stream of three small tasks, each with a question and pictures of its own, and its training step by step."""

import torch

TASKS = ("general", "document", "maps")
QUESTIONS = {
    "general": ("what is this", "what is this"),
    "document": ("how many are there", "how many are there"),
    "maps": ("where is the mark", "where is the mark"),
}


def batch_of(task, num_samples=2):
    """Inputs of one task's samples; the pictures of a task look alike."""
    seed = TASKS.index(task)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 32, (num_samples, 12), generator=generator)
    ids[:, 1:5] = 3
    mask = torch.ones_like(ids)
    mask[1:, 9:] = 0
    ids[1:, 9:] = 0
    noise = torch.randn(num_samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    look = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": 3 * look + 0.3 * noise}


def begin(trace, task, **more):
    """Tell the method of the task's batch."""
    trace.begin(QUESTIONS[task], (task, task), **more)


def step(model, trace, attached, task, lr=0.05):
    """One SGD step on the task's batch, as the loop takes it; returns its loss."""
    batch = batch_of(task)
    begin(trace, task)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    for term in attached.losses(trace).values():
        loss = loss + term
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    trace.clear()
    with torch.no_grad():
        for weight, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                weight -= lr * gradient
    attached.after_step(lambda part: part)
    return loss.detach()


def learn(model, trace, attached, tasks=TASKS, num_steps=2, lr=0.05):
    """Train the tasks one after the other; the model is in evaluation afterwards."""
    for task in tasks:
        attached.on_task_start(task)
        model.train()
        for _ in range(num_steps):
            step(model, trace, attached, task, lr)
        attached.on_task_end(task)
    model.eval()


def logits(model, trace, task):
    """Of the task's batch, in evaluation."""
    begin(trace, task)
    with torch.no_grad():
        found = model.eval()(**batch_of(task)).logits
    trace.clear()
    return found
