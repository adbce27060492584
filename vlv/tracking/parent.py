"""The run that the stages of one flow nest under."""

import logging
import threading
from collections.abc import Mapping

from vlv.config import Paths
from vlv.tracking import delivery, store
from vlv.tracking.journal import encode
from vlv.tracking.run import Status, clean_key, clean_tags, close_journal, create_journal, patience

log = logging.getLogger(__name__)


def create_parent_run(paths: Paths, name: str, tags: Mapping[str, str] | None = None) -> str | None:
    """Make the run that a flow's stages nest under and return its id, for VLV_PARENT_RUN_ID.

    None where a server gives no answer within 15 s: the stages then stand alone, with the flow's id as tag.
    """
    uri = store.prepare(paths)
    made: list[str] = []

    def make() -> None:
        try:
            client = store.client(uri)
            experiment = store.experiment_id(client, store.experiment_name(), store.artifact_root(paths, uri))
            made.append(str(client.create_run(experiment, tags=clean_tags(tags or {}), run_name=name).info.run_id))
        except Exception as error:  # whatever it is, the flow goes on without a parent
            log.warning("MLflow does not answer; the flow goes on without a parent run: %s", error)

    thread = threading.Thread(target=make, name="vlv-mlflow-parent", daemon=True)
    thread.start()
    thread.join(patience(uri))
    return made[0] if made else None


def finish_run(
    paths: Paths,
    run_id: str,
    status: Status,
    *,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> bool:
    """End a run made by `create_parent_run`, with last figures. False: it waits in the outbox."""
    uri = store.prepare(paths)
    journal = create_journal(paths, uri, "", None, {}, run_id=run_id)
    if metrics:
        journal.append("metrics", step=0, values=encode({clean_key(key): value for key, value in metrics.items()}))
    if tags:
        journal.append("tags", values=clean_tags(tags))
    journal.append("finish", status=status)
    shipper = delivery.Shipper(journal)
    shipper.start()
    return close_journal(shipper, journal, patience(uri))
