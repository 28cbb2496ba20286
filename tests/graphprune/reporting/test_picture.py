"""The picture of the coupled graph: valid SVG, one colour for what is cut together, another for the next group."""

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graphprune.coupling.tracing import trace
from graphprune.errors import InputError
from graphprune.reporting.picture import GroupLabels, write_picture
from tests.graphprune import networks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", ["vgg", "channel_shuffle", "attention_fused", "group_norm"])
def test_layers_of_one_group_have_one_colour(name: str, tmp_path: Path) -> None:
    build, inputs = networks.NETWORKS[name]
    graph = trace(build(), inputs)
    root = ElementTree.parse(write_picture(graph, tmp_path / "graph.svg")).getroot()
    colours: dict[int, set[str | None]] = defaultdict(set)
    boxes = [box for box in root.iter(f"{SVG}g") if box.find(f"{SVG}rect") is not None]
    assert len(boxes) == len(graph.layers)
    free = GroupLabels(graph).free
    for box, layer in zip(boxes, graph.layers, strict=True):
        filled = [rect.get("fill") for rect in box.iter(f"{SVG}rect") if rect.get("fill-opacity")]
        atoms = tuple(sorted(layer.outputs.atoms() & free.keys()))
        assert len(filled) == len(atoms)
        for atom, colour in zip(atoms, filled, strict=True):
            colours[atom].add(colour)
    assert all(len(found) == 1 for found in colours.values())
    assert len({colour for found in colours.values() for colour in found}) == len(colours)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    graph = trace(networks.vgg(), networks.images())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        write_picture(graph, tmp_path / "file" / "graph.svg")
    assert len(str(caught.value).splitlines()) == 1
