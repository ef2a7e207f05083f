"""Find the modules that settings name, and check that each can be adapted. Reads names and shapes only."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsee_scale.adapters.experts import check_experts, fused_experts
from dsee_scale.adapters.linear import reject_replaced_forward
from dsee_scale.adapters.slices import parse_slices
from dsee_scale.algorithms.delta import AdapterSpec
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.partition.quantized import holds_numbers, quantised_kind

BYPASSED = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
}
"""Linear layers that are never called, by their owner's class: it hands their weights to a fused function."""


@dataclass(frozen=True)
class Target:
    """One module to adapt.

    Attributes:
        name: module name in the model.
        module: the base layer.
        shape: true (O, I): outputs x inputs, whatever the storage order.
        transposed: whether the weight is stored I x O (transformers' Conv1D).
        slices: output ranges (start, stop) adapted as matrices of their own; ((0, O),) for the whole.
        num_sparse: N for each slice.
        experts: the parameter's name in the module, where that holds the fused matrices of experts. These are meant
            as one matrix (E*M, J) then, as they are stored, with a slice for each expert; `name` is the parameter's.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]
    transposed: bool
    slices: tuple[tuple[int, int], ...]
    num_sparse: int
    experts: str | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.module, self.experts or "weight")

    @property
    def weight_name(self) -> str:
        """Its name in the model."""
        return self.name if self.experts else f"{self.name}.weight"

    def spec(self, config: DSEEConfig) -> AdapterSpec:
        """The adapter that it gets."""
        return AdapterSpec(
            shape=self.shape,
            transposed=self.transposed,
            slices=self.slices,
            rank=config.rank,
            num_sparse=self.num_sparse,
            scaling=float(config.scaling),
            dropout=float(config.dropout),
            experts=self.experts is not None,
            shared_a=self.experts is not None and config.shared_expert_a,
        )


def linear_kind(module: nn.Module) -> str | None:
    """`linear` (weight O x I), `conv1d` (weight I x O), or None for what is no supported layer."""
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__.endswith("Conv1D") and hasattr(module, "nf"):
        return "conv1d"
    return None


def matches(name: str, patterns: Iterable[str] | str) -> bool:
    """Whether a module name is meant: a suffix of whole components, a shell pattern, or (a string) a regex."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_matches_one(name, pattern) for pattern in patterns)


def _matches_one(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def find_targets(
    model: nn.Module, config: DSEEConfig, shape_of: Callable[[nn.Parameter], torch.Size]
) -> list[Target]:
    """The modules that `config.target_modules` names, in the model's order.

    Raises:
        TargetError: a name matches nothing, or something that is no supported layer, or a shared weight.
        ConfigError: a setting does not fit a module's shape.
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if linear_kind(module)]
    experts = {f"{n}.{attribute}": n for n, module in modules.items() for attribute in fused_experts(module)}
    chosen = _chosen_names(modules, linears, experts, config.target_modules)
    _reject_routers(chosen, modules)
    _reject_bypassed(chosen, modules)
    targets = [
        _expert_target(name, modules[experts[name]], config, shape_of)
        if name in experts
        else _target(name, modules[name], config, shape_of)
        for name in chosen
    ]
    _reject_shared(model, targets)
    _check_settings_used(config, targets)
    return targets


def find_modules(model: nn.Module, patterns: Iterable[str], *, what: str) -> list[str]:
    """Names of modules that match; each pattern must match at least one."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(_matches_one(name, pattern) for name in names):
            raise TargetError(f"{what} {pattern!r} matches no module{_nearest(pattern, names)}")
    return [name for name in names if matches(name, tuple(patterns))]


def _chosen_names(
    modules: dict[str, nn.Module],
    linears: list[str],
    experts: dict[str, str],
    wanted: tuple[str, ...] | str,
) -> list[str]:
    """What is meant of linear layers and of experts' parameters, in the model's order."""
    adaptable = {*linears, *experts}
    inside = {owner: [name for name in experts if experts[name] == owner] for owner in experts.values()}
    everything = [each for name in modules if name for each in (name, *inside.get(name, ()))]

    def meant(name: str, patterns: tuple[str, ...] | str) -> bool:
        return matches(name, patterns) or (name in experts and matches(experts[name], patterns))

    if isinstance(wanted, str):
        chosen = [name for name in everything if name in adaptable and meant(name, wanted)]
        if not chosen:
            raise TargetError(
                f"target_modules {wanted!r} matches no linear layer: one string is a regular expression for whole "
                f"names; names that end so are a list, [{wanted!r}]{_nearest(wanted, adaptable)}"
            )
        return chosen
    for pattern in wanted:
        hits = [name for name in everything if meant(name, (pattern,))]
        if not hits:
            raise TargetError(f"target module {pattern!r} matches no module{_nearest(pattern, adaptable)}")
        if not adaptable.intersection(hits):
            raise _unsupported(hits[0], modules[hits[0]], adaptable)
    return [name for name in everything if name in adaptable and meant(name, wanted)]


def _unsupported(name: str, module: nn.Module, adaptable: Iterable[str]) -> TargetError:
    kind = type(module).__name__
    if "router" in kind.lower():
        return _is_router(name, kind)
    if hasattr(module, "_apply_gate") and not hasattr(module, "is_transposed"):
        return TargetError(
            f"target {name} is a {kind} without the notes that transformers keeps on experts: DeepSpeed's zero.Init "
            "(0.19.8) loses them for classes imported inside it, from the second model on; import "
            f"{type(module).__module__} before the first one is made"
        )
    inside = sorted({n.rsplit(".", 1)[-1] for n in adaptable if n.startswith(name + ".")})
    hint = f"; layers inside it: {', '.join(inside)}" if inside else ""
    return TargetError(f"target {name} is a {kind}, expected nn.Linear or Conv1D{hint}")


def _is_router(name: str, kind: str) -> TargetError:
    return TargetError(
        f"target {name} is a router ({kind}), which only chooses experts; expected layers that compute: adapt the "
        "experts (experts.gate_up_proj, experts.down_proj) or the attention, or train the router in full "
        "(trained_modules)"
    )


def _reject_routers(chosen: list[str], modules: dict[str, nn.Module]) -> None:
    """Refuse a linear layer beside experts that has an output for each of them."""
    for name in chosen:
        owner, _, own = name.rpartition(".")
        if not re.search("gate$|router", name) or own == "gate_proj":
            continue
        for above in (owner, owner.rpartition(".")[0]):
            beside = [child for child in modules[above].children() if fused_experts(child)]
            if any(getattr(modules.get(name), "out_features", None) == e.num_experts for e in beside):
                raise _is_router(name, type(modules[name]).__name__)


def _reject_shared(model: nn.Module, targets: Iterable[Target]) -> None:
    owners: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(param), []).append(name)
    for target in targets:
        sharing = owners.get(id(target.weight), [])
        if len(sharing) > 1:
            others = ", ".join(n for n in sharing if n != target.weight_name)
            raise TargetError(
                f"target {target.name} shares its weight with {others}; an update of one alone could not be exported: "
                "choose other targets, or load the model with tie_word_embeddings=False"
            )


def _reject_bypassed(chosen: list[str], modules: dict[str, nn.Module]) -> None:
    for name in chosen:
        owner, _, layer = name.rpartition(".")
        for cls in type(modules.get(owner)).__mro__:
            if layer in BYPASSED.get(cls.__name__, ()):
                raise TargetError(
                    f"target {name} would have no effect: its {cls.__name__} reads the layer's weight without calling "
                    "the layer, so an adapter on it is never trained; choose other targets"
                )


def reject_codes(name: str, module: nn.Module, weight: Tensor) -> None:
    """Raise TargetError for a weight that is no parameter, or quantised by something else than bitsandbytes. Local.

    Args:
        name: the module's, or of experts the parameter's.
        module: what holds the weight.
        weight: whole or partitioned.
    """
    if not any(weight is param for param in module._parameters.values()):
        raise TargetError(
            f"the weight of {name} is computed at each use (by torch's parametrizations or its pruning), so nothing "
            "that is written to it would last; expected a parameter: make it one first (remove_parametrizations, "
            "torch.nn.utils.prune.remove)"
        )
    if not holds_numbers(weight.dtype) and not quantised_kind(module):
        raise TargetError(
            f"{name} is a {type(module).__name__} with {weight.dtype} weights, a quantisation that is not known here; "
            "expected floating-point weights of 16 bits or more, or bitsandbytes: load a bfloat16 version of the model "
            "(FP8 files with FineGrainedFP8Config(dequantize=True)), or quantise one by bitsandbytes "
            "(BitsAndBytesConfig)"
        )


def _target(
    name: str, module: nn.Module, config: DSEEConfig, shape_of: Callable[[nn.Parameter], torch.Size]
) -> Target:
    reject_replaced_forward(name, module)
    transposed = linear_kind(module) == "conv1d"
    shape = _true_shape(name, module, transposed, shape_of)
    slices = _slices(name, shape[0], transposed, config)
    return Target(name, module, shape, transposed, slices, _num_sparse(name, shape, slices, config))


def _expert_target(
    name: str, module: nn.Module, config: DSEEConfig, shape_of: Callable[[nn.Parameter], torch.Size]
) -> Target:
    attribute = name.rpartition(".")[2]
    weight: nn.Parameter = getattr(module, attribute)
    reject_codes(name, module, weight)
    check_experts(name, module)
    if config.dropout:
        raise ConfigError(
            f"dropout {config.dropout:g} is not supported on experts ({name}); set dropout=0, or adapt linear layers"
        )
    if any(_matches_one(name, suffix) for suffix in config.output_slices):
        raise ConfigError(f"output_slices cannot cut {name}, whose slices are its experts; leave it out")
    experts, rows, cols = map(int, shape_of(weight))
    shape, slices = (experts * rows, cols), tuple((e * rows, (e + 1) * rows) for e in range(experts))
    count = _num_sparse(name, shape, slices, config)
    return Target(name, module, shape, False, slices, count, experts=attribute)


def _num_sparse(
    name: str, shape: tuple[int, int], slices: tuple[tuple[int, int], ...], config: DSEEConfig
) -> int:
    """N of each slice, where rank and N fit every one."""
    for start, stop in slices:
        side = min(stop - start, shape[1])
        if config.rank > side:
            raise ConfigError(
                f"rank {config.rank} is over the smaller side of {name} ({stop - start} x {shape[1]}); "
                f"expected at most {side}"
            )
    smallest = min(stop - start for start, stop in slices) * shape[1]
    num_sparse = config.num_entries(smallest)
    if num_sparse > smallest:
        raise ConfigError(
            f"num_sparse {num_sparse} is over the {smallest} entries of {name} "
            f"({smallest // shape[1]} x {shape[1]}); choose fewer"
        )
    return num_sparse


def _true_shape(
    name: str, module: nn.Module, transposed: bool, shape_of: Callable[[nn.Parameter], torch.Size]
) -> tuple[int, int]:
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    reject_codes(name, module, weight)
    if transposed:
        inputs, outputs = shape_of(weight)
        return int(outputs), int(inputs)
    declared = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    if tuple(shape_of(weight)) != declared:
        raise TargetError(f"{name}.weight has shape {tuple(shape_of(weight))}, the layer declares {declared}")
    return declared


def _slices(name: str, outputs: int, conv1d: bool, config: DSEEConfig) -> tuple[tuple[int, int], ...]:
    for suffix, parts in config.output_slices.items():
        if _matches_one(name, suffix):
            return parse_slices(name, outputs, parts, conv1d=conv1d)
    return ((0, outputs),)


def _check_settings_used(config: DSEEConfig, targets: Iterable[Target]) -> None:
    for suffix in config.output_slices:
        if not any(_matches_one(target.name, suffix) for target in targets):
            raise ConfigError(f"output_slices {suffix!r} matches none of the target modules")
    if config.shared_expert_a and not any(target.experts for target in targets):
        raise ConfigError(
            "shared_expert_a has no effect: no target module is a parameter of experts; leave it out"
        )


def _nearest(pattern: str, names: Iterable[str]) -> str:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], suffixes, n=3, cutoff=0.4) or suffixes[:8]
    return f"; nearest existing: {', '.join(near)}" if near else ""
