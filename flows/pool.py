"""The work pool of the deployments in prefect.yaml: python -m flows.pool

`prefect work-pool create` does the same, but has the server ask GitHub for a list of all kinds of pools first.
"""

import sys

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker

import flows  # noqa: F401  (sets Prefect's defaults, before Prefect is imported)

NAME = "vlv"


def main() -> int:
    """Make the pool, or leave it as it is. Returns the exit code."""
    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=NAME, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            print(f"The work pool {NAME!r} is there already.")
        else:
            print(f"Made the work pool {NAME!r}. Start a worker with: prefect worker start --pool {NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
