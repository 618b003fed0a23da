"""Ray Jobs: send a study to a running cluster with the code that is here, and ask after it."""

import json
import shlex
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.cluster import TOKEN_HINT, worker_environment
from orchestrator.store import Store
from orchestrator.study import Study
from workloads.errors import UserError, first_line
from workloads.record import write_json

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOB = "job.json"
_PACKAGES = ("orchestrator", "workloads", "search_spaces", "dashboards")
_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted study as its cluster sees it."""

    id: str
    address: str
    # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED, or UNREACHABLE when the cluster does not answer.
    status: str
    message: str


def submit(study: Study, store: Store, address: str, tracking_uri: str) -> str:
    """Start `sweep` of this study as a job; returns its id. Raises `UserError` when there is no cluster."""
    client = _client(address)
    store.require_writable()
    words = ["sweep", f"{study.tree_name}.yaml", "--profile", study.profile, "--root", str(store.root)]
    words += ["--address", "auto", *(["--tracking-uri", tracking_uri] if tracking_uri else [])]
    code = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        _pack(study, Path(folder))
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "orchestrator", *words]),
            submission_id=f"{study.name}_{time.strftime('%Y%m%d_%H%M%S')}",
            runtime_env={
                "working_dir": folder,
                "py_modules": [str(code / name) for name in _PACKAGES],
                "env_vars": {**worker_environment(threads=1), "COLUMNS": "120"},
            },
            metadata={"study": study.name},
        )
    write_json(store.study_folder(study.name) / JOB, {"schema_version": 1, "id": job, "address": address})
    return job


def submitted(store: Store) -> list[str]:
    """Names of the studies that were submitted from this root."""
    return sorted(path.parent.name for path in store.root.glob(f"*/{JOB}"))


def state(store: Store, name: str) -> Job | None:
    """The job of a submitted study; None when it was not submitted."""
    path = store.study_folder(name) / JOB
    if not path.is_file():
        return None
    job = json.loads(path.read_text(encoding="utf-8"))
    try:
        status, message = _ask(job["address"], job["id"])
    except (UserError, RuntimeError, OSError) as error:
        status, message = "UNREACHABLE", str(error)
    return Job(id=job["id"], address=job["address"], status=status, message=" ".join(message.split()))


def _ask(address: str, job: str) -> tuple[str, str]:
    """A job's state and message: by plain HTTP, which spares loading ray, or by Ray's client where a token is due."""
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/{job}", timeout=_SECONDS) as answer:
            tree = json.loads(answer.read())
        return tree["status"], tree.get("message") or ""
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.UNAUTHORIZED:
            raise
    info = _client(address).get_job_info(job)
    return info.status.value, info.message or ""


def logs(store: Store, name: str) -> str:
    """What the job has printed."""
    job = _required(store, name)
    return _client(job.address).get_job_logs(job.id)


def stop(store: Store, name: str) -> str:
    """Ask the cluster to stop the job; returns its id."""
    job = _required(store, name)
    _client(job.address).stop_job(job.id)
    return job.id


def _required(store: Store, name: str) -> Job:
    job = state(store, name)
    if job is None:
        raise UserError(f"study: {name!r} was not submitted from {store.root}")
    if job.status == "UNREACHABLE":
        raise UserError(f"study {name}: its cluster at {job.address} does not answer ({job.message})")
    return job


def _client(address: str) -> "JobSubmissionClient":
    """Ray's client for a dashboard that answers; raises `UserError` in one line when it does not."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
        raise UserError(f"--address: {address!r} is not allowed; http://HOST:PORT of Ray's dashboard")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=_SECONDS).close()
    except OSError as error:
        raise UserError(f"--address: no Ray dashboard answers at {address} ({error})") from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"--address: {address} asks for a token; {TOKEN_HINT}") from None
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"--address: {address} is not Ray's dashboard ({first_line(error)})") from None


def _pack(study: Study, folder: Path) -> None:
    """Write the study, with its recipe beside it, as the job will find it in its working directory."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(study.recipe), folder / "recipe.yaml")
    OmegaConf.save(
        OmegaConf.create({**study.tree, "recipe": "recipe.yaml"}), folder / f"{study.tree_name}.yaml"
    )
