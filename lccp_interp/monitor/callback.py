"""The monitor as a callback of the Trainer: observe every so many steps, log to whatever the Trainer logs to.

The Trainer gives its callbacks no way to log: `on_log` tells them what others logged. So the monitor hands its numbers
to the callback handler that called it, which it finds one frame up (or is given by `attach`), as `Trainer.log` would:
every other callback's `on_log` gets them (TensorBoard, W&B, the progress bar), and the Trainer's log history. Through
`Trainer.log` itself it would not do: subclasses flush averages of their own there.

This module knows the Trainer's events; it refuses to know how anything is observed (`observe`). It costs nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from lccp_interp.monitor.observe import HeadObserver, log
from lccp_interp.schema import LccpError

FRAMES = 4
"""How far up the callback handler may be: a decorated method has a frame more."""


class RetrievalHeadMonitor(TrainerCallback):
    """Observes the retrieval heads of the model that a Trainer trains, into a run folder.

    Logged, L being each length of the grid (TensorBoard and W&B put `train/` in front):

    - `lccp/heads_L`: retrieval heads (score > 0.1 and above their null);
    - `lccp/initial_score_L`: mean score of the initial heads, those of the first observation or `initial_heads`;
    - `lccp/ppl_L`, `lccp/loss_nats_L`: perplexity and loss of the answer, means over cases; `lccp/niah_score_L`:
      percent of cases answered right in every token;
    - `lccp/births_L`, `lccp/deaths_L`: heads born and died so far, as `lives` counts them, without provisional ones;
    - `lccp/saturated_L`: whether the answer's loss has stopped improving: 1 saturated, 0 still improving, -1 cannot
      tell (always so before five observations);
    - `lccp/cost_share`: share of the time since training began that went into observing; `lccp/seconds` of this
      observation; `lccp/interval_steps` since the last one; `lccp/peak_raised_mb`: by how much this observation raised
      the highest memory so far; `lccp/failures`: observations that failed;
    - `lccp/difference_nats`: where a resumed training comes to a step that was observed before, how far the answers'
      losses are from those, at most. The older observation stands.

    Under DDP and FSDP, with LoRA, gradient checkpointing and accumulation: see `HeadObserver`. The same numbers are in
    `monitor.jsonl` in the run folder, with the reason of each verdict.

    Example:
        >>> monitor = RetrievalHeadMonitor("runs/monitor", every_steps=200, tokens_per_step=2**20)   # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[monitor], processing_class=tokenizer, ...).train()       # doctest: +SKIP
    """

    def __init__(
        self,
        out: str | Path,
        *,
        tokens_per_step: int | None = None,
        tokens_before: int = 0,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """Observe nothing yet.

        Args:
            out: the run folder; a training that is resumed goes on in it.
            tokens_per_step: tokens per optimizer step over all ranks; None where the Trainer counts them
                (`include_num_input_tokens_seen` of its arguments).
            tokens_before: tokens that the model had seen before this training.
            tokenizer: of the model; None for the Trainer's `processing_class`.
            **options: `every_steps` or `every_tokens`, `grid`, `metrics`, `initial_heads`, `budget`, `stage`,
                `chunk_tokens`, `check`, `on_error`, `tell`: as in `HeadObserver`.

        Raises:
            LccpError: as `HeadObserver`, or a number of tokens that is none.
        """
        if tokens_before < 0 or (tokens_per_step is not None and tokens_per_step < 1):
            raise LccpError(
                f"got tokens_per_step={tokens_per_step} and tokens_before={tokens_before}: expected at least 1 and 0"
            )
        self.observer = HeadObserver(out, tokenizer, **options)
        self._tokens_per_step, self._tokens_before = tokens_per_step, tokens_before
        self._handler: CallbackHandler | None = None
        self._told_of_handler = False

    def attach(self, trainer: Any) -> RetrievalHeadMonitor:
        """Add the monitor to a Trainer; the same as `callbacks=[monitor]`, without looking for the handler."""
        trainer.add_callback(self)
        self._handler = trainer.callback_handler
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run folder; observe the model as it enters training, if it was not before."""
        if self.observer.tokenizer is None:
            self.observer.tokenizer = kwargs.get("processing_class")
        logs = self.observer.begin(kwargs["model"], **self._place(args, state))
        self._log(logs, args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Observe the model if it is time to."""
        place = self._place(args, state)
        logs = self.observer.after_step(kwargs["model"], last_step=state.max_steps, **place)
        self._log(logs, args, state)

    def _place(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Where training is: step, tokens, and where the weights of this step are saved, if they are."""
        step = state.global_step
        if self._tokens_per_step is not None:
            tokens = step * self._tokens_per_step
        elif args.include_num_input_tokens_seen in ("no", False):
            raise LccpError(
                "the monitor cannot tell how many tokens were trained on; give it tokens_per_step=, or let the Trainer "
                "count: TrainingArguments(include_num_input_tokens_seen='all')"
            )
        else:
            tokens = int(state.num_input_tokens_seen)
        path = Path(args.output_dir or ".") / f"checkpoint-{step}"
        return {"step": step, "tokens_seen": self._tokens_before + tokens, "path": path}

    def _log(self, logs: dict[str, float], args: TrainingArguments, state: TrainerState) -> None:
        """Hand numbers to every callback and to the log history, as the Trainer does with its own."""
        if not logs:
            return
        if state.epoch is not None:
            logs = {**logs, "epoch": state.epoch}
        state.log_history.append({**logs, "step": state.global_step})
        handler = self._handler or self._find_handler()
        if handler is not None:
            # A control of its own, for the handler notes in it that the Trainer has logged.
            handler.on_log(args, state, TrainerControl(), logs)
        elif not self._told_of_handler:
            self._told_of_handler = True
            log.warning(
                "monitor: the Trainer's callbacks were not found, so its numbers are in the log history and in %s "
                "only; call monitor.attach(trainer) instead of callbacks=[monitor]",
                self.observer.out,
            )

    def _find_handler(self) -> CallbackHandler | None:
        """The handler that is calling this callback."""
        frame = sys._getframe(2)
        for _ in range(FRAMES):
            caller = frame.f_locals.get("self")
            if isinstance(caller, CallbackHandler) and self in caller.callbacks:
                self._handler = caller
                return caller
            if frame.f_back is None:
                break
            frame = frame.f_back
        return None
