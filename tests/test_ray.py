"""A Ray cluster of two nodes on this machine: actors, nodes and drivers die, the tables are those of one process."""

from __future__ import annotations

import time

import pytest
import sweeping
from sweeping import N_UNITS, At, done_units, kill, log_of, parts, process_of, sweep, wait_for

from lccp_interp.schema import LccpError
from lccp_interp.store import Run

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

# Ray leaves sockets and pipes to the garbage collector when its processes end.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def _started():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    return cluster


def _patient(look, within_s=150.0):
    """The same look at a new node, repeated: a node is given 30 s, which where others compute too is too soon."""

    def wait(*args):
        until = time.monotonic() + within_s
        while True:
            try:
                return look(*args)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    return wait


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a processor each."""
    environment = pytest.MonkeyPatch()
    # Ray lets its workers go last, which where others compute too is not at all.
    environment.setenv("RAY_worker_niceness", "0")
    environment.setattr(ray._private.services, "get_node", _patient(ray._private.services.get_node))
    cluster = _started()
    yield cluster
    environment.undo()
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(trajectory, tmp_path_factory):
    """The parts of the small study, done in this process."""
    out = tmp_path_factory.mktemp("run") / "here"
    sweep(trajectory, out)
    return parts(out)


def on_ray(cluster):
    return {"executor": "ray", "workers": 2, "ray_address": cluster.address}


def require_each_unit_once(run):
    assert len(done_units(run)) == len(set(done_units(run))) == N_UNITS


def test_an_actor_is_killed(trajectory, undisturbed, tmp_path, cluster):
    run, told = tmp_path / "run", []
    with At(lambda: len(done_units(run)) >= 3, lambda: kill(process_of(run, 0))) as fault:
        sweep(trajectory, run, **on_ray(cluster), progress=lambda *report: told.append(report))
    assert fault.happened
    assert parts(run) == undisturbed
    require_each_unit_once(run)
    assert sum("worker 0 lost" in line for line in log_of(run)) == 1
    assert told[-1] == (18 * 640, 18 * 640, "done")
    assert Run.open(run).manifest["executions"][0]["executor"] == "ray"
    assert not ray.is_initialized(), "the cluster is left when the sweep is over"


def test_the_driver_is_killed_and_the_next_one_goes_on(trajectory, undisturbed, tmp_path, cluster):
    run = tmp_path / "run"
    first = sweeping.driver(trajectory, run, **on_ray(cluster))
    assert wait_for(lambda: len(done_units(run)) >= 2)
    kill(first.pid)
    assert first.wait() == -9
    assert 0 < len(list(run.glob("scores/*.parquet"))) < N_UNITS
    sweep(trajectory, run, **on_ray(cluster))
    assert parts(run) == undisturbed
    # A part that was written and not yet told of is found there.
    assert len(done_units(run)) == len(set(done_units(run))) <= N_UNITS


def test_a_node_is_removed_in_mid_task(trajectory, undisturbed, tmp_path, cluster):
    run = tmp_path / "run"
    (worker_node,) = cluster.worker_nodes
    lost = lambda: cluster.remove_node(worker_node, allow_graceful=False)  # noqa: E731
    with At(lambda: len({line.split()[1] for line in log_of(run) if "ready" in line}) == 2, lost) as fault:
        sweep(trajectory, run, **on_ray(cluster))
    assert fault.happened
    assert parts(run) == undisturbed
    require_each_unit_once(run)
    assert sum(" lost with unit " in line for line in log_of(run)) == 1


def test_no_cluster_at_the_address(trajectory, tmp_path):
    with pytest.raises(LccpError, match=r"no Ray cluster at '127.0.0.1:1': .*; start one \(`ray start --head`\)"):
        sweep(trajectory, tmp_path / "run", executor="ray", ray_address="127.0.0.1:1")
