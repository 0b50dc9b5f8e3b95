"""What feeds a head: edges against runs with everything frozen by hooks on named modules, and planted circuits."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import planted
import polars as pl
import pytest
import torch
from conftest import tiny_model

from lccp_interp.capture import architectures
from lccp_interp.capture.model import HookedModel, load_model
from lccp_interp.interventions.circuits import KINDS, head_graph, logit_contributions
from lccp_interp.interventions.frozen import Frozen
from lccp_interp.interventions.graph import HeadEdge, HeadGraph, Route, edges_of
from lccp_interp.interventions.heads import known_heads
from lccp_interp.interventions.hooks import head_outputs
from lccp_interp.schema import Case, LccpError, Span
from lccp_interp.scoring.engine import score_cases
from lccp_interp.scoring.metrics import METRICS, HeadMetric, needle_mass
from lccp_interp.tasks.niah import NiahGrid

FAMILIES = ("llama", "qwen3", "gpt_neox", "hunyuan_v1_moe", "mistral", "gemma3_text", "olmo2")
D_HEAD, N_HEADS, N_TOKENS, N_ANSWER = 8, 4, 40, 3
TOLERANCE = 2e-5
SENDERS = [(0, 1), (1, 3)]
RECEIVERS = [(1, 0), (2, 2)]


def case(number):
    ids = torch.randint(3, 700, (N_TOKENS,), generator=torch.Generator().manual_seed(number)).tolist()
    return Case(
        f"case-{number}", "niah", N_TOKENS, 0.5, f"needle-{number}", "text", 0, 0, tuple(ids[:-N_ANSWER]),
        tuple(ids[-N_ANSWER:]), Span(18, 26), Span(20, 24),
    )  # fmt: skip


CASES = [case(0), case(1)]
ROWS = range(N_TOKENS - N_ANSWER - 1, N_TOKENS - 1)


def fed(own):
    return torch.tensor([[*own.prompt_ids, *own.answer_ids[:-1]]])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=FAMILIES)
def model(request):
    return HookedModel(tiny_model(request.param), None, request.param)


@pytest.fixture
def llama():
    return HookedModel(tiny_model("llama"), None, "llama")


class Twin:
    """A model whose modules are known by name, run by hooks on them; attention is transformers' own, eager."""

    def __init__(self, model):
        self.model = model.model
        neox = hasattr(self.model, "gpt_neox")
        self.layers = self.model.gpt_neox.layers if neox else self.model.model.layers
        self.attentions = [layer.attention if neox else layer.self_attn for layer in self.layers]
        self.out = [attention.dense if neox else attention.o_proj for attention in self.attentions]

    def inputs(self, layer):
        """The projections that make query, key and value, by their names; one for all in GPT-NeoX."""
        attention = self.attentions[layer]
        if hasattr(attention, "query_key_value"):
            return {"qkv": attention.query_key_value}
        return {name: getattr(attention, f"{name}_proj") for name in "qkv"}

    @contextlib.contextmanager
    def hooked(self, after=(), before=()):
        handles = [module.register_forward_hook(hook) for module, hook in after]
        handles += [module.register_forward_pre_hook(hook) for module, hook in before]
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation("sdpa")
            for handle in handles:
                handle.remove()

    def run(self, ids, after=(), before=()):
        with torch.inference_mode(), self.hooked(after, before):
            return self.model(ids, use_cache=False, output_attentions=True).attentions

    def head_output(self, ids, head, after=()):
        """What the output projection gets from one head, `[token, d_head]`."""
        kept = []
        self.run(ids, after, [(self.out[head[0]], lambda module, inputs: kept.append(inputs[0]))])
        return kept[0][0, :, head[1] * D_HEAD : (head[1] + 1) * D_HEAD]

    def frozen(self, ids, changed, layer):
        """The projections of a layer where heads put out `changed` and all attentions and MLPs what they usually do."""
        modules = [
            module for pair in zip(self.attentions, [own.mlp for own in self.layers], strict=True) for module in pair
        ]
        usual, patched = {}, {}

        def keep(into):
            return lambda module, inputs, output: into.__setitem__(module, output)

        self.run(ids, [(module, keep(usual)) for module in modules])

        def swap(own):
            def hook(module, inputs):
                whole = inputs[0].clone()
                for (at, head), output in changed.items():
                    if at == own:
                        whole[..., head * D_HEAD : (head + 1) * D_HEAD] = output
                return (whole,)

            return hook

        # Each layer's attention reads the usual stream, and its projection the changed heads.
        self.run(
            ids,
            [
                (module, lambda module, inputs, output: (patched.__setitem__(module, output), usual[module])[1])
                for module in modules
            ],
            [(self.out[at], swap(at)) for at in {at for at, _ in changed}],
        )
        found = {}
        held = {module: patched[module] if module in self.attentions else usual[module] for module in modules}
        self.run(
            ids,
            [
                *((module, lambda module, inputs, output: held[module]) for module in modules),
                *(
                    (own, lambda module, inputs, output, name=name: found.__setitem__(name, output))
                    for name, own in self.inputs(layer).items()
                ),
            ],
        )
        return found

    def replaced(self, layer, name, found):
        """Hooks that make one input of a layer's attention what was found."""
        projections = self.inputs(layer)
        if "qkv" not in projections:
            return [(projections[name], lambda module, inputs, output: found[name])]

        def swap(module, inputs, output):
            mixed = output.clone().unflatten(-1, (N_HEADS, 3, D_HEAD))
            mixed[..., "qkv".index(name), :] = found["qkv"].unflatten(-1, (N_HEADS, 3, D_HEAD))[
                ..., "qkv".index(name), :
            ]
            return mixed.flatten(-3)

        return [(projections["qkv"], swap)]

    def mass(self, own, head, after=()):
        """Attention of a head on the source, mean over the answer's rows."""
        weights = self.run(fed(own), after)[head[0]][0, head[1]]
        return float(torch.stack([weights[row, own.source.start : own.source.end].sum() for row in ROWS]).mean())


def mean(values):
    return sum(values) / len(values)


def weights_of(graph):
    return {(edge.route.sender, edge.route.input, edge.route.receiver): edge.weight for edge in graph.edges}


def test_edges_are_runs_with_everything_else_frozen(model):
    graph = head_graph(model, CASES, RECEIVERS)
    got, twin = weights_of(graph), Twin(model)
    assert set(got) == {
        (sender, name, receiver)
        for sender in known_heads(model.model.config)
        for receiver in RECEIVERS
        for name in "qk"
        if sender[0] < receiver[0]
    }
    usual = {receiver: [twin.mass(own, receiver) for own in CASES] for receiver in RECEIVERS}
    for receiver in RECEIVERS:
        assert graph.usual[receiver] == pytest.approx(mean(usual[receiver]), abs=TOLERANCE)
    moved = 0.0
    for sender in SENDERS:
        outputs = [twin.head_output(fed(other), sender) for other in CASES[::-1]]
        for receiver in (receiver for receiver in RECEIVERS if receiver[0] > sender[0]):
            for name in "qk":
                losses = []
                for own, output, before in zip(CASES, outputs, usual[receiver], strict=True):
                    found = twin.frozen(fed(own), {sender: output}, receiver[0])
                    losses.append(before - twin.mass(own, receiver, twin.replaced(receiver[0], name, found)))
                assert got[sender, name, receiver] == pytest.approx(mean(losses), abs=TOLERANCE)
                moved = max(moved, abs(mean(losses)))
    assert moved > 50 * TOLERANCE


def test_all_earlier_heads_together(model):
    graph, twin, receiver = head_graph(model, CASES, [(2, 1)]), Twin(model), (2, 1)
    senders = [head for head in known_heads(model.model.config) if head[0] < 2]
    for name in "qk":
        losses = []
        for own, other in zip(CASES, CASES[::-1], strict=True):
            changed = {sender: twin.head_output(fed(other), sender) for sender in senders}
            found = twin.frozen(fed(own), changed, 2)
            losses.append(twin.mass(own, receiver) - twin.mass(own, receiver, twin.replaced(2, name, found)))
        assert graph.together[receiver, name] == pytest.approx(mean(losses), abs=TOLERANCE)


def contribution(twin, own, head, after=()):
    """What a head adds to the logits of the answer's tokens, less the final norm's division, mean over them."""
    z = twin.head_output(fed(own), head, after)
    written = z @ twin.out[head[0]].weight[:, head[1] * D_HEAD : (head[1] + 1) * D_HEAD].T
    read = twin.model.lm_head.weight * twin.model.model.norm.weight
    return mean([float(written[row] @ read[token]) for row, token in zip(ROWS, own.answer_ids, strict=True)])


def test_edges_into_values_are_measured_in_logits(llama):
    graph, twin, receiver = head_graph(llama, CASES, [(2, 3)], metric="dla"), Twin(llama), (2, 3)
    got = weights_of(graph)
    assert {name for _, name, _ in got} == {"q", "k", "v"}
    assert graph.usual[receiver] == pytest.approx(mean([contribution(twin, own, receiver) for own in CASES]), abs=1e-4)
    for name in "qkv":
        losses = []
        for own, other in zip(CASES, CASES[::-1], strict=True):
            found = twin.frozen(fed(own), {(1, 2): twin.head_output(fed(other), (1, 2))}, 2)
            after = twin.replaced(2, name, found)
            losses.append(contribution(twin, own, receiver) - contribution(twin, own, receiver, after))
        assert abs(mean(losses)) > 1e-3
        assert got[(1, 2), name, receiver] == pytest.approx(mean(losses), abs=1e-4)


def test_what_feeds_the_feeders(llama, monkeypatch):
    """A sender changes one input of a feeder, the feeder's output so changed one input of the target."""
    followed = [Route((1, 2), (2, 3), name, (2, 3), name) for name in "qk"]
    monkeypatch.setattr("lccp_interp.interventions.circuits._feeders", lambda *args: followed)
    graph, twin = head_graph(llama, CASES, [(2, 3)], depth=2), Twin(llama)
    got = {edge.route: edge.weight for edge in graph.edges if edge.route.depth == 2}
    assert set(got) == {
        Route((0, head), (1, 2), name, (2, 3), onward) for head in range(N_HEADS) for name in "qkv" for onward in "qk"
    }
    for name in "qkv":
        for onward in "qk":
            losses = []
            for own, other in zip(CASES, CASES[::-1], strict=True):
                found = twin.frozen(fed(own), {(0, 1): twin.head_output(fed(other), (0, 1))}, 1)
                feeder = twin.head_output(fed(own), (1, 2), twin.replaced(1, name, found))
                found = twin.frozen(fed(own), {(1, 2): feeder}, 2)
                losses.append(twin.mass(own, (2, 3)) - twin.mass(own, (2, 3), twin.replaced(2, onward, found)))
            assert got[Route((0, 1), (1, 2), name, (2, 3), onward)] == pytest.approx(mean(losses), abs=TOLERANCE)
    assert max(map(abs, got.values())) > 10 * TOLERANCE


@pytest.mark.parametrize("pass_tokens", [1, 3 * N_TOKENS])
def test_edges_do_not_depend_on_how_many_go_together(llama, monkeypatch, pass_tokens):
    monkeypatch.setattr("lccp_interp.interventions.graph.HeadEdge.is_clear", property(lambda edge: True))
    whole, parts = (
        head_graph(llama, CASES, RECEIVERS, depth=2, pass_tokens=size).table() for size in (10**6, pass_tokens)
    )
    assert whole.filter(depth=2).height > 0
    key = ["depth", "sender", "input", "receiver", "target", "target_input"]
    joined = whole.join(parts, on=key, validate="1:1")
    assert joined.height == whole.height == parts.height
    assert (joined["weight"] - joined["weight_right"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_induction_head_is_fed_by_the_head_that_looks_one_back(tmp_path, kind):
    model = load_model(planted.save_planted(tmp_path / "copies"))
    grid = NiahGrid(
        lengths=(120,), depths=(20, 60), needles=planted.NEEDLES, haystack=planted.filler(60), prompt=planted.PROMPT
    )
    cases = grid.build(model.tokenizer)
    graph = head_graph(model, cases, [planted.COPY_HEAD], kind=kind)
    assert graph.usual[planted.COPY_HEAD] > 0.95
    (edge,) = graph.strongest().edges
    assert edge.route == Route((0, 0), planted.COPY_HEAD, "k", planted.COPY_HEAD, "k")
    assert edge.weight > 0.7  # another needle begins with the same words
    assert graph.together[planted.COPY_HEAD, "k"] == pytest.approx(edge.weight, abs=1e-3)
    assert (edge.n, graph.n_cases, graph.length) == (6, 6, 120)
    others = [own for own in graph.edges if own.route != edge.route]
    assert len(others) == 7
    assert max(abs(own.weight) for own in others) < 1e-3
    # What is written where the head looks is the token before; the token itself comes by way of the embedding.
    values = head_graph(model, cases, [planted.COPY_HEAD], kind=kind, metric="dla").strongest(least_share=0.2)
    assert {own.route.input for own in values.edges} == {"k"}


def test_an_own_metric_and_every_known_one(llama):
    mine = HeadMetric("twice", lambda rows: 2 * needle_mass(rows))
    once, twice = (head_graph(llama, CASES, [(2, 2)], metric=metric) for metric in ("needle_mass", mine))
    for edge, other in zip(once.edges, twice.edges, strict=True):
        assert other.weight == pytest.approx(2 * edge.weight, abs=1e-6)
    for name, metric in METRICS.items():
        if metric.rows == "events":
            graph = head_graph(llama, CASES, [(2, 2)], metric=name)
            scored = mean([result.scores[name][2, 2] for result in score_cases(llama, CASES, {name: metric})])
            assert graph.usual[2, 2] == pytest.approx(scored, abs=TOLERANCE), name


def test_logit_contributions_are_the_scores_of_two_metrics(llama):
    table = logit_contributions(llama, CASES)
    results = score_cases(llama, CASES, {name: METRICS[name] for name in ("dla", "locos")})
    assert table.height == 12
    for row in table.to_dicts():
        for name in ("dla", "locos"):
            assert row[name] == pytest.approx(
                mean([result.scores[name][row["layer"], row["head"]] for result in results]), abs=1e-6
            )
    with pytest.raises(LccpError, match="a mean over cases, and there are none"):
        logit_contributions(llama, [])


CANNOT_BE_HELD = {
    "longcat_flash": "runs ModuleList, which adds to the residual stream, never in a pass: it cannot be held",
    "gemma3n_text": "runs Gemma3nTextAltUp, which adds to the residual stream, never in a pass: it cannot be held",
    "hy_v4": "layer 1 hears nothing of earlier heads while components are held",  # hyper-connections
}
"""Architectures with another kind of residual stream, and how they are refused."""


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_what_layers_are_given_in_every_architecture(architecture):
    """Heads that put out what they do leave every layer as it was; others are heard in later layers, and there only."""
    tiny = architectures.tiny_model(architecture)
    model = HookedModel(tiny, None, architecture.model_type)
    ids, other = (torch.randint(3, 700, (1, 12), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if architecture.model_type in CANNOT_BE_HELD:
        with pytest.raises(LccpError, match=CANNOT_BE_HELD[architecture.model_type]):
            Frozen.of(model, ids).inputs_under([head_outputs(model, other, [(0, 1)])], [1])
        return
    before = tiny(ids).logits
    frozen = Frozen.of(model, ids)
    layers = sorted(frozen.calls)
    first, last = layers[0], layers[-1]
    own, others = (head_outputs(model, prompt, [(first, 1), (last, 0)]) for prompt in (ids, other))
    changes = [{(first, 1): own[first, 1]}, {(first, 1): others[first, 1]}, {(last, 0): others[last, 0]}]
    given = frozen.inputs_under(changes, layers)
    for layer in layers:
        usual = (frozen.calls[layer].query, frozen.calls[layer].key, frozen.calls[layer].value)
        for part, expected in zip(given[layer], usual, strict=True):
            torch.testing.assert_close(part[:1], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(part[2:], expected, atol=1e-4, rtol=0)
    heard = (given[last][0][1] - frozen.calls[last].query[0]).abs().max()
    assert heard > 1e-3
    unheard = (given[first][0][1] - frozen.calls[first].query[0]).abs().max()
    assert unheard < 1e-4
    assert torch.equal(tiny(ids).logits, before)


def test_the_model_is_left_as_it_was_also_after_errors(llama):
    ids = fed(CASES[0])
    before = llama.model(ids).logits
    head_graph(llama, CASES, [(2, 2)], depth=2)
    frozen = Frozen.of(llama, ids)
    with pytest.raises(LccpError, match=r"head 0-1 puts out \[token, number\] \[39, 8\], got \[5, 8\]; take it from"):
        frozen.inputs_under([{(0, 1): torch.zeros(5, 8)}], [2])
    assert torch.equal(llama.model(ids).logits, before)
    assert llama.model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in llama.model.modules())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": [(0, 3)]}, "head 0-3 of llama stands in layer 0, the first with attention: no head feeds it; ask "
         "about a head of layers 1-2"),
        ({"heads": [(7, 0)]}, "checkpoint llama has no heads 7-0: it has heads 0-3 in layers 0-2"),
        ({"metric": "qrscore"}, "metric qrscore reads the question's tokens; what feeds a head is measured where it"),
        ({"metric": "needle_mas"}, "unknown metric 'needle_mas'; .* did you mean 'needle_mass'"),
        ({"kind": "noise"}, "unknown kind of patching 'noise'; known: resample, needle, mean"),
        ({"depth": 3}, "depth must be 1"),
        ({"cases": []}, "on cases of one length, got no cases"),
        ({"cases": [CASES[0], dataclasses.replace(CASES[1], length=99)]}, "got cases of 40, 99 tokens; choose one"),
        ({"cases": CASES[:1]}, "there is one only; ask for two"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(llama, wrong, message):
    with pytest.raises(LccpError, match=message):
        head_graph(llama, **({"cases": CASES, "heads": [(2, 2)]} | wrong))


def test_values_that_cannot_be_read_are_refused_by_name():
    model = HookedModel(architectures.tiny_model(architectures.named("qwen3_next")), None, "qwen3_next")
    with pytest.raises(LccpError, match="has no linear module that is given the heads' outputs as they are"):
        head_graph(model, CASES, [(3, 0)], metric="dla")
    assert head_graph(model, CASES, [(3, 0)]).table().height == 8


ROUTE = Route((0, 1), (2, 2), "k", (2, 2), "k")


def test_intervals_take_cases_of_a_cluster_together():
    """Twice the same cases are no more than once, and one cluster says nothing."""
    values = [0.3, 0.1, 0.2, 0.6]
    (once,) = edges_of({ROUTE: values}, "abcd")
    (twice,) = edges_of({ROUTE: values * 2}, "abcdabcd")
    assert (once.low, once.high) == pytest.approx((twice.low, twice.high))
    sd = (sum((value - 0.3) ** 2 for value in values) / 3) ** 0.5
    assert once.high - once.weight == pytest.approx(3.182446 * sd / 2)  # Student's with 3 degrees of freedom
    (alone,) = edges_of({ROUTE: values}, "aaaa")
    assert math.isnan(alone.low)
    assert not alone.is_clear


def test_intervals_cover_what_they_say():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        noise = torch.randn(6, generator=generator).repeat_interleave(2) + 0.3 * torch.randn(12, generator=generator)
        (edge,) = edges_of({ROUTE: noise.tolist()}, [index // 2 for index in range(12)])
        covered += edge.low < 0 < edge.high
    assert 0.92 < covered / 400 < 0.98


def edge(sender, weight, *, low=None, high=None, receiver=(2, 2), input_="k"):
    low, high = (weight - 0.1 if low is None else low), (weight + 0.1 if high is None else high)
    return HeadEdge(Route(sender, receiver, input_, (2, 2), "k"), weight, low, high, 12, 12)


def test_the_strongest_edges_are_clear_and_ordered():
    edges = (edge((0, 0), 0.05), edge((0, 1), 0.3), edge((0, 2), -0.5), edge((1, 0), 0.2, receiver=(1, 1)))
    graph = HeadGraph("step-1", "needle_mass", "resample", {(2, 2): 0.8}, {}, edges)
    assert [own.weight for own in graph.strongest().edges] == [-0.5, 0.3, 0.2]
    assert [own.weight for own in graph.strongest(1).edges] == [-0.5]
    assert [own.weight for own in graph.strongest(depth=2).edges] == [0.2]
    assert [own.weight for own in graph.strongest(least_share=0.5).edges] == [-0.5]
    assert graph.heads == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2)]
    table = graph.table()
    assert table["depth"].to_list() == [1, 1, 1, 2]
    assert table["weight"].to_list() == [0.3, 0.05, -0.5, 0.2]
    assert table["share"].to_list() == pytest.approx([0.375, 0.0625, -0.625, 0.25])
    empty = dataclasses.replace(graph, edges=())
    assert empty.table().schema == table.schema
    assert empty.heads == [(2, 2)]
    unseen = dataclasses.replace(graph, usual={(2, 2): 0.0}).table()
    assert unseen["share"].is_nan().all()
    assert isinstance(table, pl.DataFrame)
