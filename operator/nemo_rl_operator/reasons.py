"""Reasons (one word, for programs) of conditions, phases and Events, with the sentences that go with them."""

from __future__ import annotations

# phases and conditions
ACCEPTED = "Accepted"
ACCEPTED_MESSAGE = "the specification is valid"
CHANGED = "ChangeNotTaken"
CHANGED_MESSAGE = (
    "the specification was changed after the job had started, and the job goes on as it was then ({changed}); set it "
    "back, or delete the job and create a new one. The policy that refuses such changes is missing in this cluster: "
    "nemo-rl crd | kubectl apply --server-side -f -"
)
STARTING = "Starting"
STARTING_MESSAGE = "attempt {attempt} starts"
PODS_STARTING_MESSAGE = "{running} of {nodes} pods run; waiting for {others}"
RUNNING = "Training"
RUNNING_MESSAGE = "attempt {attempt} trains on {pods}"
SUCCEEDED = "Succeeded"
SUCCEEDED_MESSAGE = "training ended after {steps} steps"
SUSPENDED = "Suspended"
SUSPENDED_MESSAGE = "suspended; set spec.suspend to false to go on from the last checkpoint"
BUDGET_MESSAGE = (
    "suspended: {spent:.4g} GPU hours are used, and budget.gpuHours is {limit:g}; raise it to go on from the last checkpoint: "
    'kubectl patch rlj {name} --type=merge -p \'{{"spec":{{"budget":{{"gpuHours":{more:g}}}}}}}\''
)
STOPPING = "Stopping"
STOPPING_MESSAGE = "suspending: the pods save a checkpoint and end"
STOPPING_BUDGET_MESSAGE = "its budget of {limit:g} GPU hours is spent: the pods save a checkpoint and end"
RESUMED = "Resumed"
ENDING = "WaitingForPods"
ENDING_MESSAGE = "waiting for pod {pod} of attempt {attempt} to end"
ENDING_MORE_MESSAGE = " and {more} more"
ENDING_JOB_MESSAGE = "waiting for Job {job} to be gone"
POD_FAILED = "PodFailed"
POD_FAILED_MESSAGE = "pod {pod} ended: {why}"
POD_FAILED_WAIT_MESSAGE = "; waiting for the other pods to end ({left} of {nodes} left)"
DELETED_MESSAGE = "pod {pod} is being deleted{reason}; training goes on when it has ended"
LOST = "PodLost"
LOST_MESSAGE = (
    "pod {pod} should have ended at {time}, and its node does not report that it has; if the node is down for good, "
    "delete the node, or the pod: kubectl delete pod {pod} --force"
)
FORCED_MESSAGE = "pod {pod} was deleted by force, and its node does not report its end"
QUEUED = "Queued"
QUEUED_MESSAGE = "waits in queue {queue}"
RESTORED = "Restored"
RESTORED_MESSAGE = (
    "restored from a backup without its status, so it may have been trained to its end before; to train it now: "
    "kubectl label rlj {name} {label}-"
)
HELD_MESSAGE = "its Job {job} is suspended, and not by this operator; whoever suspended it must resume it"
UNQUEUED_MESSAGE = (
    "Kueue holds its Job {job}, for it manages all Jobs of this namespace and this job names no queue; name one: "
    "kubectl label rlj {name} kueue.x-k8s.io/queue-name=QUEUE"
)
UNKNOWN_TO_KUEUE_MESSAGE = (
    "Kueue admitted the job, but holds its Job {job} as well, since it does not know what made it; "
    "an administrator must add RLTrainingJob.v1alpha1.nemo-rl.io to integrations.externalFrameworks in its configuration"
)
NO_KUEUE = "but this cluster has no Kueue; install it, or remove the label kueue.x-k8s.io/queue-name"
WORKLOAD_ENDING = "its Workload of an earlier run is being deleted"
DEACTIVATED = "its Workload {name} is deactivated ({why}); set spec.active of the Workload to true to queue it again"
PREEMPTED = "Preempted"
PREEMPTED_MESSAGE = "Kueue takes the quota back ({why}); the pods save a checkpoint and end"
WITHOUT_WORKLOAD = "its Workload was deleted"
BACKOFF = "BackOff"
BACKOFF_MESSAGE = "attempt {attempt} ended: {cause}; attempt {next} starts at {time}"
BUNDLES = "WaitingForBundles"
BUNDLES_MESSAGE = "waiting for {missing} of {total} bundle parts"
BUNDLES_FAILED_MESSAGE = (
    "{missing} of {total} bundle parts were not uploaded within {minutes} minutes (first missing: ConfigMap {first}); "
    "was the client interrupted? Submit the job again"
)
STARTUP_MESSAGE = (
    "not all pods ran within startupTimeoutSeconds ({limit} s): waited for {late}; the nodes are given back, and the start is "
    "repeated. It does not count"
)
NEVER_RAN_MESSAGE = "only {ran} of {nodes} pods ever ran, without {late}; the others gave up: {message}"
NODE_LOST_MESSAGE = (
    "pod {pod} should have ended by {time}, and its node is silent; onNodeLost is replace, so the next attempt starts, and "
    "whatever that pod still writes is kept out of the output"
)
UNREADABLE_MESSAGE = "; its progress cannot be read ({why}): does a NetworkPolicy or a mesh keep the operator from port {port} of the pod?"
DEADLINE_MESSAGE = "ran {seconds} s in all, and activeDeadlineSeconds is {limit}; raise it, or train fewer steps"
FRUITLESS_MESSAGE = "the {row}th attempt in a row that ended without a new checkpoint, so this one counts: {message}"
BACKOFF_LIMIT_MESSAGE = "{failures} attempts failed and backoffLimit is {limit}; the last one: {message}"
CONFLICT_MESSAGE = "{message}; waited {minutes} minutes"

# pending
PODS_PENDING = "WaitingForPods"
PODS_PENDING_MESSAGE = "waiting for the Job controller to make the pods"
UNSCHEDULABLE = "Unschedulable"
UNBOUND_CLAIM = "UnboundClaim"
MISSING_CLAIM = "MissingClaim"
QUOTA = "QuotaExceeded"
PULL = "ImagePull"
CONFIG = "MissingReference"
INIT_CONTAINER = "InitContainer"
MOUNT = "VolumeNotReady"
POD_REFUSED = "PodRefused"
NO_IMAGE = "NoImage"
NO_IMAGE_MESSAGE = (
    "the job names no image and the operator has no default; give spec.image, or start the operator with --image"
)
REFUSED = "Refused"
NO_IMAGE_VOLUMES_MESSAGE = (
    "the API server does not keep volumes of images, which spec.volumes asks for ({volumes}): they need Kubernetes 1.35, or "
    "1.33 with the feature gate ImageVolume; use a persistentVolumeClaim, or put the files into spec.image"
)
RUNTIME_OF_IMAGE_VOLUMES = (
    "; if nothing else is wrong there, the node's container runtime does not know volumes of images ({volumes}): they need containerd "
    "2.1 or CRI-O 1.31; use a persistentVolumeClaim, or put the files into spec.image"
)
API_FAILS = "ApiCallFails"
UNBLOCKED = "Resolved"
SERVED = "Serving"
HELD_INVALID_MESSAGE = (
    "no further attempt is started, since this operator cannot read the job: {problem}; run an operator of the version "
    "that the job was made for"
)
UNKNOWN_MESSAGE = "{accepted}; ignored are fields that this operator does not know: {fields}"

# rollout replicas
REPLICAS_MESSAGE = "; {ready} of {replicas} rollout replicas are ready"
REPLICAS_PATTERN = r"; \d+ of \d+ rollout replicas are ready"
REPLICAS_FIRST_MESSAGE = " ({name}: {message})"
REPLICA_ABSENT_MESSAGE = "waiting for the StatefulSet controller to make its pod"
REPLICA_STARTING_MESSAGE = "its pod starts"
REPLICA_LOADING_MESSAGE = "it loads the model, or waits for the trainer"
REPLICA_ENDING_MESSAGE = "its pod is being deleted{reason}"
REPLICA_ENDED_MESSAGE = "{end}, and is started anew (restart {restarts})"
REPLICAS_ENDING_MESSAGE = "suspending: waiting for rollout replica {pod} to end"
NO_ROLLOUT_IMAGE_MESSAGE = (
    "the job asks for rollout replicas, but names no image for them and the operator has no default; give "
    "spec.rollout.image, or start the operator with --rollout-image"
)
REPLICAS_IN_QUEUE_MESSAGE = (
    "jobs in Kueue's queues cannot have rollout replicas, for which no quota is asked; leave spec.rollout.replicas out, or "
    "the label kueue.x-k8s.io/queue-name"
)

# Events
EVENT_REPLICA_LOST = "ReplicaLost"
EVENT_REPLICA_REFUSED = "ReplicaRefused"
EVENT_REPLICA_READY = "ReplicaReady"
EVENT_STARTED = "AttemptStarted"
EVENT_ENDED = "AttemptEnded"
EVENT_CHECKPOINT = "CheckpointSaved"
EVENT_SUSPENDED = "Suspended"
EVENT_SUCCEEDED = "Succeeded"
EVENT_FAILED = "Failed"
