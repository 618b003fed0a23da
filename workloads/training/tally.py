"""Running sums of a training loop: losses by domain and loss term, samples and tokens; resumable and reducible."""

import json
from dataclasses import asdict, dataclass, field

from workloads.training import engine


@dataclass(kw_only=True)
class Tally:
    """Sums since the last `clear`; every list has one entry a domain."""

    domains: list[str]
    loss_sums: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    # Loss term -> sum over samples, such as the balance loss.
    terms: dict[str, float] = field(default_factory=dict)
    all_tokens: float = 0.0

    def __post_init__(self) -> None:
        if not self.tokens:
            self.clear()

    def clear(self) -> None:
        """Start again from zero."""
        self.loss_sums = [0.0] * len(self.domains)
        self.tokens = [0.0] * len(self.domains)
        self.samples = [0.0] * len(self.domains)
        self.terms = dict.fromkeys(self.terms, 0.0)
        self.all_tokens = 0.0

    def add(self, loss_sums: list[float], tokens: list[float], owners: list[str], all_tokens: int) -> None:
        """Add one micro-batch: losses and supervised tokens by domain, the domain of each sample, all its tokens."""
        for i, domain in enumerate(self.domains):
            self.loss_sums[i] += loss_sums[i]
            self.tokens[i] += tokens[i]
            self.samples[i] += owners.count(domain)
        self.all_tokens += all_tokens

    def add_term(self, name: str, value: float, num_samples: int) -> None:
        """Add a loss term that is a mean over `num_samples` samples."""
        self.terms[name] = self.terms.get(name, 0.0) + value * num_samples

    def merge(self, other: "Tally") -> None:
        """Add another tally of the same domains."""
        for i in range(len(self.domains)):
            self.loss_sums[i] += other.loss_sums[i]
            self.tokens[i] += other.tokens[i]
            self.samples[i] += other.samples[i]
        for name, value in other.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value
        self.all_tokens += other.all_tokens

    def reduced(self) -> "Tally":
        """The sum of all workers' tallies."""
        names = sorted(self.terms)
        flat = [
            *self.loss_sums,
            *self.tokens,
            *self.samples,
            *(self.terms[n] for n in names),
            self.all_tokens,
        ]
        total = engine.reduce_sum(flat)
        k = len(self.domains)
        return Tally(
            domains=self.domains,
            loss_sums=total[:k],
            tokens=total[k : 2 * k],
            samples=total[2 * k : 3 * k],
            terms=dict(zip(names, total[3 * k : -1], strict=True)),
            all_tokens=total[-1],
        )

    def losses(self) -> dict[str, float]:
        """Mean loss per supervised token of each domain that was seen, in nats."""
        rows = zip(self.domains, self.loss_sums, self.tokens, strict=True)
        return {domain: total / tokens for domain, total, tokens in rows if tokens}

    def metrics(self) -> dict[str, float]:
        """`loss`, `loss/DOMAIN` and every loss term."""
        values = {"loss": sum(self.loss_sums) / max(1.0, sum(self.tokens))}
        values |= {f"loss/{domain}": loss for domain, loss in self.losses().items()}
        return values | {name: total / max(1.0, sum(self.samples)) for name, total in self.terms.items()}

    def to_json(self) -> str:
        """The tally as text; floats survive exactly."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Tally":
        """Inverse of `to_json`."""
        return Tally(**json.loads(text))
