"""Batch norms and dropouts of an exported graph as modules again, so that `train()` and `eval()` switch them."""

from torch import fx, nn

from graphprune.coupling.tracing import operator_name

DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout_": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "feature_dropout_": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "alpha_dropout_": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
    "feature_alpha_dropout_": nn.FeatureAlphaDropout,
}
"""By the operator's ATen name."""
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the number of axes of the input."""


def with_switches(module: fx.GraphModule) -> fx.GraphModule:
    """Put a module in the place of each call that behaves otherwise in training, in place.

    A graph is exported in eval mode, and so its calls say. Tensors keep their names in the state dict. What leaves no
    call in eval mode (stochastic depth, the dropout inside an attention product) stays off.
    """
    for node in [node for node in module.graph.nodes if node.op == "call_function"]:
        name = operator_name(node)
        if name in DROPOUTS:
            module.add_module(node.name, DROPOUTS[name](node.args[1]))
            _call(module, node, node.name)
        elif name == "batch_norm" and (path := _norm_path(node)):
            if not isinstance(held := module.get_submodule(path), nn.modules.batchnorm._BatchNorm):
                module.set_submodule(path, _norm(held, node))
            _call(module, node, path)
    for node in reversed(list(module.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def _call(module: fx.GraphModule, node: fx.Node, path: str) -> None:
    with module.graph.inserting_before(node):
        replacement = module.graph.call_module(path, node.args[:1])
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)


def _norm_path(node: fx.Node) -> str:
    """Where the tensors of a batch norm are, if they are those of one module under torch's names."""
    names = ("weight", "bias", "running_mean", "running_var")
    paths = set()
    for name, source in zip(names, node.args[1:5], strict=True):
        if source is None and name in ("weight", "bias"):
            continue
        path, _, leaf = str(getattr(source, "target", "")).rpartition(".")
        paths.add(path if leaf == name else "")
    return paths.pop() if len(paths) == 1 else ""


def _norm(held: nn.Module, node: fx.Node) -> nn.Module:
    """A batch norm with the tensors that a module holds, and the momentum and epsilon of a call."""
    source, weight = node.args[0], node.args[1]
    momentum, epsilon = node.args[6:8]
    kind = NORMS[source.meta["val"].dim()]  # type: ignore[union-attr]
    norm = kind(len(held.running_mean), epsilon, momentum or None, affine=weight is not None, device="meta")  # type: ignore[arg-type]
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(held, name, None))
    return norm.train(held.training)
