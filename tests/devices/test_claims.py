"""Devices by claims (DRA), by a real driver: each pod gets claims of its own, prepared on its node, and gives them back.

The driver's devices are environment variables, by CDI. Where the container runtime knows no CDI (containerd before 1.7), the test
reads what the driver wrote for it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from e2e.kubectl import Kubectl, Object, eventually
from e2e.scene import SECONDS, Scene, TrainingJob
from e2e.test_fields import GO, everything, look, taken
from lab import dra
from lab.dra import template

GPUS, NIC = "lab-gpus", "lab-nic"
ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"
SEEN = {"user_MODEL": "lab"}
"""What the templates' parameters become in the container, by the driver."""


def claims(place: Scene) -> dict[str, Object]:
    """The claims of the namespace, by their uids."""
    return {found["metadata"]["uid"]: found for found in place.kubectl.items("resourceclaims")}


def claims_of(place: Scene, pod: Object) -> list[Object]:
    """The claims that were made for a pod, in the order of spec.resources.claims."""
    names = {entry["name"]: entry["resourceClaimName"] for entry in pod["status"].get("resourceClaimStatuses") or ()}
    return [place.kubectl.json("resourceclaim", names[entry["name"]]) for entry in pod["spec"]["resourceClaims"]]


def devices_of(claim: Object) -> list[str]:
    """The devices that the scheduler chose, all of them the driver's and the lab's node's."""
    results = claim["status"]["allocation"]["devices"]["results"]
    assert {found["driver"] for found in results} == {dra.DRIVER}
    return sorted(found["device"] for found in results)


def prepared(claim: Object) -> list[str]:
    """The variables that the driver wrote for the containers of a claim, when the kubelet had it prepare the claim."""
    found: list[str] = []
    for file in dra.files(claim["metadata"]["uid"]):
        for device in json.loads(file.read_text())["devices"]:
            found += device["containerEdits"]["env"]
    return found


def knows_cdi() -> bool:
    """Whether the runtime of the node's containers does."""
    version = Kubectl().items("nodes")[0]["status"]["nodeInfo"]["containerRuntimeVersion"]
    major, minor = re.fullmatch(r"containerd://(\d+)\.(\d+).*", version).groups()  # type: ignore[union-attr]
    return (int(major), int(minor)) >= (1, 7)


def reached_the_pod(place: Scene, job: TrainingJob, counts: list[int], attempt: int = 1) -> list[str]:
    """The pod's claims hold so many devices each, prepared for its container; the claims' uids."""
    pod = job.pod(attempt=attempt)
    found = claims_of(place, pod)
    taken_devices = [device for claim in found for device in devices_of(claim)]
    assert [len(devices_of(claim)) for claim in found] == counts
    assert len(set(taken_devices)) == sum(counts), "no device twice"
    environment = json.loads(job.execute("python", "-c", ENVIRONMENT, attempt=attempt))
    for claim in found:
        (owner,) = claim["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Pod", pod["metadata"]["uid"]), "a claim of its own"
        assert [user["uid"] for user in claim["status"]["reservedFor"]] == [pod["metadata"]["uid"]]
        variables = dict(entry.split("=", 1) for entry in prepared(claim))
        assert variables.items() >= SEEN.items()
        assert len(variables) == 2, "the parameter, and that the claim is there"
        assert (environment.items() >= variables.items()) == knows_cdi()
    return [claim["metadata"]["uid"] for claim in found]


def given_back(place: Scene, uids: list[str]) -> None:
    """The claims are gone or free again, and nothing of them is left on the node."""

    def free() -> bool:
        there = claims(place)
        return not any(there[uid].get("status", {}).get("allocation") for uid in uids if uid in there)

    eventually(free, "the claims are given back", SECONDS)
    eventually(lambda: not any(dra.files(uid) for uid in uids), "they are unprepared", SECONDS)


def test_a_job_with_all_that_the_policy_allows_trains_with_a_device_of_a_claim(
    place: Scene, devices: None, driver: None
) -> None:
    place.kubectl.apply(template(NIC, 1))
    job = taken(place, everything(place, "everything", claims=[{"template": NIC}]))
    job.reached(1)
    look(job)
    uids = reached_the_pod(place, job, [1])
    job.execute("touch", GO)
    status = job.phase("Succeeded")
    assert (status["result"]["totalSteps"], status["attempt"]) == (40, 1)
    given_back(place, uids)


def test_gpus_of_a_claim_are_those_of_the_attempt_and_the_next_has_claims_of_its_own(
    place: Scene, driver: None
) -> None:
    place.kubectl.apply(template(GPUS, 2), template(NIC, 1))
    asked: dict[str, Any] = {"gpusPerNode": 2, "claims": [{"template": GPUS, "gpus": True}, {"template": NIC}]}
    job = taken(place, place.manifests.grpo("claimed", steps=1000, pause=0.1, resources=asked))
    job.reached(1)
    limits = job.pod()["spec"]["containers"][0]["resources"].get("limits") or {}
    assert not [name for name in limits if "/" in name], "no nvidia.com/gpu besides"
    first = reached_the_pod(place, job, [2, 1])
    job.kill_worker()
    job.until(lambda status: status["attempt"] == 2 and status["phase"] == "Running", "attempt 2 runs")
    second = reached_the_pod(place, job, [2, 1], attempt=2)
    assert not {*first} & {*second}
    given_back(place, first)
    job.patch(suspend=True)
    job.phase("Suspended")
    given_back(place, second)
