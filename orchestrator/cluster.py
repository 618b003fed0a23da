"""Ray itself: start a local one or join a cluster, quietly, and size the trials that run at once."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.study import Resources
from workloads.errors import UserError, first_line, require

# Read by Ray and its libraries when they are imported or start processes; set for the driver and the workers.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Our own ledger and live line replace Tune's files and tables.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Eval events carry no training loss and the other way round.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A trial that a scheduler stops ends at its next report; its actor is kept if that comes in time.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "15",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}

_OBJECT_STORE_BYTES = 200_000_000
# Ray guards clusters with a token once a user has one, and clients send theirs only when told to.
TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless `ray get-auth-token` finds it"


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of every process that trains."""
    return {"OMP_NUM_THREADS": str(threads), **_ENVIRONMENT}


def local_slots(resources: Resources, threads: int) -> int:
    """Trials at once on this machine."""
    return resources.slots or max(1, len(os.sched_getaffinity(0)) // (resources.workers * threads))


def probe(address: str, seconds: float = 3.0) -> None:
    """Raise `UserError` in one line when no cluster answers at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    require(bool(host) and port.isdigit(), "--address", address, "HOST:PORT of a Ray head, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address: no Ray cluster answers at {address} ({error})") from None


@contextmanager
def connected(resources: Resources, threads: int, address: str, log: Path) -> Iterator[int]:
    """Ray for the length of a sweep; yields how many trials run at once."""
    os.environ.update(worker_environment(threads))
    import ray

    _quiet(log)
    if address:
        slots = _join(address, resources, threads)
    else:
        slots = local_slots(resources, threads)
        ray.init(
            address="local",
            num_cpus=slots * resources.workers * threads,
            num_gpus=_local_gpus(slots, resources),
            # Trials exchange a few numbers; Ray's default is a third of the machine's memory.
            object_store_memory=_OBJECT_STORE_BYTES,
            # Train's cleaner asks the dashboard whether its controller lives, and complains without one.
            include_dashboard=resources.workers > 1,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    try:
        yield slots
    finally:
        ray.shutdown()


def _join(address: str, resources: Resources, threads: int) -> int:
    import ray
    from ray.exceptions import AuthenticationError

    inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    environment = {} if inside_job else {"env_vars": worker_environment(threads)}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError:
        raise UserError(f"--address: {address} asks for a token; {TOKEN_HINT}") from None
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address: no Ray cluster at {address!r} ({first_line(error)})") from None
    cpus = ray.cluster_resources().get("CPU", 0.0)
    need = resources.workers * threads
    require(
        cpus >= need, "resources.workers", resources.workers, f"the cluster at {address} has {cpus:g} CPUs"
    )
    return resources.slots or max(1, int(cpus // need))


def _local_gpus(slots: int, resources: Resources) -> int | None:
    return None if resources.gpus_per_worker else 0


def _quiet(log: Path) -> None:
    """Send warnings of Ray and MLflow to the driver's log instead of the terminal."""
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("ray", "mlflow", "alembic", "orchestrator"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING)
