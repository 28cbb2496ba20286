"""ONNX out of ONNX: a cut file with the names of inputs and outputs, and the free sizes, that it came with."""

import tempfile
from pathlib import Path

import onnx

from graphprune.coupling.graph import ModelGraph
from graphprune.cutting.surgery import example_inputs, graph_of, operate
from graphprune.onnx_files.export import export_onnx
from graphprune.onnx_files.importing import Source, import_onnx
from graphprune.plan import Plan

TOLERANCE = 1e-3
"""What a wrong cut is far beyond; rounding alone comes to 1.4e-4 of the largest output in some networks."""


def cut_file(source: Source, plan: Plan, graph: ModelGraph | None = None) -> onnx.ModelProto:
    """The model of a file with the plan's structures gone, checked in ONNX Runtime against torch.

    Raises as `import_onnx`, `apply` and `export_onnx` do.
    """
    model = import_onnx(source)
    pruned = operate(model, graph or graph_of(model, plan), plan).model
    fixed = [sizes[0] for _, sizes in model.inputs if sizes and sizes[0] is not None]
    batch = fixed[0] if fixed else 2
    with tempfile.TemporaryDirectory() as folder:
        inputs, path = example_inputs(plan.inputs, batch), Path(folder) / "pruned.onnx"
        file = export_onnx(pruned, path, inputs, not fixed, tolerance=TOLERANCE)
        proto = onnx.load(file)
    names = dict(zip([value.name for value in proto.graph.input], model.input_names, strict=True))
    names |= dict(zip([value.name for value in proto.graph.output], model.output_names, strict=True))
    _rename(proto.graph, names)
    return proto


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give values other names, in place; a value within that has such a name already gets a new one."""
    inner = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    taken = inner & set(names.values())
    names = {name: names.get(name, f"{name}_") for name in (*names, *sorted(taken))}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
