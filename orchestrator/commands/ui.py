"""`ui`: MLflow's own pages for a study, on this machine only."""

import os
import socket
import sys
from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Root, StudyName, study_name
from orchestrator.terminal import console, say


def ui(
    study: StudyName,
    root: Root = DEFAULT_ROOT,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 5000,
) -> None:
    """Serve MLflow for a study on 127.0.0.1 until Ctrl-C."""
    from orchestrator.store import Store
    from workloads.errors import UserError

    store, name = Store(root), study_name(study)
    store.read_study(name)
    folder = store.study_folder(name)
    if not (folder / "mlflow.db").is_file():
        raise UserError(f"study {name}: no mlflow.db in {folder}; `orchestrator sync {name}` writes it")
    with socket.socket() as probe:
        # As the server sets it: a port that a closed connection still lingers on counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"--port: {port} is in use on 127.0.0.1; choose another one") from None
    say(console(), f"MLflow for {name}: http://127.0.0.1:{port} (Ctrl-C ends it)")
    store_uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri]
    command += [
        "--default-artifact-root",
        artifacts,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    # MLflow's job workers serve features that are not used here, and take seconds to start.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execve(command[0], command, {**os.environ, **settings})
