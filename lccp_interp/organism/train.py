"""The organism's trainer: one loop, two stages, checkpoints at scheduled token counts, and no memory of its own.

What it does: trains a small Llama by a recipe, writes plain Hugging Face folders and ``trajectory.json``, and resumes
after an interruption to bit-identical checkpoints. Matrices are trained by Muon (momentum, orthogonalised by
Newton-Schulz iterations; Keller Jordan, 2024), embeddings and norms by AdamW.
What it refuses to know: heads, needles, scores. Checkpoints are where the recipe says, never where a score looks good.
What it costs: ``small`` about twelve minutes on one CPU core and well under 1 GB; ``medium`` wants a GPU.

The batch of a step is a function of (seed, stage, step), so the state to be resumed from is weights, optimizer moments,
the step and the climb's position. Same seed, same thread count, same kind of machine, same versions: same bits.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from lccp_interp.organism.language import COPY_WEIGHT, Document, draw_document
from lccp_interp.organism.recipe import Recipe, Rung, Stage, find_recipe
from lccp_interp.organism.tokenizer import piece_ids, save_tokenizer, vocabulary
from lccp_interp.schema import LccpError

Progress = Callable[[int, int, str], None]

DEFAULT_SEED = 0
_STATE_EVERY_STEPS = 50
_GATE_STEPS = 20
_TRAJECTORY = "trajectory.json"


# ---------------------------------------------------------------------------------------------------------------------
# Muon
# ---------------------------------------------------------------------------------------------------------------------


def orthogonalise(matrices: Tensor, *, n_iterations: int = 5) -> Tensor:
    """Bring the singular values of a stack of matrices (batch, rows, columns) near 1 by Newton-Schulz iterations.

    The quintic's coefficients (3.4445, -4.7750, 2.0315) are Muon's: they trade exactness (values end in about
    0.7-1.2) for speed of convergence.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose matrix step is orthogonalised; matrices of one shape are treated as one stack."""

    def __init__(self, params: list[Tensor], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step with the gradients at hand."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    if param.grad is None:
                        raise AssertionError("every matrix of the model takes part in every step")
                    buffer = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]))
                stack = orthogonalise(torch.stack(updates))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, stack, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


# ---------------------------------------------------------------------------------------------------------------------
# The model and its batches
# ---------------------------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, *, rope_theta: float) -> Any:
    """Build the Llama of a recipe with random weights (from torch's global generator)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = recipe.size
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads,
        head_dim=size.d_head,
        max_position_embeddings=recipe.max_context_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def build_batch(stage: Stage, *, seed: int, step: int, context_length: int) -> tuple[Tensor, Tensor]:
    """Write the documents of one step: token ids and target weights, both (row, context_length + 1)."""
    ids = piece_ids()
    rows = max(1, stage.tokens_per_step // context_length)
    documents: list[Document] = [
        draw_document(
            Random(f"{seed}-{stage.name}-{step}-{row}"),
            context_length + 1,
            shares=stage.document_shares,
            tokens_per_fact=stage.tokens_per_fact,
            first_weight=stage.first_answer_weight,
        )
        for row in range(rows)
    ]
    tokens = torch.tensor([[ids[piece] for piece in document.pieces] for document in documents])
    return tokens, torch.tensor([document.weights for document in documents])


@contextmanager
def head_dropout(model: Any, rate: float, generator: torch.Generator) -> Iterator[None]:
    """Silence whole heads at random, per document and layer, for the time of the context; scaled to keep the mean.

    With it no head can be relied on alone, so that several learn the same work.
    """

    def silence(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0]
        config = model.config
        kept = torch.rand(heads.shape[0], 1, config.num_attention_heads, 1, generator=generator) >= rate
        split = heads.unflatten(-1, (config.num_attention_heads, config.head_dim))
        return ((split * (kept.to(heads) / (1 - rate))).flatten(-2), *args[1:])

    handles = []
    if rate > 0:
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(silence) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def losses(model: Any, tokens: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Return the weighted mean loss in nats, and the plain mean over copy tokens (NaN when there is none)."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    targets, target_weights = tokens[:, 1:], weights[:, 1:]
    asked = target_weights > 0
    nats = torch.nn.functional.cross_entropy(model.lm_head(hidden[asked]), targets[asked], reduction="none")
    target_weights = target_weights[asked]
    copied = nats.detach()[target_weights >= COPY_WEIGHT]
    return (nats * target_weights).sum() / target_weights.sum(), float(copied.mean())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Position:
    """Where a run stands: the stage, the steps done in it, and what the climb's gate has seen."""

    stage: int = 0
    step: int = 0
    recent_copy_losses: list[float] = field(default_factory=list)
    gate_steps: list[int | None] = field(default_factory=list)


def pick_rung(stage: Stage, *, n_steps: int, seed: int, step: int, gate_step: int | None) -> Rung:
    """Return the rung of a step: drawn by share, or by the climb (``gate_step``: when its gate opened)."""
    if not stage.climb:
        rng = Random(f"{seed}-{stage.name}-{step}-rung")
        return rng.choices(stage.rungs, weights=[rung.share for rung in stage.rungs])[0]
    if gate_step is None or step < gate_step:
        return stage.rungs[0]
    rest = stage.rungs[1:]
    total = sum(rung.share for rung in rest)
    climbed = (step - gate_step) / max(1, n_steps - gate_step) * total
    for rung in rest:
        if climbed < rung.share:
            return rung
        climbed -= rung.share
    return rest[-1]


def lr_factor(stage: Stage, *, tokens: int) -> float:
    """The learning rate's factor after ``tokens`` of the stage: linear warm-up, constant, linear decay to the end."""
    warm = min(1.0, (tokens + 1) / max(1, stage.warmup_tokens))
    left = stage.n_tokens - tokens
    if left < stage.decay_tokens:
        warm *= stage.final_lr_scale + (1 - stage.final_lr_scale) * left / stage.decay_tokens
    return stage.lr_scale * warm


class _Trainer:
    """One run of one recipe in one folder; :func:`train` is its only user."""

    def __init__(self, out: Path, identity: dict[str, Any], recipe: Recipe, progress: Progress | None) -> None:
        self.out, self.recipe, self.identity = out, recipe, identity
        self.seed: int = identity["seed"]
        self.device = torch.device(identity["device"])
        self.progress = progress
        self.at = _Position(gate_steps=[None] * len(recipe.stages))
        self.state_file = out / ".state" / "state.pt"
        torch.manual_seed(self.seed)
        self._enter_stage(None)
        if self.state_file.exists():
            self._load_state()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.at.stage]

    @property
    def tokens_before_stage(self) -> int:
        return sum(stage.n_tokens for stage in self.recipe.stages[: self.at.stage])

    def _enter_stage(self, weights: dict[str, Tensor] | None) -> None:
        """Build the stage's model (its RoPE base is part of it) around the weights so far, with fresh optimizers."""
        recipe = self.recipe
        self.model = build_model(recipe, rope_theta=self.stage.rope_theta)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.to(self.device).train()
        named = dict(self.model.named_parameters())
        matrices = [param for name, param in named.items() if param.ndim == 2 and "embed" not in name]
        others = [param for name, param in named.items() if param.ndim != 2 or "embed" in name]
        self.optimizers = (
            Muon(matrices, lr=recipe.muon_lr, momentum=recipe.muon_momentum, weight_decay=self.stage.weight_decay),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=recipe.adam_betas, weight_decay=0.0),
        )
        self.base_lrs = (recipe.muon_lr, recipe.adam_lr)

    def _save_state(self) -> None:
        state = {
            "position": asdict(self.at),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = self.state_file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.state_file)

    def _load_state(self) -> None:
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        self.at = _Position(**state["position"])
        self._enter_stage(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def run(self) -> None:
        """Train to the end of the last stage."""
        while True:
            n_steps = self.stage.n_tokens // self.stage.tokens_per_step
            while self.at.step < n_steps:
                self._step(n_steps)
                self.at.step += 1
                tokens = self.at.step * self.stage.tokens_per_step
                if tokens in self.stage.checkpoints:
                    self._write_checkpoint(tokens)
                if self.at.step % _STATE_EVERY_STEPS == 0 or tokens in self.stage.checkpoints:
                    self._save_state()
            if self.at.stage + 1 == len(self.recipe.stages):
                return
            self.at.stage, self.at.step, self.at.recent_copy_losses = self.at.stage + 1, 0, []
            self._enter_stage(self.model.state_dict())
            self._save_state()

    def _step(self, n_steps: int) -> None:
        stage, step, recipe = self.stage, self.at.step, self.recipe
        self._look_at_gate(n_steps)
        gate_step = self.at.gate_steps[self.at.stage]
        rung = pick_rung(stage, n_steps=n_steps, seed=self.seed, step=step, gate_step=gate_step)
        tokens, weights = build_batch(stage, seed=self.seed, step=step, context_length=rung.context_length)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.at.stage * 500_009 + step)
        factor = lr_factor(stage, tokens=step * stage.tokens_per_step)
        for optimizer, base_lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base_lr * factor
        with head_dropout(self.model, rung.head_dropout, generator):
            loss, copy_loss = losses(self.model, tokens.to(self.device), weights.to(self.device))
            loss.backward()
        if not torch.isfinite(loss):
            raise LccpError(
                f"the loss is {float(loss.detach())} at step {step} of stage {stage.name!r} (seed {self.seed}): "
                f"training has diverged; lower the recipe's learning rates or take another seed"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if copy_loss == copy_loss:
            self.at.recent_copy_losses = [*self.at.recent_copy_losses, copy_loss][-_GATE_STEPS:]
        if self.progress is not None:
            done = self.tokens_before_stage + (step + 1) * stage.tokens_per_step
            total = sum(each.n_tokens for each in recipe.stages)
            message = (
                f"{stage.name} length {rung.context_length} loss {float(loss.detach()):.3f} copy {copy_loss:.3f} nats"
            )
            self.progress(done, total, message)

    def _look_at_gate(self, n_steps: int) -> None:
        """Open the climb's gate once its first rung is done and copying has begun."""
        stage, recent = self.stage, self.at.recent_copy_losses
        if not stage.climb or self.at.gate_steps[self.at.stage] is not None:
            return
        first = stage.rungs[0].share / sum(rung.share for rung in stage.rungs)
        if self.at.step >= first * n_steps and recent and sum(recent) / len(recent) < stage.gate_loss_nats:
            self.at.gate_steps[self.at.stage] = self.at.step

    def _write_checkpoint(self, stage_tokens: int) -> None:
        """Write a Hugging Face folder, complete or not at all; weights are rounded, the config says float32.

        A loader that follows the config thus computes in float32 with the rounded weights.
        """
        from safetensors.torch import save_file

        entry = next(
            entry
            for entry in checkpoint_table(self.recipe)
            if entry["stage"] == self.stage.name and entry["stage_tokens"] == stage_tokens
        )
        folder = self.out / entry["path"]
        unfinished = self.out / ".state" / "checkpoint"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        dtype = getattr(torch, self.recipe.weights_dtype)
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in self.model.state_dict().items()
            if name != "lm_head.weight"  # tied to the embedding
        }
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(unfinished)
        save_tokenizer(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    def finish(self) -> None:
        """Write ``trajectory.json`` and drop the training state."""
        trajectory = {
            "name": f"organism-{self.identity['size']}-seed{self.seed}",
            "checkpoints": checkpoint_table(self.recipe),
            **self.identity,
            "gate_steps": self.at.gate_steps,
            "versions": _versions(),
        }
        unfinished = self.out / ".state" / _TRAJECTORY
        unfinished.write_text(json.dumps(trajectory, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.out / _TRAJECTORY)
        shutil.rmtree(self.out / ".state")


def _versions() -> dict[str, str]:
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _short_count(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens >= 1_000_000 else f"{tokens / 1e3:.0f}K"


def checkpoint_table(recipe: Recipe) -> list[dict[str, Any]]:
    """The checkpoints a recipe will write, in order of ``tokens_seen``, as ``trajectory.json`` lists them."""
    table: list[dict[str, Any]] = []
    tokens_before = 0
    for stage in recipe.stages:
        for tokens in stage.checkpoints:
            if tokens % stage.tokens_per_step:
                raise LccpError(f"checkpoint at {tokens} tokens of stage {stage.name!r} is not at a step's end")
            name = f"{len(table):02d}-{stage.name}-{_short_count(tokens)}"
            table.append(
                {
                    "name": name,
                    "path": name,
                    "tokens_seen": tokens_before + tokens,
                    "stage": stage.name,
                    "stage_tokens": tokens,
                    "context_length": max(rung.context_length for rung in stage.rungs),
                    "rope_theta": stage.rope_theta,
                }
            )
        tokens_before += stage.n_tokens
    return table


def _check_folder(out: Path, identity: dict[str, Any]) -> bool:
    """Return whether the run in ``out`` is finished; refuse a folder that holds another run, or anything else."""
    for file in (out / _TRAJECTORY, out / ".state" / "run.json"):
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        for key, wanted in identity.items():
            if found.get(key) != wanted:
                what = "another recipe" if key == "recipe" else f"{key} {found.get(key)!r}"
                asked = "this version's" if key == "recipe" else f"{key} {wanted!r}"
                raise LccpError(
                    f"{out} holds an organism run with {what}, expected {asked}: "
                    f"give another --out, or the same {key}, or delete the folder"
                )
        return file.name == _TRAJECTORY and not (out / ".state").exists()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LccpError(f"{out} exists and holds no organism run: give a new or an empty folder as --out")
    return False


def train(
    out: Path | str,
    *,
    seed: int = DEFAULT_SEED,
    size: str = "small",
    threads: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Train an organism into ``out``, or go on with the run that was interrupted there; return the folder.

    The folder ends with one Hugging Face folder per checkpoint and ``trajectory.json``; until then ``out/.state``
    holds what resuming needs. A finished run is left as it is.

    Arguments: ``seed`` >= 0; ``size`` a name of :data:`~lccp_interp.organism.recipe.RECIPES`; ``threads`` >= 1 CPU
    threads (part of what makes two runs equal to the bit); ``device`` a torch device; ``progress`` is called after
    every step with tokens done, tokens in all, and a line of text.
    Raises: :class:`LccpError` for an unknown size, a bad number, or a folder that holds another run.

    Example::

        train("runs/organism", seed=0, size="tiny")
    """
    if seed < 0 or threads < 1:
        raise LccpError(f"got seed {seed} and threads {threads}: expected seed >= 0 and threads >= 1")
    recipe = find_recipe(size)
    out = Path(out)
    identity = {"seed": seed, "size": size, "threads": threads, "device": device}
    identity["recipe"] = json.loads(json.dumps(recipe.as_dict()))
    if _check_folder(out, identity):
        return out
    (out / ".state").mkdir(parents=True, exist_ok=True)
    (out / ".state" / "run.json").write_text(json.dumps(identity), encoding="utf-8")
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.random.fork_rng(devices=[]):
            trainer = _Trainer(out, identity, recipe, progress)
            trainer.run()
            trainer.finish()
    finally:
        torch.set_num_threads(threads_before)
    return out
