"""`python -m benchmarks.gpu`: what capture costs at full size on one CUDA device, in under 8 minutes.

Models have the shapes of real ones and random weights, written on the device itself. The stages run in the order of
their importance against one clock; what it leaves no time for, or what does not fit into the device, is recorded as
skipped with the reason. `--only STAGE,...` runs some of them, with the whole clock for those, and keeps the others'
records. Without a CUDA device it says so and changes nothing; `--device cpu --tiny` runs the same code on a toy.

Times are wall times between synchronisations; peaks are what torch has allocated, weights included.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, timing
from benchmarks.passes import N_ROWS, open_pass, random_ids, reduce_rows
from lccp_interp.schema import LccpError

RESULTS = Path(__file__).resolve().parent / "results_gpu.json"
TITLE = "Full-size models, on a GPU"
CLOCK_S = 420.0
"""Of the 480 seconds promised; the rest is for imports and for a pass that takes longer than foreseen."""

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
}
HUNYUAN_HALF = {
    "model_type": "hunyuan_v1_moe",
    "hidden_size": 4096,
    "intermediate_size": 3072,  # of the shared expert and of each routed one
    "num_hidden_layers": 16,  # of 32
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 64,
    "moe_topk": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1 << 20,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
TINY_EXPERTS = {"num_experts": 4, "moe_topk": 2}
TINY_DIVISOR = 128
"""A tiny run divides every length by this, down to twice the rows that are read."""


@dataclass
class Rig:
    """The device, the clock, and how large a run is meant."""

    device: str
    tiny: bool = False
    clock_s: float = CLOCK_S
    say: Callable[[str], Any] = print
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        """Whether peaks can be read and calls have to be waited for."""
        return self.device.startswith("cuda")

    @property
    def left_s(self) -> float:
        """Seconds left on the clock."""
        return self.clock_s - (time.perf_counter() - self.started)

    def length(self, n_tokens: int) -> int:
        """A length as this rig runs it."""
        return max(2 * N_ROWS, n_tokens // TINY_DIVISOR) if self.tiny else n_tokens

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def measured(self, run: Callable[[], Any]) -> tuple[float, float | None]:
        """Seconds and peak MiB (weights included; None on a CPU) of one call."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elapsed = timing.seconds(run, self.sync)
        return elapsed, torch.cuda.max_memory_allocated() / 2**20 if self.cuda else None


@contextlib.contextmanager
def random_model(rig: Rig, shape: dict[str, Any]) -> Iterator[Any]:
    """A model of this shape, bf16 on a GPU, its random weights written where they stay; gone after the block."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    shape = dict(shape)
    if rig.tiny:
        shape |= TINY | (TINY_EXPERTS if "num_experts" in shape else {})
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with no_init_weights(), torch.device(rig.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if rig.cuda else torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(1.0)
    try:
        yield model.eval()
    finally:
        del model
        free(rig)


def free(rig: Rig) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if rig.cuda:
        torch.cuda.empty_cache()


def weights_mib(model: Any) -> float:
    """Size of the parameters."""
    return sum(weight.nbytes for weight in model.parameters()) / 2**20


def tokens_for(rig: Rig, model: Any, length: int) -> Tensor:
    """Random ids of the model's vocabulary, on the device."""
    return random_ids(length, model.config.vocab_size).to(rig.device)


def peak_ratios(plain: float | None, capture: float | None, weights: float) -> dict[str, float | None]:
    """Capture's peak over the plain one, with the weights and above them."""
    if plain is None or capture is None:
        return {"memory_ratio": None, "memory_ratio_above_weights": None}
    return {"memory_ratio": capture / plain, "memory_ratio_above_weights": (capture - weights) / (plain - weights)}


def skipped(length: int, why: str) -> dict[str, Any]:
    """The record of a length that was not measured."""
    return {"length": length, "skipped": why}


def guarded(rig: Rig, length: int, foreseen_s: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record that `measure` makes, or of why there is none: no time left, or no memory."""
    if foreseen_s > rig.left_s:
        return skipped(length, f"{foreseen_s:.0f} s foreseen, {max(0.0, rig.left_s):.0f} s left on the clock")
    try:
        record = measure()
    except (torch.OutOfMemoryError, LccpError) as error:  # prefill gives up with one of ours
        record = skipped(length, f"out of memory ({str(error).splitlines()[0]})")
    free(rig)
    rig.say(f"  {record}")
    return record


def foreseen(records: list[dict[str, Any]], length: int, n_passes: int) -> float:
    """Seconds that passes of this length take at worst: they grow at most with the square of the length."""
    known = [r for r in records if "skipped" not in r]
    return n_passes * known[-1]["plain_s"] * (length / known[-1]["length"]) ** 2 if known else 0.0


def against_plain(rig: Rig, shape: dict[str, Any], lengths: dict[int, int]) -> list[dict[str, Any]]:
    """Plain and capturing passes in turn; `lengths` says how many pairs each is worth."""
    records: list[dict[str, Any]] = []
    with random_model(rig, shape) as model:
        passes = {kind: open_pass(kind, model) for kind in ("plain", "capture")}
        short = tokens_for(rig, model, rig.length(8192))
        for run in passes.values():
            run(short)
        plain_s, _ = rig.measured(lambda: passes["plain"](short))
        known = [{"length": rig.length(8192), "plain_s": plain_s}]
        for asked, at_most in lengths.items():
            length = rig.length(asked)
            records.append(
                guarded(
                    rig,
                    length,
                    foreseen(known + records, length, 3),
                    lambda length=length, at_most=at_most: pairs(rig, model, passes, length, at_most),
                )
            )
    return records


def pairs(rig: Rig, model: Any, passes: dict[str, Any], length: int, at_most: int) -> dict[str, Any]:
    """One length: a pass to warm up, then as many pairs as are asked for and the clock allows."""
    ids = tokens_for(rig, model, length)
    peaks: dict[str, float | None] = {}

    def clock(kind: str) -> Callable[[], float]:
        def one() -> float:
            elapsed, peaks[kind] = rig.measured(lambda: passes[kind](ids))
            return elapsed

        return one

    first_s = clock("capture")()
    n_pairs = max(1, min(at_most, int(rig.left_s / (2 * first_s))))
    rounds = timing.interleave({kind: clock(kind) for kind in passes}, n_pairs)
    return {
        "length": length,
        "rows": N_ROWS,
        "pairs": n_pairs,
        "plain_s": timing.median(rounds, "plain"),
        "capture_s": timing.median(rounds, "capture"),
        "time_ratio": timing.ratio(rounds, "capture", "plain"),
        "weights_mib": weights_mib(model),
        "plain_peak_mib": peaks["plain"],
        "capture_peak_mib": peaks["capture"],
        **peak_ratios(peaks["plain"], peaks["capture"], weights_mib(model)),
    }


def in_chunks(rig: Rig, shape: dict[str, Any], lengths: tuple[int, ...], n_pairs: int) -> list[dict[str, Any]]:
    """Prompts too long for one pass: a prefill in chunks, and what reading rows adds to its last chunk.

    All chunks but the last run the same code with and without rows, so the whole prompt is run once, without, and its
    last chunk again and again, with and without. The first length is there to foresee what the others take.
    """
    from lccp_interp.capture.model import HookedModel
    from lccp_interp.capture.prefill import CHUNK_TOKENS, Prefill

    chunk = rig.length(CHUNK_TOKENS)
    records: list[dict[str, Any]] = []
    with random_model(rig, shape) as model:
        hooked = HookedModel(model=model, tokenizer=None, name="random")  # type: ignore[arg-type]
        for asked in lengths:
            length = rig.length(asked)
            prefill = Prefill(hooked, chunk_tokens=chunk)
            records.append(
                guarded(
                    rig,
                    length,
                    foreseen(records, length, 1),
                    lambda length=length, prefill=prefill: last_chunks(rig, prefill, length, n_pairs),
                )
            )
            prefill.forget()
            free(rig)
    return records


def last_chunks(rig: Rig, prefill: Any, length: int, n_pairs: int) -> dict[str, Any]:
    """One length: the whole prompt once, then pairs of last chunks."""
    model, chunk = prefill.model.model, prefill.chunk_tokens
    ids = random_ids(length, model.config.vocab_size)[0].tolist()
    whole_s, whole_peak = rig.measured(lambda: prefill.run(ids, length - N_ROWS, None))
    if prefill.chunk_tokens != chunk:
        raise torch.OutOfMemoryError(f"chunks of {chunk} tokens did not fit")
    peaks: dict[str, float | None] = {}

    def clock(kind: str) -> Callable[[], float]:
        def one() -> float:
            # Another token where the last chunk begins: the cache keeps what comes before and nothing after.
            ids[-chunk] = (ids[-chunk] + 1) % model.config.vocab_size
            sink = None if kind == "plain" else lambda layer, weights: reduce_rows(weights)
            elapsed, peaks[kind] = rig.measured(lambda: prefill.run(ids, length - N_ROWS, sink))
            return elapsed

        return one

    clock("capture")()
    rounds = timing.interleave({kind: clock(kind) for kind in ("plain", "capture")}, n_pairs)
    added = [{"with": whole_s + one["capture"] - one["plain"], "without": whole_s} for one in rounds]
    capture_peak = None if whole_peak is None else max(whole_peak, peaks["capture"] or 0.0)
    return {
        "length": length,
        "rows": N_ROWS,
        "chunk": chunk,
        "pairs": n_pairs,
        "plain_s": whole_s,
        "capture_s": timing.median(added, "with"),
        "time_ratio": timing.ratio(added, "with", "without"),
        "weights_mib": weights_mib(model),
        "plain_peak_mib": whole_peak,
        "capture_peak_mib": capture_peak,
        **peak_ratios(whole_peak, capture_peak, weights_mib(model)),
    }


def against_peers(rig: Rig, shape: dict[str, Any], n_rounds: int) -> list[dict[str, Any]]:
    """Eager full maps and the decoding loop, at the longest length whose maps fit into the device."""
    with random_model(rig, shape) as model:
        config = model.config
        # Every layer keeps its map in the model's dtype; one layer at a time works on it in float32 besides.
        free_bytes = torch.cuda.mem_get_info()[0] if rig.cuda else 2**30
        per_token_squared = config.num_attention_heads * (2 * config.num_hidden_layers + 12)
        longest = int((0.85 * free_bytes / per_token_squared) ** 0.5) // 1024 * 1024
        length = rig.length(max(1024, min(longest, 32768)))
        return [guarded(rig, length, 40.0, lambda: peers_at(rig, model, length, n_rounds))]


def peers_at(rig: Rig, model: Any, length: int, n_rounds: int) -> dict[str, Any]:
    """One length: capture, eager and the decoding loop in turn."""
    ids = tokens_for(rig, model, length)
    peaks: dict[str, float | None] = {}

    def clock(kind: str) -> Callable[[], float]:
        run = open_pass(kind, model)

        def one() -> float:
            elapsed, peaks[kind] = rig.measured(lambda: run(ids))
            return elapsed

        return one

    clocked = {kind: clock(kind) for kind in ("capture", *PEERS)}
    for one in clocked.values():
        one()
    rounds = timing.interleave(clocked, n_rounds)
    record: dict[str, Any] = {"length": length, "rows": N_ROWS, "rounds": n_rounds, "weights_mib": weights_mib(model)}
    for kind in clocked:
        record |= {f"{kind}_s": timing.median(rounds, kind), f"{kind}_peak_mib": peaks[kind]}
    for kind in PEERS:
        above = peak_ratios(peaks["capture"], peaks[kind], weights_mib(model))
        record |= {
            f"{kind}_times_faster": timing.ratio(rounds, kind, "capture"),
            f"{kind}_times_smaller": above["memory_ratio_above_weights"],
        }
    return record


PEERS = ("eager", "wu")
STAGES: dict[str, Callable[[Rig], list[dict[str, Any]]]] = {
    "llama-8b": lambda rig: against_plain(rig, LLAMA_8B, {65536: 5, 131072: 5}),
    "hunyuan-half": lambda rig: against_plain(rig, HUNYUAN_HALF, {65536: 5}),
    "lengths": lambda rig: against_plain(rig, LLAMA_8B, {2**power: 5 for power in range(10, 16)}),
    "chunked": lambda rig: in_chunks(rig, LLAMA_8B, (65536, 262144, 524288), 5),
    "peers": lambda rig: against_peers(rig, LLAMA_8B, 5),
}
HEADINGS = {
    "llama-8b": "Llama 8B (32 layers, hidden 4096, 32 heads, 8 key/value heads), bf16: capture against a plain pass. "
    "Both targets are 1.03.",
    "hunyuan-half": "Hunyuan-A13B at half depth (16 of 32 layers, 64 experts of which 8 are active, 1 shared), bf16.",
    "lengths": "Llama 8B, shorter prompts: cost against length.",
    "chunked": "Llama 8B, prefill in chunks behind a cache. The whole prompt is run once; the added cost is that of "
    "the rows in its last chunk, measured in pairs of last chunks (the chunks before it are the same either way).",
    "peers": "Llama 8B against eager `output_attentions` and against the decoding loop, at the longest length whose "
    "maps fit into the device.",
}


def run_stages(rig: Rig, names: list[str], results: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Run stages into `results`, handing them to `keep` after each, so that a cut connection costs one stage."""
    device = torch.cuda.get_device_name() if rig.cuda else machine.processor()
    for name in names:
        rig.say(f"{name} ... {max(0.0, rig.left_s):.0f} s left on the clock")
        if rig.left_s <= 0:
            rig.say(f"  no time left; run it alone with: python -m benchmarks.gpu --only {name}")
            results.setdefault(name, machine.entry([skipped(0, "no time left on the clock")], device))
            continue
        try:
            records = STAGES[name](rig)
        except torch.OutOfMemoryError:
            records = [skipped(0, "the weights do not fit into the device")]
            rig.say(f"  {records[0]['skipped']}")
        free(rig)  # outside the handler, whose traceback holds what had been made
        results[name] = machine.entry(records, device)
        keep(results)


def table(results: dict[str, Any]) -> list[str]:
    """All stages as Markdown."""
    lines = []
    for name in (name for name in STAGES if name in results):
        records = results[name]["records"]
        render = _peers_rows if name == "peers" else _plain_rows
        lines += [HEADINGS[name], "", machine.line(results[name]), "", *render(records), ""]
    return lines[:-1]


def _gib(mib: float | None) -> str:
    return "n/a" if mib is None else f"{mib / 1024:.1f}"


def _times(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"**{value:.{digits}f}**"


def _plain_rows(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens | pairs | plain s | capture s | time ratio | weights GiB | plain peak GiB | capture peak GiB "
        "| memory ratio | above weights |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        if "skipped" in r:
            lines.append(f"| {r['length'] or 'all'} | skipped: {r['skipped']} | | | | | | | | |")
            continue
        lines.append(
            f"| {r['length']} | {r['pairs']} | {r['plain_s']:.2f} | {r['capture_s']:.2f} | "
            f"{timing.spread(r['time_ratio'])} | {_gib(r['weights_mib'])} | {_gib(r['plain_peak_mib'])} | "
            f"{_gib(r['capture_peak_mib'])} | {_times(r['memory_ratio'])} | "
            f"{_times(r['memory_ratio_above_weights'])} |"
        )
    return lines


def _peers_rows(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens | against | its s | capture s | times faster | its peak GiB | capture peak GiB "
        "| times smaller (above weights) |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        if "skipped" in r:
            lines.append(f"| {r['length'] or 'all'} | skipped: {r['skipped']} | | | | | | |")
            continue
        lines += [
            f"| {r['length']} | {kind} | {r[f'{kind}_s']:.2f} | {r['capture_s']:.2f} | "
            f"{timing.spread(r[f'{kind}_times_faster'], 1)} | {_gib(r[f'{kind}_peak_mib'])} | "
            f"{_gib(r['capture_peak_mib'])} | {_times(r[f'{kind}_times_smaller'], 1)} |"
            for kind in PEERS
        ]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"stages to run, of {','.join(STAGES)}")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1, or cpu together with --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy models and lengths, to try the code; writes no file")
    parser.add_argument("--out", type=Path, help=f"where the records go (default {RESULTS.name} beside this file)")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"no stage {', '.join(map(repr, unknown))}; known: {', '.join(STAGES)}")
    rig = Rig(given.device, tiny=given.tiny)
    if rig.cuda and not torch.cuda.is_available():
        print(
            f"No CUDA device here: nothing was measured, {RESULTS.name} is left as it is, the CPU tables stand alone."
        )
        return
    if not rig.cuda and not rig.tiny:
        parser.error("full-size models are for a GPU; on a CPU add --tiny")
    if rig.cuda:
        torch.cuda.set_device(given.device)
    out = given.out or (None if rig.tiny else RESULTS)
    results = json.loads(out.read_text()) if out and out.is_file() else {}

    def keep(current: dict[str, Any]) -> None:
        if out:
            out.write_text(json.dumps(current, indent=2) + "\n")

    run_stages(rig, names, results, keep)
    keep(results)
    print("\n".join(table(results)))
    print(f"{rig.clock_s - rig.left_s:.0f} s in all.")
    if out == RESULTS:
        from benchmarks.run import write_readme

        write_readme()


if __name__ == "__main__":
    main()
