"""The campaign against faults: what a maintainer runs before a release. `python -m tests.campaign --help`."""
