"""Every name that crosses a process boundary: the API group, labels, paths, ports and exit codes."""

from __future__ import annotations

import hashlib
from enum import IntEnum

GROUP = "nemo-rl.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "RLTrainingJob"
PLURAL = "rltrainingjobs"
SINGULAR = "rltrainingjob"
SHORT_NAME = "rlj"
CRD_NAME = f"{PLURAL}.{GROUP}"
MAX_NAME_LENGTH = 50
"""Longest name of a job: children add a suffix and must stay below 63 characters."""

MAX_ATTEMPT_NUMBER = 10**9
"""Numbers beyond are no attempt's: anybody can write labels."""

LABEL_JOB = f"{GROUP}/job"
LABEL_JOB_UID = f"{GROUP}/job-uid"
"""Uid of the RLTrainingJob, on its Jobs and pods: tells a job from an earlier one of the same name."""
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_ALGORITHM = f"{GROUP}/algorithm"
LABEL_COMPONENT = f"{GROUP}/component"
LABEL_BUNDLE = f"{GROUP}/bundle"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PRIORITY = "kueue.x-k8s.io/priority-class"
LABEL_RESTORED = "velero.io/restore-name"
"""Velero's label of what it restored from a backup, which by default is without the status."""
LABEL_POD_SET = "kueue.x-k8s.io/podset"
ANNOTATION_WORKLOAD = "kueue.x-k8s.io/workload"
KUEUE_GROUP = "kueue.x-k8s.io"
BUDGET_SPENT = "BudgetSpent"
"""Reason of a job that is suspended because its budget is spent."""
COMPONENT_TRAINER = "trainer"
COMPONENT_FILES = "files"
COMPONENT_ROLLOUT = "rollout"
ANNOTATION_JOB_INDEX = "batch.kubernetes.io/job-completion-index"

TRAINER_CONTAINER = "trainer"
TRAINER_PORT = 8080
"""The pod with index 0 serves /progress, /metrics and /healthz here."""
RENDEZVOUS_PORT = 29400
ROLLOUT_CONTAINER = "rollout"
ROLLOUT_PORT = 8000
"""Where a rollout replica listens: first what waits for a trainer, then its vLLM server."""
FILES_PORT = 8081
"""The file server of the `x-files` pod, on its loopback only."""

JOB_DIR = "/etc/nemo-rl"
JOB_KEY = "job.json"
JOB_FILE = f"{JOB_DIR}/{JOB_KEY}"
JOB_DIGEST_OPTION = "--job-sha256"
"""Argument of the trainer's program: SHA-256 of the frozen job that the operator made; no other content is run."""
JOB_DIGEST_VARIABLE = "NEMO_RL_JOB_SHA256"
"""The same for the file server, as an environment variable: one of an earlier version knows no such argument."""
POD_DIR = "/var/run/nemo-rl"
"""Where a pod has the rest of what is its own."""
TOKEN_KEY = "token"
ROLLOUT_TOKEN_KEY = "rollout"
"""Another random word in the same Secret, by which trainer and rollout replicas know each other. It travels, unlike the first."""
TOKEN_DIR = f"{POD_DIR}/run"
TOKEN_FILE = f"{TOKEN_DIR}/{TOKEN_KEY}"
"""The job's random secret, by which its ranks know each other; from a Secret of the job that the operator makes."""
ROLLOUT_TOKEN_FILE = f"{TOKEN_DIR}/{ROLLOUT_TOKEN_KEY}"
TOKEN_VARIABLE = "NEMO_RL_TOKEN_FILE"
"""Another file with the secret, for ranks outside of a pod."""
BUNDLE_DIR = f"{POD_DIR}/bundles"
OUTPUT_DIR = "/output"
CACHE_DIR = "/cache"
CACHE_VARIABLE = "NEMO_RL_CACHE"
"""Environment variable with the folder for copies of objects of stores; default ~/.cache/nemo-rl."""
CLAIMS_DIR = f"{POD_DIR}/claims"
"""Where claims of pvc:// references are mounted, read-only: pvc://data/rows.jsonl is CLAIMS_DIR/data/rows.jsonl."""
HOME_DIR = "/home/nemo-rl"
"""HOME of a pod: an emptyDir, since the root file system is read-only."""
TERMINATION_LOG = "/dev/termination-log"
TERMINATION_LIMIT = 4096
"""Bytes that the kubelet keeps of a termination message."""
PROGRESS_LIMIT = 64 * 1024
"""Bytes of /progress that the operator reads at most."""

MAX_INLINE_SOURCE = 64 * 1024
MAX_INLINE_ROWS = 64 * 1024
"""Bytes of a data set's inline rows as JSON. The client makes a bundle of more; what is stored with more is still read."""
MAX_NESTING = 32
"""Levels of lists and mappings within one row, and within affinity."""
MAX_BUNDLE_PARTS = 64
"""ConfigMaps of all bundles of a job together; one bundle of the greatest size has 19."""
MAX_BUNDLE_BYTES = 16 * 1024 * 1024
"""Of a bundle in ConfigMaps. The archive of a larger one lies in the store that the job writes to."""
MAX_STORED_BUNDLE_BYTES = 256 * 1024 * 1024
STORED_BUNDLES = ".bundles"
"""Folder below output.uri with the archives of bundles, named by their digests. No job can have this name."""
BUNDLE_PART_BYTES = 900 * 1000
BUNDLE_WAIT_SECONDS = 600

BUNDLE_KEY = "part"
"""Key in a bundle's ConfigMap (binaryData) that holds its bytes."""

IMAGE_VARIABLE = "NEMO_RL_TRAINER_IMAGE"
"""Environment variable of the operator with the trainer image of jobs that name none."""
NETWORK_VARIABLE = "NEMO_RL_OPERATOR_NETWORK"
"""Environment variable of the operator: what else reaches and is reached by the pods of a job; empty: no NetworkPolicy."""
ROLLOUT_IMAGE_VARIABLE = "NEMO_RL_ROLLOUT_IMAGE"
"""Environment variable of the operator with the image of rollout replicas of jobs that name none."""
ROLLOUT_ADDRESSES_VARIABLE = "NEMO_RL_ROLLOUT_REPLICAS"
"""Environment variable of trainer pods: host:port, or several with commas; the addresses of each host are rollout replicas."""
ROLLOUT_MODULE = "nemo_rl.rollout.vllm.replica"
WORKER_MODULE = "nemo_rl.worker"
LAUNCH_MODULE = "nemo_rl.worker.launch"
PROBE_MODULE = "nemo_rl.worker.probe"
FILES_MODULE = "nemo_rl.worker.files"
"""Modules that trainer pods (of one process; of several), their probes and the `x-files` pod run with `python -m`."""
ATTEMPT_VARIABLE = "NEMO_RL_ATTEMPT"
"""Environment variable of trainer pods with the number of their attempt: the fence of the write lease."""
BACKEND_VARIABLE = "NEMO_RL_BACKEND"

SYSTEM_NAMESPACE = "nemo-rl-system"
"""Where the operator is installed, if nobody says otherwise."""
SYSTEM_NAMESPACE_VARIABLE = "NEMO_RL_SYSTEM_NAMESPACE"
INFO_CONFIG_MAP = "nemo-rl-info"
"""There, for every user to read: `version`, `trainerImage` and `trainerPython` of the installation."""


_UID_CHARACTERS = 8
_DIGEST_CHARACTERS = 8
_ROLLOUT_CHARACTERS = 44


class ExitCode(IntEnum):
    """What a trainer process says by its exit code (see the failure table in docs)."""

    DONE = 0
    USER_ERROR = 40
    BAD_DATA = 41
    NON_FINITE = 42
    PREEMPTED = 75


def output_claim(job: str) -> str:
    return f"{job}-output"


def attempt_job(job: str, attempt: int) -> str:
    return f"{job}-{attempt}"


def workload(job: str) -> str:
    """Kueue's Workload of a job: one for all of its attempts."""
    return job


def files_pod(job: str) -> str:
    return f"{job}-files"


def frozen_job(job: str, digest: str = "") -> str:
    """The frozen job; with a digest that of a job that was changed while it was suspended."""
    return f"{job}-job-{digest[:_DIGEST_CHARACTERS]}" if digest else f"{job}-job"


def run_secret(job: str, uid: str) -> str:
    """Of this very job: the operator may not read Secrets, so it could not tell one of an earlier job of the name."""
    return f"{job}-run-{uid[:_UID_CHARACTERS]}"


def rollout(job: str) -> str:
    """StatefulSet and Service of the rollout replicas, whose pods add their number. The controller puts it with a digest of
    its own into a label of 63 characters, so that a long name is cut, and told apart by a digest."""
    if len(job) > _ROLLOUT_CHARACTERS:
        job = f"{job[: _ROLLOUT_CHARACTERS - 9]}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
    return f"{job}-rollout"


def network_policy(job: str, uid: str) -> str:
    return f"{job}-net-{uid[:_UID_CHARACTERS]}"


def device_claim(number: int) -> str:
    """Of the claims of devices of a pod, the one with this number, as pod and container name it."""
    return f"devices-{number}"


def stored_bundle(sha256: str) -> str:
    """Where below output.uri the archive with this digest is."""
    return f"{STORED_BUNDLES}/{sha256}.tar.gz"


def bundle_part(index: int) -> str:
    """File name of the part with this index under BUNDLE_DIR/<bundle>; in sorted order they make the archive."""
    return f"{index:03d}"


DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
"""Endings of files of rows that are read, each also with .gz behind it."""
DATA_FILE_NAMES = tuple(suffix + end for suffix in DATA_SUFFIXES for end in ("", ".gz"))
"""How the name of a file of rows may end."""
