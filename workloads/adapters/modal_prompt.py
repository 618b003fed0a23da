"""ModalPrompt: soft prompts for each task in front of every sample; the closest tasks' prompts are taken.

Source:  Zeng et al. 2025, ModalPrompt, arXiv:2410.05849 (EMNLP 2025), and its released code (AuroraZengfh/ModalPrompt).
         Each task k has P prompt vectors and a two-layer MLP; the mean of the MLP over the prompts is its prototype
         p_k. A sample's closeness to a task is c_k = (cos(image, p_k) + cos(text, p_k)) / 2.
         training     [prompts of the top_k - 1 closest earlier tasks, prompts of the task that trains, sample]
         inference    [prompts of the top_k closest seen tasks, sample], the closest one nearest to the sample
         loss         L += weight * mean over samples of (1 - cos(image, p_t)) + (1 - cos(text, p_t))
         P = 10, top_k = 3, weight = 1; a task's prompts and MLP train during the task alone.
Routing: by sample, decided on the prompt and kept while decoding. One route, in the first block: 1 / n for each of
         the n tasks whose prompts are taken; the choice is the closest one (in training the task that trains).
Sequence: prompts enter the language model in front of the embeddings, with mask 1 and positions 0 to n P - 1; all other
         positions move by n P. What leaves it is cut back to the sample's tokens, so that labels, losses and callers
         know nothing of prompts. They are in the cache once: decoding adds them to the mask and moves positions alone.
Differs: prompts stand before the first token, also before padding on the left (released: after BOS). They start from a
         normal distribution with the model's initializer_range (released: from embeddings of random tokens). Image and
         text are those of `parts/selector.py`, of different widths, so that a prototype has a part for each.
Not verified: the paper's weight of the loss and its top_k; the released code's are taken.

Shape letters: B batch, T tokens, D width, K tasks, N prompts of all taken tasks, P prompts of a task, V image width,
S text width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters import base
from workloads.adapters.base import Attached, Capabilities, Route, Trace
from workloads.adapters.parts.pooling import Pool
from workloads.adapters.parts.tasks import check_tasks, task_index
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence
from workloads.llava.sentence import SentenceEncoder

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """ModalPrompt's settings."""

    name: str = "modal_prompt"
    # Names of the tasks in the order in which they are learned.
    tasks: list[str] = field(default_factory=list)
    # Prompt vectors of one task.
    prompt_length: int = 10
    # Tasks whose prompts a sample gets, as far as so many were seen.
    top_k: int = 3
    prototype_weight: float = 1.0
    # Folder of the sentence encoder; empty: the packaged all-MiniLM-L6-v2.
    encoder: str = ""

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"prototype_weight"}

    def identity(self) -> dict[str, str]:
        """The content of the sentence encoder."""
        return {"encoder": sentence.content_hash(sentence.find(self.encoder, "adapter.encoder"))}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        for key in ("prompt_length", "top_k"):
            value = getattr(self, key)
            require(value >= 1, f"adapter.{key}", value, "a whole number of 1 or more")
        require(self.prototype_weight >= 0, "adapter.prototype_weight", self.prototype_weight, "0 or more")


class TaskPrompts(nn.Module):
    """The prompts of one task and the MLP that makes a prototype of them."""

    def __init__(self, length: int, width: int, guide_width: int, std: float, like: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.vectors = nn.Parameter(torch.empty(length, width, **options).normal_(std=std))
        self.transform = nn.Sequential(
            nn.Linear(width, width, **options), nn.SiLU(), nn.Linear(width, guide_width, **options)
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Prompts (P, D) and prototype (V + S)."""
        # A copy: ZeRO-3 takes the weight itself away again.
        return self.vectors * 1, self.transform(self.vectors).mean(dim=0)


class Prompter(nn.Module):
    """Chooses prompts for every sample and puts them in front of what enters the language model."""

    seen_K: Tensor

    def __init__(
        self, model: nn.Module, config: Config, trace: Trace, pool: Pool, encoder: SentenceEncoder
    ) -> None:
        super().__init__()
        inner: Any = model
        shape, entrance = inner.config.text_config, inner.model.multi_modal_projector.linear_1
        self.config, self.trace, self.pool, self.encoder = config, trace, pool, encoder
        self.image_width: int = entrance.in_features
        self.max_length: int = shape.max_position_embeddings
        widths = (shape.hidden_size, self.image_width + encoder.width)
        for k in range(len(config.tasks)):
            prompts = TaskPrompts(
                config.prompt_length, *widths, shape.initializer_range, like=entrance.weight
            )
            setattr(self, f"task_{k}", prompts.requires_grad_(k == 0))
        seen_K = torch.zeros(len(config.tasks), dtype=torch.bool, device=entrance.weight.device)
        self.register_buffer("seen_K", seen_K)
        self.current = 0
        # Of the last prompt: tasks whose prompts each sample got, the closest one last, and the loss's terms.
        self.taken_Bn = torch.empty(0, dtype=torch.long)
        self.distance_B = torch.empty(0)

    def watch(self, language_model: nn.Module) -> None:
        """Put prompts in front of whatever enters `language_model`, and cut them off what leaves it."""
        language_model.register_forward_pre_hook(self._enter, with_kwargs=True)
        language_model.register_forward_hook(self._leave)

    def start(self, task: str) -> None:
        """Train the prompts of `task` alone, and count it as seen. Raises UserError on an unknown task."""
        self.current = task_index(self.config.tasks, task)
        self.seen_K[self.current] = True
        for k in range(len(self.config.tasks)):
            self.get_submodule(f"task_{k}").requires_grad_(k == self.current)

    def forward(self, image_BV: Tensor, text_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen prompts (B, N, D), their tasks (B, n), and each sample's distance (B) from the last prototype."""
        known = [k for k, seen in enumerate(self.seen_K.tolist()) if seen and k != self.current]
        if self.training or bool(self.seen_K[self.current]) or not known:
            known.append(self.current)
        made = [self.get_submodule(f"task_{k}")() for k in known]
        dtype = torch.promote_types(torch.promote_types(image_BV.dtype, made[0][1].dtype), torch.float32)
        prototypes_KW = torch.stack([prototype for _, prototype in made]).to(dtype)
        widths = [self.image_width, self.encoder.width]
        both = zip((image_BV, text_BS), prototypes_KW.split(widths, dim=1), strict=True)
        cosines_BK = sum(F.normalize(a.to(dtype), dim=-1) @ F.normalize(b, dim=-1).T for a, b in both)
        assert isinstance(cosines_BK, Tensor)
        chosen_Bn = self._chosen(cosines_BK.detach() / 2)
        prompts_KPD = torch.stack([prompts for prompts, _ in made])
        taken_Bn = torch.tensor(known, device=chosen_Bn.device)[chosen_Bn]
        return prompts_KPD[chosen_Bn].flatten(1, 2), taken_Bn, 2 - cosines_BK[:, -1]

    def _chosen(self, closeness_BK: Tensor) -> Tensor:
        """Places (B, n) of the taken tasks, the closest one last; in training the current task, which is the last."""
        num_taken = min(self.config.top_k, closeness_BK.shape[1])
        if not self.training:
            return closeness_BK.topk(num_taken, dim=-1).indices.flip(-1)
        earlier_Bn = closeness_BK[:, :-1].topk(num_taken - 1, dim=-1).indices.flip(-1)
        mine_B1 = torch.full_like(closeness_BK[:, :1], closeness_BK.shape[1] - 1, dtype=torch.long)
        return torch.cat([earlier_Bn, mine_B1], dim=-1)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The language model's arguments with prompts in front; those of a step of decoding moved behind them."""
        kwargs = dict(kwargs)
        embeds_BTD, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        fresh = self.trace.phase != "decode"
        if fresh:
            image_BV = self.pool.images(self.image_width)
            text_BS = self.encoder.vectors(self.trace.questions).to(embeds_BTD.device)
            prompts_BND, self.taken_Bn, self.distance_B = self(image_BV.to(embeds_BTD.device), text_BS)
            self.trace.prefix_length = prompts_BND.shape[1]
            kwargs["inputs_embeds"] = torch.cat([prompts_BND.to(embeds_BTD), embeds_BTD], dim=1)
        self._tell(embeds_BTD)
        moved = self.trace.prefix_length
        end = moved + self.trace.past_length + embeds_BTD.shape[1]
        allowed = f"sample and prompts have {end} positions, the model {self.max_length}"
        require(end <= self.max_length, "adapter.prompt_length", self.config.prompt_length, allowed)
        if mask is not None:
            assert mask.dim() == 2, "prompts need a mask of tokens"
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), moved), mask], dim=1)
        positions_BT = kwargs.get("position_ids")
        if positions_BT is not None:
            front_BN = torch.arange(moved if fresh else 0, device=positions_BT.device)
            front_BN = front_BN.expand(len(positions_BT), -1)
            kwargs["position_ids"] = torch.cat([front_BN, positions_BT + moved], dim=1)
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hidden states of the sample's own tokens."""
        if self.trace.phase != "decode":
            output.last_hidden_state = output.last_hidden_state[:, self.trace.prefix_length :]
        return output

    def _tell(self, embeds_BTD: Tensor) -> None:
        """Report whose prompts were taken."""
        shares_BK = F.one_hot(self.taken_Bn, len(self.config.tasks)).sum(dim=1) / self.taken_Bn.shape[1]
        shape = (len(embeds_BTD), embeds_BTD.shape[1])
        route = Route(
            layer=0,
            probs_BTE=shares_BK.unsqueeze(1).expand(*shape, -1),
            choice_BT=self.taken_Bn[:, -1:].expand(shape),
        )
        self.trace.routes.append(route)

    def selected(self) -> list[str]:
        """The task whose prompts stand nearest to each sample of the last prompt."""
        return [self.config.tasks[k] for k in self.taken_Bn[:, -1].tolist()]

    def losses(self, trace: Trace) -> Mapping[str, Tensor]:
        """The weighted distance of samples from the prototype of the task that trains."""
        return {"prototype_loss": self.config.prototype_weight * self.distance_B.mean()}


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put prompts for every task in front of its language model; the first task's train."""
    base.freeze(model)
    inner: Any = model
    encoder = sentence.load(config.encoder, "adapter.encoder")
    prompter = Prompter(model, config, trace, Pool(trace, "mean_valid", model), encoder)
    inner.modal_prompts = prompter.train(model.training)  # inference goes by this
    prompter.watch(inner.model.language_model)
    return Attached(
        capabilities=Capabilities(stateful=True, routing="sample"),
        num_weights=base.count(model.parameters()),
        num_active=config.prompt_length * inner.config.text_config.hidden_size,
        losses=prompter.losses,
        state=frozenset(f"modal_prompts.{name}" for name in prompter.state_dict()),
        on_task_start=prompter.start,
        selected=prompter.selected,
        as_lora="prompts are part of the sequence, not of a linear",
        exported={"sentence_encoder": encoder.described()},
    )
