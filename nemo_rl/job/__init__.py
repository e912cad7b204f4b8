"""The specification of a training job: the one source of the CRD, the Python defaults, the CLI and the operator's checks."""
