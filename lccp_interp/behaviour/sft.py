"""Light supervised fine-tuning: what a checkpoint can do once it has been shown how answers look.

A base model may hold a fact and still not answer as asked. arXiv 2604.02650 therefore fine-tunes every checkpoint
lightly before it is tested: 2 epochs, cosine from 2e-5 to a quarter of that. `fine_tune` does so with TRL (and PEFT for
adapters) on prompts with their right answers; the loss is taken on the answers only. It refuses to know what is asked
and how answers are graded. Cost: three passes' worth of time per training token; memory for gradients and Adam's two
moments of what is trained.

Departure from the paper: its learning rate is for a hidden size of 4096. Adam's best rate goes with the inverse of the
width (Yang et al. 2022, arXiv 2203.03466), so the default here is 2e-5 x 4096 / hidden size.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lccp_interp.capture.model import HookedModel
from lccp_interp.schema import Item, LccpError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER_LEARNING_RATE, PAPER_HIDDEN_SIZE = 2e-5, 4096
FULL_UP_TO = 1_000_000_000
"""Parameters of the largest model that `method="auto"` trains as a whole; larger ones get adapters."""

LORA_LR_SCALE = 10.0
"""Adapters are trained this much faster than whole weights, the usual rule of thumb."""

METHODS = ("auto", "full", "lora")
IGNORED = -100
"""Label of tokens that the loss passes over (PyTorch's cross entropy)."""

RISE_NATS = 1.0
"""Fine-tuning that ends with a loss this much above where it began has diverged."""


class SftDiverged(LccpError):
    """Fine-tuning left a model worse than it was; `loss_nats` is the last training loss."""

    def __init__(self, message: str, loss_nats: float) -> None:
        super().__init__(message)
        self.loss_nats = loss_nats


@dataclass(frozen=True)
class SftRecipe:
    """How a checkpoint is fine-tuned.

    Attributes:
        epochs: passes over the mixture, above 0 (paper: 2).
        learning_rate: at the beginning; None scales the paper's with the model's width.
        final_lr_scale: share of the learning rate at the end of the cosine, 0..1 (paper: 5e-6 of 2e-5, a quarter).
        batch_size: samples per step.
        method: `full` (all weights), `lora` (adapters on all linear layers), `auto` (full up to 1B parameters).
        lora_rank: rank of the adapters; their scale (alpha) is twice that.
        max_grad_norm: gradients are cut to this norm.
        seed: of the order of samples and of the adapters' beginning.
    """

    epochs: float = 2.0
    learning_rate: float | None = None
    final_lr_scale: float = 0.25
    batch_size: int = 8
    method: str = "auto"
    lora_rank: int = 16
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LccpError(f"unknown method {self.method!r} of fine-tuning; known: {', '.join(METHODS)}")
        if self.epochs <= 0 or self.batch_size < 1 or self.lora_rank < 1:
            raise LccpError(
                f"fine-tuning needs epochs above 0, a batch size and a LoRA rank of at least 1, got {self.epochs:g}, "
                f"{self.batch_size}, {self.lora_rank}"
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise LccpError(
                f"the learning rate must be above 0, got {self.learning_rate:g}; leave it out for a default"
            )
        if not 0 <= self.final_lr_scale <= 1:
            raise LccpError(f"final_lr_scale is a share of the learning rate, 0..1, got {self.final_lr_scale:g}")

    def resolved(self, model: Any) -> SftRecipe:
        """The recipe with method and learning rate decided for `model` (a transformers model)."""
        method = self.method
        if method == "auto":
            method = "full" if sum(p.numel() for p in model.parameters()) <= FULL_UP_TO else "lora"
        rate = self.learning_rate
        if rate is None:
            rate = PAPER_LEARNING_RATE * PAPER_HIDDEN_SIZE / model.config.get_text_config().hidden_size
            rate *= LORA_LR_SCALE if method == "lora" else 1.0
        return replace(self, method=method, learning_rate=rate)

    def config(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingExample:
    """Tokens of a prompt and its answer; `n_prompt` of them carry no loss."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class SftResult:
    """A fine-tuned model and how it got there; `losses_nats` are the training losses step by step."""

    model: HookedModel
    recipe: SftRecipe
    losses_nats: tuple[float, ...]
    n_tokens: int


def training_examples(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[TrainingExample]:
    """Prompts with their right answers, each answer closed by what ends an answer in evaluation.

    That is the end-of-text token, or the item's first stop string where the tokenizer has none.

    Args:
        items: training items (`target` is the answer).
        tokenizer: of the model.
    """
    from lccp_interp.tasks.pieces import PieceEncoder

    encoder = PieceEncoder(tokenizer)
    eos = tokenizer.eos_token_id
    targets = [item.target if eos is not None or not item.stop else item.target + item.stop[0] for item in items]
    answers = encoder.middle(targets)
    ends = [] if eos is None else [eos]
    return [
        TrainingExample((*item.prompt_ids, *answer, *ends), len(item.prompt_ids))
        for item, answer in zip(items, answers, strict=True)
    ]


def fine_tune(
    model: HookedModel,
    items: Sequence[Item],
    recipe: SftRecipe | None = None,
    *,
    keep: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SftResult:
    """Fine-tune `model` on the right answers of `items`.

    Args:
        model: the checkpoint, loaded; its weights change (with adapters they are merged in at the end).
        items: training items; at least one.
        recipe: None means the paper's schedule.
        keep: folder for the result (adapters alone where adapters were trained); None keeps nothing.
        on_step: told (steps done, steps in all).

    Returns:
        The model, in evaluation mode, with its losses. The same seed gives the same weights on the same machine.

    Raises:
        SftDiverged: a loss that is not finite, or that ends more than a nat above where it began.
        LccpError: no items; the packages trl or peft are not installed.
    """
    if not items:
        raise LccpError("there is nothing to fine-tune on: the mixture is empty; ask for more training samples")
    recipe = (recipe or SftRecipe()).resolved(model.model)
    examples = training_examples(items, model.tokenizer)
    with tempfile.TemporaryDirectory() as scratch, _kept_rng(), _quiet():
        network = _with_adapters(model.model, recipe) if recipe.method == "lora" else model.model
        trainer = _trainer(network, model.tokenizer, examples, recipe, scratch, on_step)
        trainer.train()
        losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        network = trainer.model
        trainer.accelerator.free_memory()
    _refuse_diverged(losses, model.name)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        network.save_pretrained(keep)
        model.tokenizer.save_pretrained(keep)
    if recipe.method == "lora":
        network = network.merge_and_unload()
    network.zero_grad(set_to_none=True)
    return SftResult(
        model=replace(model, model=network.eval().requires_grad_(False)),
        recipe=recipe,
        losses_nats=losses,
        n_tokens=round(recipe.epochs * sum(len(example.ids) for example in examples)),
    )


def _with_adapters(network: Any, recipe: SftRecipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise LccpError("LoRA needs the package peft; install lccp_interp[train], or use --method full") from error
    torch.manual_seed(recipe.seed)  # the adapters begin at random
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(network, config)


def _trainer(
    network: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    recipe: SftRecipe,
    scratch: str,
    on_step: Callable[[int, int], None] | None,
) -> Any:
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise LccpError("fine-tuning needs the packages trl and datasets; install lccp_interp[train]") from error
    rows = Dataset.from_list(
        [
            {
                "input_ids": list(example.ids),
                "labels": [IGNORED] * example.n_prompt + list(example.ids[example.n_prompt :]),
            }
            for example in examples
        ]
    )
    on_gpu = network.device.type == "cuda"
    assert recipe.learning_rate is not None
    config = SFTConfig(
        output_dir=scratch,
        num_train_epochs=recipe.epochs,
        # Samples one by one, gradients added up: the same step, without padding, whose mask costs more than it gains.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_lr_scale},
        weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        gradient_checkpointing=on_gpu,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=network,
        args=config,
        train_dataset=rows,
        processing_class=_padding(tokenizer),
        data_collator=_collate,
    )
    trainer.add_callback(_callback(on_step))
    return trainer


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that has a padding token, as TRL insists; nothing is padded."""
    import copy

    own = copy.deepcopy(tokenizer)
    if own.pad_token is None:
        own.pad_token = own.eos_token or own.convert_ids_to_tokens(0)
    return own


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """One sample, whole; its mask hides nothing, TRL asks for one."""
    (row,) = rows
    ids = torch.tensor([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([row["labels"]])}


def _callback(on_step: Callable[[int, int], None] | None) -> Any:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Watch(TrainerCallback):
        """Tells of steps, and ends the training at a loss that is not finite."""

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, float] | None = None,
            **kwargs: Any,
        ) -> TrainerControl:
            if logs and not math.isfinite(float(logs.get("loss", 0.0))):
                control.should_training_stop = True
            if on_step is not None and logs and "loss" in logs:
                on_step(state.global_step, state.max_steps)
            return control

    return Watch()


def _refuse_diverged(losses: Sequence[float], name: str) -> None:
    tail = max(1, len(losses) // 10)
    last = sum(losses[-tail:]) / tail
    first = losses[0]  # steps later it may have gone already
    if math.isfinite(last) and all(map(math.isfinite, losses)) and last <= first + RISE_NATS:
        return
    worst = next((loss for loss in losses if not math.isfinite(loss)), last)
    raise SftDiverged(
        f"checkpoint {name}: fine-tuning diverged, its loss went from {first:.3g} to {worst:.3g} nats per token in "
        f"{len(losses)} steps; try a smaller --learning-rate",
        worst,
    )


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Leave the random states as they were: the trainer seeds torch, numpy and random."""
    import random

    import numpy as np

    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the trainer's dictionaries of losses and its words on padding tokens; the loss is told by us."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers_logging.set_verbosity(before)
