"""What a pruned network must compute, by a second route: the dense network, masked.

`masked_outputs` interprets the exported dense graph. After every operator it zeroes the cut indices of the result;
operators that reduce over a cut axis are computed here, over the kept indices only. Nothing is ever made smaller, and
neither the surgery nor `Form.kept` is used: masks are outer products of booleans.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphprune.coupling.axes import Form
from graphprune.coupling.graph import Branch, ModelGraph, Site
from graphprune.coupling.tracing import trace
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.surgery import Operation, perform
from graphprune.plan import Choice, Plan

Keep = dict[int, tuple[int, ...]]
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


# --- masks ----------------------------------------------------------------------------------------------------------


def axis_mask(form: Form, keep: Keep) -> np.ndarray:
    """True where an index of an axis stays."""
    if form.kind == "atom":
        mask = np.ones(form.size, dtype=bool)
        if form.atom in keep:
            mask[:] = False
            mask[list(keep[form.atom])] = True
        return mask
    parts = [axis_mask(part, keep) for part in form.parts]
    return np.concatenate(parts) if form.kind == "sum" else reduce(np.kron, parts, np.ones(1, dtype=bool))


def tensor_mask(axes: Sequence[Form], keep: Keep) -> torch.Tensor:
    """True where an element of a tensor stays; shape as the tensor, 1 on axes that are not cut."""
    mask = torch.ones([1] * len(axes), dtype=torch.bool)
    for position, form in enumerate(axes):
        if form.atoms() & keep.keys():
            shape = [1] * len(axes)
            shape[position] = form.size
            mask = mask & torch.from_numpy(axis_mask(form, keep)).reshape(shape)
    return mask


# --- reductions over the kept part ----------------------------------------------------------------------------------


def _zeroed(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def _moments(x: torch.Tensor, kept: torch.Tensor, dims: Sequence[int], correction: float = 0) -> list[torch.Tensor]:
    kept = kept.expand_as(x)
    count = kept.sum(tuple(dims), keepdim=True)
    mean = _zeroed(x, kept).sum(tuple(dims), keepdim=True) / count
    var = _zeroed((x - mean) ** 2, kept).sum(tuple(dims), keepdim=True) / (count - correction)
    return [mean, var]


def _affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dim: int) -> torch.Tensor:
    shape = [-1 if position == dim else 1 for position in range(x.dim())]
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    x = a["input"]
    mean, var = _moments(x, kept, range(x.dim() - len(a["normalized_shape"]), x.dim()))
    x = (x - mean) / torch.sqrt(var + a["eps"])
    x = x if a["weight"] is None else x * a["weight"]
    return x if a["bias"] is None else x + a["bias"]


def _rms_norm(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    x = a["input"]
    mean, _ = _moments(x**2, kept, range(x.dim() - len(a["normalized_shape"]), x.dim()))
    x = x / torch.sqrt(mean + (torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]))
    return x if a["weight"] is None else x * a["weight"]


def _group_norm(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    x, groups = a["input"], a["num_groups"]
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, var = _moments(grouped, kept.expand_as(x).reshape(grouped.shape), [2])
    x = ((grouped - mean) / torch.sqrt(var + a["eps"])).reshape(x.shape)
    return _affine(x, a["weight"], a["bias"], 1)


def _batch_norm(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    x = a["input"]
    if a["training"]:
        mean, var = _moments(x, kept, [dim for dim in range(x.dim()) if dim != 1])
        return _affine((x - mean) / torch.sqrt(var + a["eps"]), a["weight"], a["bias"], 1)
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    x = (x - a["running_mean"].reshape(shape)) / torch.sqrt(a["running_var"].reshape(shape) + a["eps"])
    return _affine(x, a["weight"], a["bias"], 1)


def _instance_norm(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    mean, var = _moments(a["input"], kept, range(2, a["input"].dim()))
    return _affine((a["input"] - mean) / torch.sqrt(var + a["eps"]), a["weight"], a["bias"], 1)


def _dims(a: dict[str, Any], x: torch.Tensor) -> list[int]:
    dim = a.get("dim")
    dims = list(range(x.dim())) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    return [d % x.dim() for d in dims]


def _squeeze(x: torch.Tensor, a: dict[str, Any], dims: list[int]) -> torch.Tensor:
    return x if a.get("keepdim") else x.squeeze(tuple(dims))


def _mean(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    dims = _dims(a, a["self"])
    return _squeeze(_moments(a["self"], kept, dims)[0], a, dims)


def _var(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    dims = _dims(a, a["self"])
    correction = a.get("correction", int(a.get("unbiased", True)))
    return _squeeze(_moments(a["self"], kept, dims, 1 if correction is None else correction)[1], a, dims)


def _var_mean(a: dict[str, Any], kept: torch.Tensor) -> list[torch.Tensor]:
    return [_var(a, kept), _mean(a, kept)]


def _std_mean(a: dict[str, Any], kept: torch.Tensor) -> list[torch.Tensor]:
    return [torch.sqrt(_var(a, kept)), _mean(a, kept)]


def _prod(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
    return torch.prod(torch.where(kept, a["self"], torch.ones((), dtype=a["self"].dtype)), a["dim"], a["keepdim"])


def _filled(value: float, function: Callable[..., torch.Tensor]) -> Callable[[dict[str, Any], torch.Tensor], Any]:
    def compute(a: dict[str, Any], kept: torch.Tensor) -> torch.Tensor:
        x = a["self"]
        x = torch.where(kept, x, torch.full((), value, dtype=x.dtype))
        if function in (torch.softmax, torch.log_softmax):
            return function(x, a["dim"])
        return function(x, _dims(a, x), keepdim=bool(a.get("keepdim")))

    return compute


REDUCTIONS: dict[str, Callable[[dict[str, Any], torch.Tensor], Any]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "batch_norm": _batch_norm,
    "instance_norm": _instance_norm, "mean": _mean, "var": _var, "std": lambda a, kept: torch.sqrt(_var(a, kept)),
    "softmax": _filled(-torch.inf, torch.softmax), "log_softmax": _filled(-torch.inf, torch.log_softmax),
    "amax": _filled(-torch.inf, torch.amax), "amin": _filled(torch.inf, torch.amin),
    "logsumexp": _filled(-torch.inf, torch.logsumexp), "var_mean": _var_mean, "std_mean": _std_mean, "prod": _prod,
}  # fmt: skip
"""Operators that read the number or the rank of what they reduce; sums and products with zeros need no help."""


def _attention(a: dict[str, Any], kept_keys: torch.Tensor) -> torch.Tensor:
    """Softmax over the kept keys; the scale is that of the dense width."""
    query, key, value = a["query"], a["key"], a["value"]
    if a["enable_gqa"]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
    mask = a["attn_mask"]
    if a["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    scores = torch.where(kept_keys, scores, torch.full((), -torch.inf, dtype=scores.dtype))
    return torch.softmax(scores, -1) @ value


# --- the masked network ---------------------------------------------------------------------------------------------


class _Masked(fx.Interpreter):
    def __init__(self, graph: ModelGraph, keep: Keep, dropped: Sequence[Branch] = ()) -> None:
        super().__init__(graph.exported.graph_module)
        self.keep = keep
        self.skips = {branch.node: branch.skip for branch in dropped}
        self.forms = next(iter(graph.calls.values())).known

    def run_node(self, n: fx.Node) -> Any:
        result = self._computed(n) if n.op == "call_function" else super().run_node(n)
        forms = self.forms.get(n)
        if n.op == "output" or not forms:
            return result
        if isinstance(result, torch.Tensor):
            return self._mask(result, forms[0])
        if isinstance(result, (list, tuple)):
            return [self._mask(tensor, axes) for tensor, axes in zip(result, forms, strict=True)]
        return result

    def _computed(self, n: fx.Node) -> Any:
        if n.name in self.skips:
            operands = [self.env[x] for x in n.args if isinstance(x, fx.Node)]
            skip = [x.name for x in n.all_input_nodes].index(self.skips[n.name])
            return operands[skip] + torch.zeros_like(operands[1 - skip])
        schema = getattr(n.target, "_schema", None)
        name = "" if schema is None else schema.name.removeprefix("aten::")
        if name not in REDUCTIONS and name != "scaled_dot_product_attention":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
        bound = {argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments}
        if name == "scaled_dot_product_attention":
            keys = self.forms[n.args[1]][0][-2]
            return _attention(bound, tensor_mask([keys], self.keep))
        return REDUCTIONS[name](bound, tensor_mask(self.forms[n.args[0]][0], self.keep))

    def _mask(self, tensor: torch.Tensor, axes: Sequence[Form]) -> torch.Tensor:
        kept = tensor_mask(axes, self.keep)
        if kept.all():
            return tensor
        if 0 in tensor.stride():
            return _zeroed(tensor, kept)
        return tensor.masked_fill_(~kept, 0)  # in place: what an operator writes through a view is seen by all readers


def masked_outputs(
    graph: ModelGraph, plan: Plan, model: nn.Module, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The outputs of the dense model in which everything that the plan cuts is zero."""
    sites = {site.name: site for site in graph.all_sites}
    chosen = [(sites[choice.site], choice.keep) for choice in plan.choices]
    keep = {site.atom: kept for site, kept in chosen if site.kind not in ("kernel", "block")}
    dropped = [site.branch for site, kept in chosen if site.branch is not None and not kept]
    kernels = {
        _weight_name(graph, site): (site, choice.pattern, choice.keep)
        for choice in plan.choices
        if (site := sites[choice.site]).kind == "kernel"
    }
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    signature, user = graph.exported.graph_signature, iter(inputs)
    feed = []
    for spec in signature.input_specs:
        if spec.target in state:
            value = state[spec.target].detach().clone()
            feed.append(_kernel_masked(value, *kernels[spec.target]) if spec.target in kernels else value)
        elif spec.target in graph.exported.constants:
            feed.append(graph.exported.constants[spec.target].clone())
        else:
            feed.append(next(user).clone())
    with torch.no_grad():
        return list(_Masked(graph, keep, dropped).run(*feed))


def _weight_name(graph: ModelGraph, site: Site) -> str:
    return next(layer.weight for layer in graph.layers if layer.node == site.node)


def _kernel_masked(weight: torch.Tensor, site: Site, pattern: str, kept: tuple[int, ...]) -> torch.Tensor:
    """`kept` are positions of the kernel; of a mix filter * positions + position, of groups filter * 4 + quarter; of
    n-of-m chunk * 6^12 + 12 digits to the base 6, the number of a pair in each quadruple.
    """
    filters, channels, *taps = weight.shape
    ones = [1] * len(taps)
    if pattern == "n-of-m":
        pairs = list(combinations(range(4), 2))
        digits = [number // 6**digit % 6 for number in kept for digit in range(12)]
        stay = {(n // (channels // 4), n % (channels // 4) * 4 + i) for n, d in enumerate(digits) for i in pairs[d]}
        spots = [[(row, column) in stay for column in range(channels)] for row in range(filters)]
        return weight * torch.tensor(spots).reshape(filters, channels, *ones)
    units = 4 if pattern == "groups" else site.size
    mask = torch.zeros(1 if pattern == "kernel" else filters, units, dtype=torch.bool)
    mask.reshape(-1)[list(kept)] = True
    if pattern == "groups":
        read = mask[:, torch.arange(channels) * 4 // channels]
        return weight * read.reshape(filters, channels, *ones)
    return weight * mask.reshape(-1, 1, *taps)


# --- random weights, random plans, the check ------------------------------------------------------------------------


def scramble(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights of sane scale everywhere: no zero bias, no unit gain, no standard running statistics."""
    generator = torch.Generator().manual_seed(seed)

    def normal(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        model = model.to(dtype)
        for name, value in model.named_parameters():
            fan_in = value[0].numel() if value.dim() > 1 else 1
            gain = name.endswith(("weight", "gamma")) and value.dim() == 1
            value.copy_(1 + 0.3 * normal(value) if gain else normal(value) * (0.3 if fan_in == 1 else fan_in**-0.5))
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.3 * normal(value))
            elif name.endswith("running_var"):
                value.copy_(0.5 + normal(value) ** 2)
    return model.eval()


def random_keep(site: Site, rng: np.random.Generator) -> tuple[int, ...]:
    """Some units of a site, at least one and not all where it has two; a random rectangle for a kernel."""
    if site.kind != "kernel":
        count = int(rng.integers(1, max(site.size, 2)))
        return tuple(sorted(rng.choice(site.size, count, replace=False).tolist()))
    rows, columns = (sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in site.kernel)
    return tuple(r * site.kernel[1] + c for r in range(*rows) for c in range(*columns))


def random_plan(graph: ModelGraph, rng: np.random.Generator, groups: float = 0.8, kernels: float = 0.6) -> Plan:
    """Random choices at a share of the sites: groups that are not frozen, kernels; branches stay."""
    sites = [site for site in graph.all_sites if site.branch is None and site.size > 1]
    chosen = [site for site in sites if rng.random() < (kernels if site.kind == "kernel" else groups)]
    choices = [Choice(site.name, site.kind, "some", random_keep(site, rng)) for site in chosen]
    return Plan(graph.signature, tuple(choices), graph.inputs)


def cuts_of(graph: ModelGraph, plan: Plan) -> Cuts:
    """What a plan cuts, for groups of any kind, those without a pattern of their own too."""
    keep, windows = {}, {}
    dropped: list[Branch] = []
    for choice in plan.choices:
        site = graph.site[choice.site]
        if site.branch is not None:
            dropped += [] if choice.keep else [site.branch]
            continue
        if site.kind != "kernel":
            keep[site.atom] = np.array(choice.keep)
            continue
        if site.kernel == (1, 1):  # which has no other window
            continue
        positions = [divmod(position, site.kernel[1]) for position in choice.keep]
        rows, columns = ([position[axis] for position in positions] for axis in (0, 1))
        windows[site.node] = ((min(rows), max(rows) + 1), (min(columns), max(columns) + 1))
    return Cuts(keep, windows, tuple(dropped))


def relative_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest expected value; infinite where shapes differ."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    return max(float((a - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in pairs)


def outputs_of(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output tensors of a module, in the order of the exported graph."""
    with torch.no_grad():
        return [x for x in torch.utils._pytree.tree_leaves(model.eval()(*inputs)) if isinstance(x, torch.Tensor)]


def check_masked_equivalence(
    model: nn.Module, graph: ModelGraph, plan: Plan, inputs: Sequence[torch.Tensor], tolerance: float | None = None
) -> Operation:
    """Assert invariant 1 for one plan; the operation is returned."""
    result = perform(model, graph, cuts_of(graph, plan))
    expected = masked_outputs(graph, plan, model, inputs)
    floats = [x.dtype for x in expected if x.is_floating_point()]
    error = relative_error(outputs_of(result.model, inputs), expected)
    assert error <= (tolerance or EXACT[floats[0]]), f"relative error {error}, own class {result.own_class}, {plan}"
    if any(len(choice.keep) < graph.site[choice.site].size for choice in plan.choices):
        assert element_count(result.model) < element_count(model), "nothing became smaller"
    return result


def element_count(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(value.numel() for value in model.parameters())


def check_random_plans(
    model: nn.Module, inputs: Sequence[torch.Tensor], plans: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[ModelGraph, list[Operation]]:
    """Scramble and trace a model, and assert invariant 1 for random plans."""
    scramble(model, seed, dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    graph, rng = trace(model, inputs), np.random.default_rng(seed)
    results = [check_masked_equivalence(model, graph, random_plan(graph, rng), inputs) for _ in range(plans)]
    return graph, results
