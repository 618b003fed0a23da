"""RunConfig: everything that defines one run, built from plain values and checked strictly by OmegaConf."""

import dataclasses
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from workloads.errors import UserError, first_line, require, require_known
from workloads.schema import (
    SCHEMA_VERSION,
    AdapterConfig,
    ContinualConfig,
    DataConfig,
    DomainConfig,
    EvalConfig,
    ExecutionConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)

__all__ = [
    "SCHEMA_VERSION",
    "AdapterConfig",
    "ContinualConfig",
    "DataConfig",
    "DomainConfig",
    "EvalConfig",
    "ExecutionConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "apply_overrides",
    "check",
    "data_from_tree",
    "from_tree",
    "load",
    "methods",
    "plain",
    "read_yaml",
    "to_tree",
]


def methods() -> list[str]:
    """Names of all adapter methods: the files of workloads/adapters (found without importing them)."""
    folder = Path(__file__).parent / "adapters"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "base"))


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Build a checked RunConfig from nested plain values; raises `UserError` on any mistake."""
    rest = {key: value for key, value in tree.items() if key != "adapter"}
    adapter = _adapter_from_tree(tree.get("adapter", {}))
    require_known("", tree, [f.name for f in dataclasses.fields(RunConfig)])
    parts: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        part = rest.pop(name, {})
        parts[name] = _data(part) if kind is DataConfig else _section(kind, part, name)
    for key, kind in (("schema_version", int), ("seed", int), ("name", str), ("init_from", str)):
        if key in rest:
            fits = isinstance(rest[key], kind) and not isinstance(rest[key], bool)
            require(fits, key, rest[key], f"a {kind.__name__}")
    config = RunConfig(adapter=adapter, **parts, **rest)
    check(config)
    return config


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "continual": ContinualConfig,
    "eval": EvalConfig,
    "execution": ExecutionConfig,
}


def data_from_tree(tree: Mapping[str, Any]) -> DataConfig:
    """The section `data` alone, checked but for its mixture; raises `UserError` on any mistake."""
    data = _data(tree)
    _check_domains(data)
    return data


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, ready for YAML or JSON; `from_tree(to_tree(c)) == c`."""
    return dataclasses.asdict(config)


def load(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe YAML and apply `key.sub=value` overrides."""
    return from_tree(apply_overrides(read_yaml(path), overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as plain values; a missing or malformed file is a `UserError`."""
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # PyYAML and OmegaConf share no base class
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    require(isinstance(tree, DictConfig), str(path), type(tree).__name__, "a file of `key: value` lines")
    return plain(tree, str(path))


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `tree` with dot-list overrides such as `optim.lr=0.001` merged in."""
    words = list(overrides)
    for word in words:
        require("=" in word, "override", word, "write key=value")
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(tree)), OmegaConf.from_dotlist(words))
        return plain(merged, "overrides")
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"override: {' '.join(str(error).split())}") from None


def plain(tree: Any, where: str) -> dict[str, Any]:
    """OmegaConf to plain values; interpolation is refused, since it can read the environment."""
    container = OmegaConf.to_container(tree, resolve=False)
    text = OmegaConf.to_yaml(tree)
    require("${" not in text, where, "${...}", "interpolation is not supported")
    require("???" not in text, where, "???", "every value has to be given")
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _adapter_from_tree(tree: Any) -> AdapterConfig:
    require(isinstance(tree, Mapping), "adapter", tree, "a mapping with a `name`")
    name = tree.get("name", "")
    require(name in methods(), "adapter.name", name, f"methods: {', '.join(methods())}", methods())
    kind = importlib.import_module(f"workloads.adapters.{name}").Config
    return _section(kind, tree, "adapter")


def _data(tree: Any) -> DataConfig:
    """The section `data`; unknown keys of a domain are told by their nearest."""
    domains = tree.get("domains") if isinstance(tree, Mapping) else None
    if isinstance(domains, Mapping):
        for name, part in domains.items():
            require(isinstance(part, Mapping), f"data.domains.{name}", part, "a mapping with a `format`")
            _section(DomainConfig, part, f"data.domains.{name}")
    return _section(DataConfig, tree, "data")


# What OmegaConf merges no other kind of container into.
_CONTAINERS: dict[Any, tuple[type, str]] = {dict: (Mapping, "a mapping"), list: (list, "a list")}


def _section(kind: type, tree: Mapping[str, Any], where: str) -> Any:
    """One checked dataclass; strings that YAML would read as numbers are accepted as OmegaConf reads them."""
    require(isinstance(tree, Mapping), where, tree, "a mapping")
    require_known(f"{where}.", tree, [f.name for f in dataclasses.fields(kind)])
    for key, hint in get_type_hints(kind).items():
        if key in tree and get_origin(hint) in _CONTAINERS:
            wanted, words = _CONTAINERS[get_origin(hint)]
            require(isinstance(tree[key], wanted), f"{where}.{key}", tree[key], words)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(dict(tree)))
        section: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{where}.{error.full_key}" if error.full_key else where
        raise UserError(f"{key}: {first_line(error)}") from None
    _finite(dataclasses.asdict(section), where)
    return section


def _finite(value: Any, key: str) -> None:
    if isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    if isinstance(value, Mapping):
        for sub, item in value.items():
            _finite(item, f"{key}.{sub}")


def check(config: RunConfig) -> None:
    """Range checks that types cannot express; raises `UserError`."""
    data, optim, ev, ex = config.data, config.optim, config.eval, config.execution
    version = config.schema_version
    require(version == SCHEMA_VERSION, "schema_version", version, f"this version reads {SCHEMA_VERSION}")
    _check_domains(data)
    _check_mixture(data)
    for key, value in (
        ("data.max_length", data.max_length),
        *((f"eval.{key}", getattr(ev, key)) for key in ("samples", "max_new_tokens")),
        ("optim.global_batch", optim.global_batch),
        ("execution.workers", ex.workers),
        ("execution.micro_batch", ex.micro_batch),
        ("execution.report_every", ex.report_every),
        ("execution.eval_batch", ex.eval_batch),
        ("execution.threads", ex.threads),
    ):
        require(value >= 1, key, value, "a whole number of 1 or more")
    _check_model(config.model)
    require(0 <= data.max_rejected <= 1, "data.max_rejected", data.max_rejected, "a share from 0 to 1")
    require(optim.lr > 0, "optim.lr", optim.lr, "a number above 0")
    for key in ("projector_lr_ratio", "weight_decay", "clip"):
        value = getattr(optim, key)
        require(value >= 0, f"optim.{key}", value, "0 or more")
    ratio = optim.warmup_ratio
    require(0 <= ratio < 1, "optim.warmup_ratio", ratio, "a share from 0 to below 1")
    for key, value in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        require(0 <= value < 1, f"optim.{key}", value, "from 0 to below 1")
    require(0 <= config.seed < 2**63, "seed", config.seed, "from 0 to below 2**63")
    fresh = config.init_from == "" or re.fullmatch("[0-9a-f]{16}", config.init_from) is not None
    require(fresh, "init_from", config.init_from, "a fingerprint of 16 hex digits, or nothing")
    require(ex.zero_stage in (0, 1, 2, 3), "execution.zero_stage", ex.zero_stage, "0, 1, 2 or 3")
    require(ex.checkpoint_every >= 0, "execution.checkpoint_every", ex.checkpoint_every, "0 or more")
    allowed = f"a multiple of execution.workers ({ex.workers})"
    require(optim.global_batch % ex.workers == 0, "optim.global_batch", optim.global_batch, allowed)
    _check_continual(config.continual, ex.zero_stage, config.adapter)
    config.adapter.check()


def _check_continual(own: ContinualConfig, zero_stage: int, adapter: AdapterConfig) -> None:
    """What the past is made with; under ZeRO-3 no worker holds the weights that EWC and LwF look back with."""
    require(own.weight >= 0, "continual.weight", own.weight, "0 or more")
    allowed = "a whole number of 1 or more"
    require(own.fisher_samples >= 1, "continual.fisher_samples", own.fisher_samples, allowed)
    require(own.temperature > 0, "continual.temperature", own.temperature, "a number above 0")
    share = own.replay_share
    require(0 <= share <= 1, "continual.replay_share", share, "a share from 0 to 1")
    kept = own.replay == "none" or share > 0
    require(kept, "continual.replay_share", share, f"above 0 for continual.replay {own.replay!r}")
    fits = own.regulariser != "ewc" or adapter.starts_as_saved()
    allowed = f"none or lwf with {adapter.name}, whose tasks start from other weights than a stage saves"
    require(fits, "continual.regulariser", own.regulariser, allowed)
    whole = own.regulariser == "none" or zero_stage < 3
    allowed = f"0, 1 or 2 with continual.regulariser {own.regulariser!r}"
    require(whole, "execution.zero_stage", zero_stage, allowed)


def _check_model(model: ModelConfig) -> None:
    parts = {key: getattr(model, key) for key in ("language_model", "vision_tower", "projector")}
    if any(parts.values()):
        allowed = "a LLaVA from parts names a language model and a vision tower"
        for key in ("language_model", "vision_tower"):
            require(bool(parts[key]), f"model.{key}", parts[key], allowed)
        named = model.name_or_path
        require(named == ModelConfig().name_or_path, "model.name_or_path", named, "leave it out beside parts")


def _check_domains(data: DataConfig) -> None:
    """Names of domains are parts of file names and metrics; only `files` has any."""
    few = not data.domains or data.source == "files"
    require(few, "data.source", data.source, "`data.domains` is for the source 'files'", ["files"])
    for name, domain in data.domains.items():
        fits = re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None
        require(fits, "data.domains", name, "letters, digits, '_' and '-', a letter or digit first")
        splits = (domain.train, domain.val, domain.test)
        require(any(splits), f"data.domains.{name}", splits, "name the file of train, val or test")


def _check_mixture(data: DataConfig) -> None:
    """Weights, budgets, temperature and caps."""
    require(bool(data.mixture), "data.mixture", data.mixture, "name at least one domain with its weight")
    for domain, weight in data.mixture.items():
        require(weight >= 0, f"data.mixture.{domain}", weight, "a weight is 0 or more")
    require(sum(data.mixture.values()) > 0, "data.mixture", data.mixture, "at least one weight above 0")
    for key in ("samples", "tokens", "temperature"):
        value = getattr(data, key)
        require(value >= 0, f"data.{key}", value, "0 or more")
    require_known("data.caps.", data.caps, data.mixture)
    for domain, cap in data.caps.items():
        require(cap >= 1, f"data.caps.{domain}", cap, "a whole number of 1 or more")
    if data.samples == 0 and data.tokens == 0:
        allowed = "all samples (data.samples: 0) have shares of their own"
        require(data.temperature == 0, "data.temperature", data.temperature, allowed)
        allowed = "all samples (data.samples: 0) are 'fresh', or start anew with 'cycle'"
        require(data.upsample != "repeat", "data.upsample", data.upsample, allowed)
