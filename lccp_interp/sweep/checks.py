"""What a sweep settles and refuses before anything is loaded: devices, another library's limits, too long prompts.

It reads configs and cases, no weights, and costs nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lccp_interp.checkpoints import find_checkpoints, read_config, refuse_ambiguous
from lccp_interp.schema import Case, Checkpoint, LccpError
from lccp_interp.sweep.execution import Execution

if TYPE_CHECKING:
    from lccp_interp.scoring.metrics import HeadMetric


def check_backend(backend: str, mode: str, execution: Execution) -> None:
    """Refuse what other libraries do not do here."""
    from lccp_interp.capture.views import LIBRARIES, OWN, check_backend

    if check_backend(backend) == OWN:
        return
    if mode != "teacher_forced":
        raise LccpError(
            f"backend {backend!r} scores --mode teacher_forced only, got {mode!r}; use backend {OWN!r} for it"
        )
    if execution.sharing == "on":
        raise LccpError(f"{LIBRARIES[backend]} runs every prompt whole; leave out --sharing on, or use backend {OWN!r}")


def ordered(
    checkpoints: str | Path | Checkpoint | Sequence[str | Path | Checkpoint], execution: Execution
) -> list[Checkpoint]:
    """The checkpoints, found and in the order of training, their paths absolute: a run is read from anywhere."""
    given = [checkpoints] if isinstance(checkpoints, (str, Path, Checkpoint)) else list(checkpoints)
    ready = [item for item in given if isinstance(item, Checkpoint)]
    if ready and len(ready) < len(given):
        raise LccpError("give either Checkpoint objects or paths, not both")
    if not ready:
        ready = find_checkpoints(
            list(map(str, given)),
            cache=execution.cache,
            allow_pickle=execution.allow_pickle,
            trust_remote_code=execution.trust_remote_code,
        )
    ready.sort(key=lambda checkpoint: (checkpoint.tokens_seen, checkpoint.name))
    refuse_ambiguous(ready)
    return [replace(checkpoint, path=checkpoint.path.absolute()) for checkpoint in ready]


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = read_config(checkpoint.path)
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def check_metrics(chosen: Mapping[str, HeadMetric], execution: Execution) -> None:
    """Refuse functions where other processes would have to know them."""
    if execution.executor == "here":
        return
    for name, metric in chosen.items():
        if not metric.function.__module__.startswith("lccp_interp."):
            raise LccpError(
                f"metric {name!r} is a function of this process, which the workers of executor {execution.executor!r} "
                "do not have; name metrics that come with the package, or use executor 'here'"
            )


def with_gpus(execution: Execution) -> Execution:
    """The same, with `gpus_per_worker` said: what `auto` means for workers is settled here."""
    if execution.executor == "here":
        return execution
    device, gpus = execution.device, execution.gpus_per_worker
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise LccpError(
            f"device {device!r} names one device of this machine, workers get theirs by --gpus-per-worker; "
            "use --device auto, cuda or cpu"
        )
    if device in ("cpu", "mps") and gpus:
        raise LccpError(f"--gpus-per-worker {gpus:g} does not go with --device {device}; use --device cuda or auto")
    if gpus is None and execution.executor == "slurm":
        gpus = float(execution.slurm.get("gpus_per_node", 0))
    if gpus is None and execution.executor == "pool" and device in ("auto", "cuda"):
        import torch

        gpus = float(torch.cuda.device_count() > 0)
    if device == "cuda" and not gpus:
        raise LccpError("--device cuda: the workers are given no GPU; add --gpus-per-worker 1")
    return replace(execution, gpus_per_worker=gpus or 0.0)


def placed(execution: Execution, dtype: str, checkpoint: Path) -> tuple[str, str]:
    """What device and dtype mean where the work is done, which may be another machine than this one."""
    from lccp_interp.capture.model import resolve

    if execution.executor == "here":
        return resolve(execution.device, dtype, checkpoint)
    device = "cuda" if execution.gpus_per_worker else execution.device.replace("auto", "cpu")
    if device != "cuda":
        return resolve(device, dtype, checkpoint)
    _, known = resolve("cpu", dtype, checkpoint)  # refuses unknown names
    if dtype == "auto":
        config = read_config(checkpoint)
        return device, str(config.get("dtype") or config.get("torch_dtype") or known).removeprefix("torch.")
    return device, known


def check_lengths(checkpoint: Checkpoint, longest: int, written: int) -> None:
    """Refuse lengths beyond learned positions; warn where rotary positions let the model run on untrained ground."""
    config = _text_config(checkpoint)
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int) or longest + written <= limit:
        return
    if not any(key.startswith("rope") or key == "rotary_pct" for key in config):
        more = f", and {written} more may be written" if written else ""
        raise LccpError(
            f"checkpoint {checkpoint.name!r} has {limit} learned positions, the cases ask for {longest} tokens{more}; "
            f"ask for at most {limit - written}"
        )
    if longest <= limit:
        return
    warnings.warn(
        f"checkpoint {checkpoint.name!r} is made for {limit} positions (max_position_embeddings), {longest} tokens are "
        f"asked for; its scores there are extrapolation (RoPE: {_rope_setting(config)})",
        stacklevel=3,
    )


def _rope_setting(config: dict[str, Any]) -> str:
    """How a config sets its rotary positions, in the names of its own keys."""
    keys = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    return ", ".join(f"{key} {json.dumps(config[key])}" for key in keys if config.get(key) is not None) or "not set"


def check_vocabulary(checkpoints: Sequence[Checkpoint], cases: Sequence[Case]) -> None:
    largest = max(max(*case.prompt_ids, *case.answer_ids) for case in cases)
    for checkpoint in checkpoints:
        size = _text_config(checkpoint).get("vocab_size")
        if isinstance(size, int) and largest >= size:
            raise LccpError(
                f"checkpoint {checkpoint.name!r} has {size} tokens in its vocabulary, its tokenizer gave token "
                f"{largest}; copy the tokenizer that belongs to it"
            )
