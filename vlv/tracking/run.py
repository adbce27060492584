"""A run, as the stages see it."""

import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlv.config import Paths
from vlv.io import files
from vlv.io.stopping import Stopped
from vlv.tracking import delivery, outbox, store
from vlv.tracking.journal import Head, Journal, curve, encode, journals, last_steps, params_given, resumed_by

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlv.io.images import Pixels

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARENT_VARIABLE = "VLV_PARENT_RUN_ID"
FLOW_VARIABLE = "VLV_FLOW_RUN_ID"
CLOSE_SECONDS = 15.0  # how long a finished run waits for a server
LOCAL_CLOSE_SECONDS = 120.0  # and for the project's sqlite file, which is never dead, only slow on a full machine
INTERRUPTED_CLOSE_SECONDS = 4.0  # the seconds between SIGTERM and SIGKILL are the checkpoint's
_KEY_LIMIT, _PARAM_LIMIT, _TAG_LIMIT, _DIGEST_LIMIT = 250, 6000, 8000, 36  # MLflow 3's


class Run:
    """What a stage can log. Every method writes to local disk only and returns at once."""

    def __init__(self, journal: Journal, shipper: delivery.Shipper) -> None:
        self._journal = journal
        self._shipper = shipper
        entries = journal.entries()
        self._last = last_steps(entries)
        self._params = params_given(entries)
        self._order = threading.Lock()
        self._ended = False

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as the server has not given one."""
        return self._journal.run_id

    def wait_for_id(self, seconds: float | None = None) -> str | None:
        """The run's id, waiting for it at most so long (a server: 15 s, the sqlite file: 120 s)."""
        self._shipper.started_run.wait(patience(self._journal.head.uri) if seconds is None else seconds)
        return self.run_id

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters; nested mappings become dotted keys, values longer than MLflow takes are cut.

        A parameter that the run already has keeps its value, as MLflow demands.
        """
        flat = {clean_key(key): str(value)[:_PARAM_LIMIT] for key, value in flatten(values).items()}
        fresh = {key: value for key, value in flat.items() if key not in self._params}
        self._params.update(fresh)
        if fresh:
            self._journal.append("params", values=fresh)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """One point on each named curve. NaN and infinity are kept.

        Steps of a curve grow: a point at a step that the run already has is dropped, so that a resumed run
        that goes through its last steps again does not double them.
        """
        clean = {clean_key(key): value for key, value in values.items()}
        with self._order:
            fresh = {key: value for key, value in clean.items() if step > self._last.get(key, -1)}
            if fresh and not self._ended:
                self._journal.append("metrics", step=step, values=encode(fresh))
                self._last.update(dict.fromkeys(fresh, step))

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Tags, overwriting earlier ones of the same name."""
        self._journal.append("tags", values=clean_tags(values))

    def log_artifact(self, path: Path, to: str = "") -> None:
        """A file, or a folder with all in it, as it is now; `to` is a folder in the run's artifacts.

        Raises:
            FileNotFoundError: there is no such file or folder.
        """
        self._journal.append("artifact", kept=self._journal.attach(path), to=to)

    def log_bytes(self, data: bytes, name: str, to: str = "") -> None:
        """A file's content under the file name `name`."""
        self._journal.append("artifact", kept=self._journal.attach_bytes(data, name), to=to)

    def log_image(self, pixels: "Pixels", name: str, to: str = "") -> None:
        """(H, W, 3) uint8 as a PNG file."""
        from vlv.io import images

        self.log_bytes(images.encode_png(pixels), name, to)

    def log_figure(self, figure: "Figure", name: str, to: str = "") -> None:
        """A matplotlib figure as a PNG file."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.log_bytes(buffer.getvalue(), name, to)

    def log_dataset(
        self, name: str, digest: str, source: str, counts: Mapping[str, int], context: str = "training"
    ) -> None:
        """The data that the run reads: its hash (MLflow keeps 36 characters; all of it is in the profile)."""
        dataset = {
            "name": name[:500],
            "digest": digest[:_DIGEST_LIMIT],
            "source_type": "local",
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"digest": digest, **counts}),
        }
        self._journal.append("dataset", dataset=dataset, context=context)

    def next_step(self, key: str) -> int:
        """The first step that the curve does not have yet."""
        return self._last.get(clean_key(key), -1) + 1

    def curve(self, keys: Collection[str]) -> dict[int, dict[str, float]]:
        """The points logged so far, step -> values, where all of `keys` were logged together."""
        return curve(self._journal.entries(), keys)

    def _end(self, status: Status) -> None:
        """Journal the end; metrics that another thread logs after it are dropped."""
        with self._order:
            self._ended = True
            self._journal.append("finish", status=status)


@contextmanager
def start_run(
    paths: Paths,
    name: str,
    *,
    parent_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    resume_file: Path | None = None,
    system_metrics: bool = True,
    interval: float = delivery.INTERVAL,
) -> Iterator[Run]:
    """Open a run for the `with` block: FINISHED at its end, KILLED where it was stopped, FAILED on an error.

    The parent is `parent_id` or VLV_PARENT_RUN_ID. With `resume_file` a run that was killed or failed is gone
    on with, its curves without doubles; delete the file to begin a new one. It is removed when the run
    finishes, so it may lie in a folder that DVC hashes. No call waits for a server, except the end: at most
    15 s, then the rest stays in the outbox for the next start or `vlv doctor`.

    Raises:
        LockHeldError: the run to be resumed is still going on in another process.
        TrackingError: the project's own sqlite file cannot be used.
    """
    uri = store.prepare(paths)
    journal = _resume(uri, outbox.folder(paths), resume_file)
    if journal is None:
        flow = os.environ.get(FLOW_VARIABLE)
        all_tags = clean_tags({**({"vlv.flow_run_id": flow} if flow else {}), "vlv.stage": name, **(tags or {})})
        parent = parent_id or os.environ.get(PARENT_VARIABLE) or None
        journal = create_journal(paths, uri, name, parent, all_tags, resume_file=resume_file)
    shipper = delivery.Shipper(journal, interval)
    run = Run(journal, shipper)
    shipper.start()
    threading.Thread(target=_flush_quietly, args=(paths,), name="vlv-outbox", daemon=True).start()
    ended = threading.Event()
    if system_metrics:
        from vlv.tracking.system import sample

        threading.Thread(target=sample, args=(run, ended), name="vlv-system-metrics", daemon=True).start()
    status: Status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, GeneratorExit, Stopped):
        status = "KILLED"
        raise
    finally:
        ended.set()
        if status == "FINISHED" and resume_file is not None:
            resume_file.unlink(missing_ok=True)
        run._end(status)
        close_journal(shipper, journal, INTERRUPTED_CLOSE_SECONDS if status == "KILLED" else patience(uri))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def create_journal(
    paths: Paths,
    uri: str,
    name: str,
    parent: str | None,
    tags: dict[str, str],
    *,
    run_id: str | None = None,
    resume_file: Path | None = None,
) -> Journal:
    head = Head(
        uri=uri,
        experiment=store.experiment_name(),
        artifacts=store.artifact_root(paths, uri),
        name=name,
        start_time=time.time_ns() // 1_000_000,
        parent_id=parent,
        tags=tags,
        run_id=run_id,
        resume_file=str(resume_file.resolve()) if resume_file else None,
    )
    journal = Journal.create(outbox.folder(paths), head)
    if resume_file is not None:
        files.write_json(resume_file, {"journal": journal.folder.name})
    return journal


def _resume(uri: str, folder: Path, resume_file: Path | None) -> Journal | None:
    """The journal that `resume_file` names, where it is still there and meant for the same server."""
    if resume_file is None or not resume_file.exists():
        return None
    named = _journal_named_by(resume_file, folder)
    if named is None:
        return None
    try:
        journal = Journal.open(named, wait=20)  # a flush of the outbox may hold it for a moment
    except FileNotFoundError:
        return None
    if journal.head.uri != uri:
        journal.release()
        return None
    journal.append("resume")
    return journal


def _journal_named_by(resume_file: Path, outbox_folder: Path) -> Path | None:
    """The journal's folder. Where the file is damaged: the newest journal that was to be resumed by it."""
    try:
        return outbox_folder / str(files.read_json_object(resume_file).get("journal"))
    except files.FileError as error:
        mine = [one for one in journals(outbox_folder) if resumed_by(one) == str(resume_file.resolve())]
        found = mine[-1] if mine else None
        files.set_aside(resume_file, error, f"it is made again from {found}" if found else "a new MLflow run begins")
        if found is not None:
            files.write_json(resume_file, {"journal": found.name})
        return found


def patience(uri: str) -> float:
    """Seconds that the end of a run waits for MLflow."""
    return LOCAL_CLOSE_SECONDS if uri.startswith("sqlite:") else CLOSE_SECONDS


def close_journal(shipper: delivery.Shipper, journal: Journal, seconds: float) -> bool:
    if shipper.close(seconds):
        return True
    log.warning(
        "MLflow (%s) does not answer; the rest waits in %s. The next run delivers it, or: vlv doctor",
        re.sub(r"//[^/@]*@", "//", journal.head.uri),  # no password into logs
        journal.folder,
    )
    return False


def _flush_quietly(paths: Paths) -> None:
    try:
        outbox.flush_outbox(paths)
    except Exception as error:  # housekeeping must not spoil the run
        log.warning("The outbox could not be flushed: %s", error)


def clean_key(name: str) -> str:
    """A key that MLflow takes: other characters become "_"."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_KEY_LIMIT]


def clean_tags(values: Mapping[str, str]) -> dict[str, str]:
    return {clean_key(key): str(value)[:_TAG_LIMIT] for key, value in values.items()}
