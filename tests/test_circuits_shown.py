"""Circuits from the shell and on paper: planted checkpoints with and without the copy head's query, and bad input."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import planted
import pytest
from conftest import tiny_model
from matplotlib.patches import FancyArrowPatch
from transformers import AutoTokenizer

from lccp_interp.figures.circuit_panels import bow, circuit_panels
from lccp_interp.figures.interactive.circuit import circuit as on_screen
from lccp_interp.figures.paper import save
from lccp_interp.figures.paper.circuit import circuit as on_paper
from lccp_interp.interventions.graph import HeadEdge, HeadGraph, Route
from lccp_interp.interventions.tracing import trace_circuit
from lccp_interp.organism.tokenizer import save_tokenizer
from lccp_interp.schema import LccpError
from lccp_interp.store import Run
from lccp_interp.sweep import score

EVIL = "<script>alert(1)</script> $x_1$"


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """Two checkpoints; in the first the copy head looks anywhere."""
    return planted.save_trajectory(tmp_path_factory.mktemp("planted") / "models", [False, True])


@pytest.fixture(scope="module")
def run(trajectory, tmp_path_factory):
    return score(
        trajectory,
        tmp_path_factory.mktemp("scored") / "run",
        lengths=[96, 128],
        depths=[0, 50, 100],
        samples=1,
        needles=planted.NEEDLES,
        haystack=planted.filler(120),
        prompt=planted.PROMPT,
        self_check=False,
    )


def test_a_runs_heads_before_and_after_birth(run):
    before, after = trace_circuit(run, [planted.COPY_HEAD], checkpoints="all", n_cases=6)
    assert (before.checkpoint, after.checkpoint) == ("step-0", "step-1")
    assert before.usual[planted.COPY_HEAD] < 0.2
    assert before.strongest().edges == ()
    (edge,) = after.strongest().edges
    assert (edge.route.sender, edge.route.input, edge.n) == ((0, 0), "k", 6)
    (last,) = trace_circuit(str(run.path), [planted.COPY_HEAD], n_cases=4)
    assert (last.checkpoint, last.edges[0].n) == ("step-1", 4)
    (short,) = trace_circuit(run.path, [planted.COPY_HEAD], n_cases=4, length=96, checkpoints="step-0")
    assert short.checkpoint == "step-0"
    assert not short.table().equals(before.table())


def test_checkpoints_without_a_run_are_asked_needles_of_the_bundled_language(trajectory):
    told = []
    asked = {"length": 96, "n_cases": 2}
    graphs = trace_circuit(trajectory, [(1, 3)], checkpoints="all", progress=lambda *now: told.append(now), **asked)
    assert [graph.checkpoint for graph in graphs] == ["step-0", "step-1"]
    assert {edge.n for graph in graphs for edge in graph.edges} == {2}
    assert told[-1] == (2 * 2 * 96, 2 * 2 * 96, "step-1")
    (alone,) = trace_circuit(trajectory / "step-1", [(1, 3)], **asked)
    assert alone.table().equals(graphs[1].table())
    (other,) = trace_circuit(trajectory / "step-1", [(1, 3)], seed=1, **asked)
    assert not other.table().equals(alone.table())


def test_the_command(run, lccp, tmp_path):
    code, out, err = lccp("circuit", run.path, "1-3", "--cases", "4", "--figure", tmp_path / "circuit.svg")
    assert code == 0
    header, row, *rest = out.splitlines()
    assert header.split()[:4] == ["checkpoint", "sender", "input", "receiver"]
    assert row.split()[:4] == ["step-1", "0-0", "k", "1-3"]
    assert not rest
    assert "step-1: needle_mass of 1-3 is " in err
    assert "1 of 8 edges are clear" in err
    assert "by its query, " in err
    assert f"figure: {tmp_path / 'circuit.svg'}" in err
    assert (tmp_path / "circuit.svg").read_text().count("<svg") == 1


def test_the_command_for_scripts(run, lccp, tmp_path):
    options = [run.path, "1-3,1-0", "--length", "96", "--cases", "4"]
    _, out, _ = lccp("circuit", *options, "--only", "all", "--all", "--depth", "2", "--format", "json")
    records = json.loads(out)
    assert [record["checkpoint"] for record in records] == ["step-0"] * 16 + ["step-1"] * 16
    assert set(records[0]) >= {"depth", "sender", "input", "receiver", "target", "weight", "ci_low", "ci_high", "n"}
    _, out, _ = lccp("circuit", *options, "--format", "csv", "--top", "1")
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["sender"], row["receiver"]) == ("0-0", "1-3")
    _, out, err = lccp("circuit", run.path, "1-0", *options[2:], "--figure", tmp_path / "circuit.html")
    assert "no edge is clear; --all prints them all" in err
    assert "no clear edge" in (tmp_path / "circuit.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["9:9"], "'9:9' is no head; write layer-head"),
        (["9-9"], "has no heads 9-9: it has heads 0-3 in layers 0-1"),
        (["0-2"], "head 0-2 of step-1 stands in layer 0, the first with attention: no head feeds it; ask about a head "
         "of layer 1"),
        (["1-3", "--metric", "nope"], "unknown metric 'nope'; known: retrieval"),
        (["1-3", "--kind", "nope"], "unknown kind of patching 'nope'; known: resample, needle, mean"),
        (["1-3", "--depth", "3"], "depth must be 1 (what feeds the head) or 2"),
        (["1-3", "--only", "step-7"], "has no checkpoint 'step-7'"),
        (["1-3", "--length", "77"], "has no cases of 77 tokens; it has 96, 128"),
        (["1-3", "--figure", "a.tiff"], "--figure a.tiff: unknown ending 'tiff'; known: pdf, svg, png, html"),
    ],
)  # fmt: skip
def test_mistakes_at_the_command_line(run, lccp, options, message):
    code, out, err = lccp("circuit", run.path, *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_mistakes_without_a_run(trajectory, lccp, tmp_path):
    _, _, err = lccp("circuit", trajectory, "1-3", "--only", "step-7")
    assert "has no checkpoint 'step-7'; it has step-0, step-1" in err
    _, _, err = lccp("circuit", tmp_path / "none", "1-3")
    assert "no checkpoint folder at" in err


def test_an_architecture_that_cannot_be_traced_is_named(lccp, tmp_path):
    """Hyper-connections: what layers read is not the residual stream."""
    folder = tmp_path / "step-1"
    folder.mkdir()
    save_tokenizer(folder)
    tiny_model("hy_v4", vocab_size=len(AutoTokenizer.from_pretrained(folder))).save_pretrained(folder)
    code, _, err = lccp("circuit", folder, "2-1", "--length", "128", "--cases", "2")
    assert code == 2
    assert "(HYV4ForCausalLM): layer 2 hears nothing of earlier heads while components are held" in err


# Figures


def edge(sender, weight, input_="k", receiver=(2, 2), target=(2, 2), target_input=None):
    route = Route(sender, receiver, input_, target, target_input or input_)
    return HeadEdge(route, weight, weight - 0.01, weight + 0.01, 12, 12)


EDGES = (
    edge((0, 1), 0.3),
    edge((1, 4), 0.2, "q"),
    edge((1, 4), 0.15, "v"),
    edge((0, 5), -0.1),
    edge((0, 5), 0.05, "v", receiver=(1, 4), target_input="q"),
    edge((0, 5), 0.07, "v", receiver=(1, 4), target_input="v"),
)


def graph(edges=EDGES, *, name="step-1", metric="needle_mass"):
    return HeadGraph(name, metric, "resample", {(2, 2): 0.6}, {((2, 2), "k"): 0.5}, tuple(edges), 12, 1024)


def test_panels_share_rows_columns_and_widths():
    made = circuit_panels([graph(EDGES[:1], name="before"), graph()])
    assert made.layers == (0, 1, 2)
    assert made.columns == (1, 2, 4, 5)
    assert made.greatest == 0.3
    assert made.inputs == ["q", "k", "v"]
    assert made.hinders
    before, after = made.panels
    assert before.subtitle == "needle_mass 2-2: 0.6 (n = 12, 1K tokens)"
    assert [(node.label, node.x, node.y, node.is_target) for node in before.nodes] == [
        ("0-1", 0.0, 0.0, False), ("2-2", 1.0, 2.0, True),
    ]  # fmt: skip
    # Of the two routes of depth 2 over one edge the stronger; the weakest are drawn first.
    assert [line.edge.weight for line in after.lines] == [0.07, -0.1, 0.15, 0.2, 0.3]
    assert [line.width for line in after.lines] == pytest.approx([0.07 / 0.3, 1 / 3, 0.5, 2 / 3, 1.0])
    assert [line.helps for line in after.lines] == [True, False, True, True, True]
    assert len(circuit_panels(graph(), max_edges=2).panels[0].lines) == 2


def test_edges_between_two_heads_part_and_end_before_them():
    panel = circuit_panels(graph()).panels[0]
    lines = {line.input: line for line in panel.lines if line.start.head == (1, 4)}
    middles = {name: bow(line, n=3)[1] for name, line in lines.items()}
    assert abs(middles["q"] - middles["v"]).max() > 0.2
    points = bow(lines["q"], shorten=0.2)
    start, end = lines["q"].start, lines["q"].end
    for point, node in ((points[0], start), (points[-1], end)):
        assert 0.15 < ((point[0] - node.x) ** 2 + (point[1] - node.y) ** 2) ** 0.5 < 0.3


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("graphs", [graph(), [graph(EDGES[:1]), graph()], [graph(()), graph(())]])
def test_paper_draws_every_edge_in_vectors(tmp_path, graphs, columns):
    figure = on_paper(graphs, columns=columns)
    axes = figure.get_axes()
    drawn = [sum(isinstance(patch, FancyArrowPatch) for patch in axis.patches) for axis in axes]
    assert drawn == [len(panel.lines) for panel in circuit_panels(graphs).panels]
    assert sum("no clear edge" in text.get_text() for axis in axes for text in axis.texts) == drawn.count(0)
    svg = save(figure, tmp_path / "circuit.svg").read_text()
    assert "<image" not in svg
    assert save(figure, tmp_path / "circuit.pdf").read_bytes()[:4] == b"%PDF"


def test_lines_say_the_input_without_colour_too():
    figure = on_paper(graph())
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "into its query", "into its key", "into its value", "hinders", "0.3 lost without it",
        "head that is asked about",
    ]  # fmt: skip
    assert len({str(line._unscaled_dash_pattern) for line in legend.get_lines()[:3]}) == 3
    only = on_paper(graph(EDGES[:1])).legends[0].get_texts()
    assert [text.get_text() for text in only] == ["into its key", "0.3 lost without it", "head that is asked about"]


def test_the_screen_says_weights_under_the_pointer_and_escapes_names():
    figure = on_screen([graph(EDGES[:1], name=EVIL), graph()])
    texts = [trace.text for trace in figure.data if trace.mode == "lines+markers"]
    assert "0-1 into the key of 2-2: 0.3 (0.29 to 0.31)" in texts
    assert "0-5 into the value of 1-4, on to the value of 2-2: 0.07 (0.06 to 0.08)" in texts
    assert len(texts) == 6
    assert "<script" not in figure.to_json().replace("\\u003c", "<")
    symbols = {trace.marker.symbol for trace in figure.data if trace.mode == "lines+markers"}
    assert symbols == {"arrow", "line-ew"}
    dashes = {trace.line.dash for trace in figure.data if trace.mode == "lines+markers"}
    assert dashes == {"solid", "dash", "dot"}
    assert on_paper(graph(name=EVIL)).get_axes()[0].get_title().startswith(EVIL)


def test_graphs_of_two_metrics_are_not_one_figure():
    with pytest.raises(LccpError, match="needs graphs of one metric, got dla, needle_mass; draw one figure per metric"):
        on_paper([graph(), graph(metric="dla")])
    with pytest.raises(LccpError, match="got no graph"):
        on_screen([])


def test_drawing_and_reading_graphs_needs_no_torch(run):
    code = (
        "import sys, lccp_interp.figures.paper.circuit, lccp_interp.figures.interactive.circuit, "
        "lccp_interp.interventions.tracing; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert isinstance(run, Run)
