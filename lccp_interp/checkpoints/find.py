"""Find checkpoints, count their tokens, order them, and refuse what could not be compared.

This joins where checkpoints live (`sources`) to how far their training was (`tokens`). A trajectory is one line of
training: of a stage with several branches one is followed, two checkpoints of one token count are refused.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lccp_interp.checkpoints.folders import read_json, tokenizer_hash
from lccp_interp.checkpoints.names import NameParts, parse_name
from lccp_interp.checkpoints.shelf import default_cache
from lccp_interp.checkpoints.sources import Seen, Trust, look_at_folders, look_at_hub, split_source
from lccp_interp.checkpoints.tokens import Counted, Counter, Counting, TokenTable, lacking_tokens
from lccp_interp.schema import Checkpoint, LccpError


@dataclass(frozen=True)
class Found:
    """A checkpoint that was found, usable or not.

    Attributes:
        name: of its folder or revision.
        path: its folder; for one on a hub, where its config and tokenizer are, and its weights will be.
        source: `organisation/name@revision`; None for a folder.
        stage: of training.
        branch: line of training, where a stage has several.
        tokens_seen: over all stages; None if that is not known.
        stage_tokens: of its own stage; None if that is not known or there is one stage only.
        n_bytes: of its weights.
        hash: of its config and weights; None if it is broken.
        same_as: the checkpoint before it that has the same hash.
        fault: why it cannot be used, or why its tokens are not known; empty if neither.
    """

    name: str
    path: Path
    source: str | None
    stage: str
    branch: str | None
    tokens_seen: int | None
    stage_tokens: int | None
    n_bytes: int
    hash: str | None
    same_as: str | None = None
    fault: str = ""


def bundled_trajectory() -> list[Checkpoint]:
    """The small trained trajectory that ships with the project, from its first checkpoint to its last.

    Raises:
        LccpError: it is missing from this installation.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "data" / "trajectory", package / "organism" / "trajectory"):
        if (folder / "trajectory.json").is_file():
            return find_checkpoints([folder])
    raise LccpError("this installation has no bundled trajectory; train it: lccp organism train --out data/trajectory")


def find_checkpoints(
    paths: str | Path | Iterable[str | Path],
    *,
    tokens: Mapping[str, int] | None = None,
    tokens_per_step: int | Mapping[str, int] | None = None,
    table: TokenTable | None = None,
    stage_tokens_before: Mapping[str, int] | None = None,
    branch: str | None = None,
    revisions: Sequence[str] | None = None,
    cache: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> list[Checkpoint]:
    """The checkpoints in `paths`, verified, hashed and ordered by tokens seen.

    Args:
        paths: checkpoint folders, or folders of them (with a `trajectory.json` or not); as text also patterns of
            folders (`ckpts/step-*`), and repositories on a hub: `organisation/name` for all revisions,
            `organisation/name@step1,step2` or `@step*` for some. Of those on a hub no weights are fetched yet.
        tokens: tokens seen over all stages by checkpoint name; wins over everything found.
        tokens_per_step: tokens per optimizer step, for names and trainer states that only tell steps; by stage if
            stages differ. Of some public trajectories it is known.
        table: tokens seen out of a file, see `read_token_table`; next after `tokens`. It may name more checkpoints.
        stage_tokens_before: by stage, tokens of all stages before it.
        branch: which branch to follow where a stage has several (`ingredient1`).
        revisions: names or patterns, for repositories given without an @.
        cache: where revisions of a hub are kept; see `Depot`.
        allow_pickle: take pickled weights where there are no safetensors.
        trust_remote_code: fetch the Python files of revisions too.

    Raises:
        LccpError: nothing found, a broken folder, an unknown token count, several branches, or two checkpoints of one
            name or count.

    Example:
        >>> [first, *_, last] = find_checkpoints(["EleutherAI/pythia-160m@step1*"])   # doctest: +SKIP
        >>> last.name, last.tokens_seen                                              # doctest: +SKIP
        ('step143000', 299892736000)
    """
    counting = Counting(tokens or {}, table or TokenTable(), tokens_per_step, stage_tokens_before or {}, branch)
    found = _search(paths, counting, revisions, cache, Trust(allow_pickle, trust_remote_code), strict=True)
    if not found:
        raise LccpError("no checkpoints given; name at least one checkpoint folder")
    found = _follow(found, branch)
    if len(found) == 1 and found[0].tokens_seen is None:
        # A lone checkpoint has no order to be put in: it is counted from where its name counts from.
        found = [replace(found[0], tokens_seen=found[0].stage_tokens or 0, fault="")]
    if unknown := [(one.name, parse_name(one.name), one.fault) for one in found if one.tokens_seen is None]:
        raise LccpError(lacking_tokens(unknown, len(found)))
    for stray in sorted(set(tokens or {}) - {one.name for one in found}):
        raise LccpError(f"--tokens names {stray!r}; the checkpoints are {', '.join(one.name for one in found)}")
    checkpoints = [
        Checkpoint(
            one.name, one.path, one.tokens_seen or 0, one.stage, one.stage_tokens, one.hash, one.source, one.branch
        )
        for one in sorted(found, key=lambda one: (one.tokens_seen or 0, one.name))
    ]
    refuse_ambiguous(checkpoints)
    _warn_of_copies(checkpoints)
    return checkpoints


def list_checkpoints(
    paths: str | Path | Iterable[str | Path],
    *,
    counting: Counting | None = None,
    revisions: Sequence[str] | None = None,
    cache: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> list[Found]:
    """Everything that is found in `paths`, broken ones and all branches too, in the order of tokens as far as known.

    Args:
        paths: as for `find_checkpoints`.
        counting: what is known of tokens.
        revisions: names or patterns, for repositories given without an @.
        cache: where revisions of a hub are kept; see `Depot`.
        allow_pickle: take pickled weights where there are no safetensors.
        trust_remote_code: fetch the Python files of revisions too.

    Raises:
        LccpError: no such folder or repository.

    Example:
        >>> list_checkpoints(["allenai/OLMo-2-0425-1B"])[0].branch   # doctest: +SKIP
    """
    trust = Trust(allow_pickle, trust_remote_code)
    found = _search(paths, counting or Counting(), revisions, cache, trust, strict=False)
    found.sort(key=lambda one: (one.tokens_seen is None, one.tokens_seen or 0, one.name))
    first: dict[str, str] = {}
    marked = []
    for one in found:
        marked.append(replace(one, same_as=first.get(one.hash or "")))
        if one.hash:
            first.setdefault(one.hash, one.name)
    return marked


def refuse_ambiguous(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that share a name or a token count: their order, and so births and deaths, would mean nothing.

    Args:
        checkpoints: sorted by tokens seen.

    Raises:
        LccpError: naming the pair.
    """
    names = [checkpoint.name for checkpoint in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise LccpError(f"two checkpoints are called {name!r}; rename one folder")
    for one, other in itertools.pairwise(checkpoints):
        if one.tokens_seen == other.tokens_seen:
            raise LccpError(
                f"checkpoints {one.name!r} and {other.name!r} both have {one.tokens_seen} tokens seen; "
                "tell them apart with --tokens NAME=COUNT"
            )


def _warn_of_copies(checkpoints: Sequence[Checkpoint]) -> None:
    first: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints:
        other = first.setdefault(checkpoint.hash or checkpoint.name, checkpoint)
        # With another tokenizer it is another model, of however equal weights.
        if other is not checkpoint and tokenizer_hash(other.path) == tokenizer_hash(checkpoint.path):
            warnings.warn(
                f"checkpoints {other.name!r} and {checkpoint.name!r} have the same weights and config; one of them may "
                "have been saved or uploaded under a wrong name",
                stacklevel=3,
            )


def _follow(found: list[Found], branch: str | None) -> list[Found]:
    """One line of training out of what was found."""
    by_stage: dict[str, set[str]] = {}
    for one in found:
        if one.branch is not None:
            by_stage.setdefault(one.stage, set()).add(one.branch)
    if branch is not None:
        known = sorted(set().union(*by_stage.values()))
        if branch not in known:
            raise LccpError(
                f"--branch {branch!r} is none of the branches found: {', '.join(known) or 'there are none'}"
            )
        return [one for one in found if one.branch in (None, branch)]
    for stage, branches in sorted(by_stage.items()):
        if len(branches) > 1:
            names = sorted(branches)
            raise LccpError(
                f"{stage} has {len(names)} branches ({', '.join(names)}), each trained on its own from the same start; "
                f"follow one with --branch {names[0]}"
            )
    return found


def _search(
    paths: str | Path | Iterable[str | Path],
    counting: Counting,
    revisions: Sequence[str] | None,
    cache: str | Path | None,
    trust: Trust,
    *,
    strict: bool,
) -> list[Found]:
    """What lies in the sources, each with its tokens; `strict` raises the first fault of a checkpoint."""
    sources = [paths] if isinstance(paths, str | Path) else list(paths)
    places = [os.path.abspath(source) for source in sources]
    hubs = {source: where for source in sources if (where := split_source(source)) is not None}
    root = default_cache() if cache is None else Path(cache)
    told = {*counting.tokens, *counting.table.tokens}
    several = len({repository for repository, _ in hubs.values()}) > 1

    def wanted(name: str) -> bool:
        return not strict or counting.branch is None or parse_name(name).branch in (None, counting.branch)

    seen: list[Seen] = []
    for source, place in zip(sources, places, strict=True):
        if places.count(place) > 1:
            raise LccpError(f"checkpoint folder {source} is given twice; name it once")
        if where := hubs.get(source):
            repository, asked = where
            asked = asked or (list(revisions) if revisions else None)
            looked = look_at_hub(repository, asked, cache=root, trust=trust, wanted=wanted, counted=told)
            if several:
                looked = [replace(one, name=f"{repository.partition('/')[2]}@{one.name}") for one in looked]
            seen += looked
        else:
            looked = look_at_folders(source, trust)
            seen += [replace(one, siblings=tuple(other.name for other in looked)) for one in looked]
    if strict:
        for one in seen:
            if one.fault:
                raise LccpError(one.fault)
    local = tuple(one.name for one in seen if one.repository is None)
    counters = {
        one.repository: Counter(one.siblings if one.repository else local, counting, one.repository) for one in seen
    }
    return [_counted(one, counters[one.repository], counting) for one in seen]


def _counted(seen: Seen, counter: Counter, counting: Counting) -> Found:
    """A checkpoint with its stage and its tokens."""
    parts, entry = parse_name(seen.name), seen.entry
    stage = counting.table.stages.get(seen.name) or (entry.stage if entry else parts.stage) or "train"
    explicit = counting.tokens.get(seen.name, counting.table.tokens.get(seen.name))
    if entry is not None:
        counted = Counted(entry.tokens_seen if explicit is None else explicit, entry.stage_tokens)
        branch = entry.branch
    else:
        branch = parts.branch
        counted = _from_state(seen, parts, counter, explicit)
    return Found(
        name=seen.name,
        path=seen.path,
        source=seen.source,
        stage=stage,
        branch=branch,
        tokens_seen=counted.seen,
        stage_tokens=counted.in_stage,
        n_bytes=seen.n_bytes,
        hash=seen.hash,
        fault=seen.fault or counted.lacking,
    )


def _from_state(seen: Seen, parts: NameParts, counter: Counter, explicit: int | None) -> Counted:
    """Tokens as the Trainer's state tells them, else the name."""
    file = seen.path / "trainer_state.json"
    step: int | None = None
    if explicit is None and seen.source is None and not seen.fault and file.is_file():
        state = read_json(file, "trainer state")
        if not isinstance(state, dict):
            raise LccpError(f"{file} is no trainer state; it must be a JSON object")
        if tokens := int(state.get("num_input_tokens_seen") or 0):
            return Counted(tokens)
        if parts.tokens is None and state.get("global_step") is not None:
            step = int(state["global_step"])
    return counter.count(seen.name, step=step)
