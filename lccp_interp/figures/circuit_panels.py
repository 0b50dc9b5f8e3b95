"""Where the heads and edges of a circuit stand, for both kinds of figures.

One panel per graph, layers upwards, heads in columns; the same rows, columns and widths in every panel, so that two
checkpoints can be laid side by side. Only the strongest clear edges are drawn. This module knows `HeadGraph`; it
refuses to know matplotlib and plotly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lccp_interp.figures import style
from lccp_interp.interventions.graph import HeadEdge, HeadGraph
from lccp_interp.interventions.heads import Head, head_text
from lccp_interp.schema import LccpError

MAX_EDGES = 12
COLOURS = {"q": style.KINDS[0], "k": style.KINDS[1], "v": style.KINDS[2]}
NAMES = {"q": "query", "k": "key", "v": "value"}
BENDS = {"q": -0.16, "k": 0.0, "v": 0.16}
"""How far edges into the inputs bow to the right, as a share of their length, so that three between two heads part."""


@dataclass(frozen=True)
class Node:
    """A head, at column `x` and layer `y`."""

    head: Head
    x: float
    y: float
    is_target: bool

    @property
    def label(self) -> str:
        """As people write it."""
        return head_text([self.head])


@dataclass(frozen=True)
class Line:
    """An edge between two nodes; `width` is its weight as a share of the greatest in all panels, 0..1."""

    edge: HeadEdge
    start: Node
    end: Node
    width: float

    @property
    def input(self) -> str:
        """`q`, `k` or `v`."""
        return self.edge.route.input

    @property
    def helps(self) -> bool:
        """Whether the target loses without it; else it gains."""
        return self.edge.weight > 0


@dataclass(frozen=True)
class Panel:
    """One graph."""

    graph: HeadGraph
    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]

    @property
    def subtitle(self) -> str:
        """The targets' scores, and on how many cases of which length."""
        graph = self.graph
        scores = [f"{head_text([head])}: {style.format_number(score, 2)}" for head, score in graph.usual.items()]
        asked = f" (n = {graph.n_cases}, {style.format_length(graph.length)} tokens)" if graph.n_cases else ""
        return f"{graph.metric} {', '.join(scores)}{asked}"


@dataclass(frozen=True)
class Circuit:
    """All panels, with the columns (numbers of heads), the rows (layers) and the greatest weight they share."""

    panels: tuple[Panel, ...]
    columns: tuple[int, ...]
    layers: tuple[int, ...]
    greatest: float

    @property
    def inputs(self) -> list[str]:
        """Inputs that some edge goes into."""
        used = {line.input for panel in self.panels for line in panel.lines}
        return [name for name in COLOURS if name in used]

    @property
    def hinders(self) -> bool:
        """Whether the target gains without some edge."""
        return any(not line.helps for panel in self.panels for line in panel.lines)


def circuit_panels(graphs: HeadGraph | Sequence[HeadGraph], max_edges: int = MAX_EDGES) -> Circuit:
    """Lay out graphs of one metric, the `max_edges` strongest clear edges of each.

    Raises:
        LccpError: no graph, or graphs of different metrics, whose widths would not compare.

    Example:
        >>> graph = HeadGraph("step-1", "needle_mass", "resample", {(2, 2): 0.6}, {}, ())
        >>> circuit_panels(graph).layers
        (2,)
    """
    given = [graphs] if isinstance(graphs, HeadGraph) else list(graphs)
    metrics = sorted({graph.metric for graph in given})
    if len(metrics) != 1:
        raise LccpError(
            f"a figure of circuits needs graphs of one metric, got {', '.join(metrics) or 'no graph'}; draw one figure "
            "per metric"
        )
    drawn = [graph.strongest(max_edges) for graph in given]
    heads = sorted({head for graph in drawn for head in graph.heads})
    columns = tuple(sorted({head for _, head in heads}))
    layers = tuple(range(heads[0][0], heads[-1][0] + 1))
    greatest = max((abs(edge.weight) for graph in drawn for edge in graph.edges), default=0.0)
    panels = []
    for graph in drawn:
        nodes = {
            (layer, head): Node((layer, head), float(columns.index(head)), float(layer), (layer, head) in graph.usual)
            for layer, head in graph.heads
        }
        lines = tuple(
            Line(edge, nodes[edge.route.sender], nodes[edge.route.receiver], abs(edge.weight) / greatest)
            for edge in _one_each(graph.edges)
        )
        panels.append(Panel(graph, tuple(nodes.values()), lines))
    return Circuit(tuple(panels), columns, layers, greatest)


def _one_each(edges: Sequence[HeadEdge]) -> list[HeadEdge]:
    """Of edges that differ only in how they go on to the target the strongest; the weakest first, below the others."""
    found: dict[tuple[Head, Head, str], HeadEdge] = {}
    for edge in sorted(edges, key=lambda edge: abs(edge.weight)):
        found[edge.route.sender, edge.route.receiver, edge.route.input] = edge
    return sorted(found.values(), key=lambda edge: abs(edge.weight))


def bow(line: Line, *, n: int = 24, shorten: float = 0.0, aspect: float = 1.0) -> NDArray[np.float64]:
    """Points `[n, 2]` of an edge, a parabola bowed by its input, from `shorten` behind its start to before its end.

    Args:
        line: the edge.
        n: points.
        shorten: room left for the nodes, in layers.
        aspect: length of a column over that of a layer, on the page.

    Example:
        >>> nodes = Node((0, 0), 0.0, 0.0, False), Node((1, 0), 0.0, 1.0, True)
        >>> from lccp_interp.interventions.graph import Route
        >>> edge = HeadEdge(Route((0, 0), (1, 0), "k", (1, 0), "k"), 0.3, 0.2, 0.4, 12, 12)
        >>> bow(Line(edge, *nodes, 1.0), n=3, shorten=0.25)[:, 1].tolist()
        [0.25, 0.5, 0.75]
    """
    start, end = (np.array([node.x * aspect, node.y]) for node in (line.start, line.end))
    along = end - start
    length = float(np.hypot(*along))
    aside = np.array([along[1], -along[0]]) * BENDS[line.input]
    at = np.linspace(shorten / length, 1 - shorten / length, n)[:, None]
    points = start + at * along + 4 * at * (1 - at) * aside
    return points / np.array([aspect, 1.0])


def said(line: Line) -> str:
    """One edge in words.

    Example:
        >>> nodes = Node((0, 1), 1.0, 0.0, False), Node((2, 2), 2.0, 2.0, True)
        >>> from lccp_interp.interventions.graph import Route
        >>> edge = HeadEdge(Route((0, 1), (2, 2), "k", (2, 2), "k"), 0.3, 0.2, 0.4, 12, 12)
        >>> said(Line(edge, *nodes, 1.0))
        '0-1 into the key of 2-2: 0.3 (0.2 to 0.4)'
    """
    edge, route = line.edge, line.edge.route
    onward = "" if route.depth == 1 else f", on to the {NAMES[route.target_input]} of {head_text([route.target])}"
    numbers = [style.format_number(value, 2) for value in (edge.weight, edge.low, edge.high)]
    where = f"{line.start.label} into the {NAMES[line.input]} of {line.end.label}"
    return f"{where}{onward}: {numbers[0]} ({numbers[1]} to {numbers[2]})"
