"""The operator as the cluster runs it: found by its labels in whatever namespace it was installed."""

from __future__ import annotations

from e2e.kubectl import Kubectl, Object, eventually
from nemo_rl.job import names

SELECTOR = "app.kubernetes.io/name=nemo-rl-operator,app.kubernetes.io/component=operator"
SECONDS = 240.0
CURE = "run `make e2e` without KUBECONFIG, or install charts/nemo-rl-operator in this cluster"


class OperatorPod:
    """The installed operator. AssertionError with the cure where the cluster has none."""

    def __init__(self) -> None:
        found = Kubectl()("get", "crd", names.CRD_NAME, check=False)
        assert names.CRD_NAME in found and "NotFound" not in found, f"no {names.KIND} here: {found.strip()}; {CURE}"
        pods = Kubectl().items("pods", "--all-namespaces", "-l", SELECTOR)
        assert pods, f"no pod with {SELECTOR}; {CURE}"
        self.kubectl = Kubectl(pods[0]["metadata"]["namespace"])

    def pods(self) -> list[Object]:
        return self.kubectl.items("pods", "-l", SELECTOR)

    def ready(self) -> Object | None:
        """The pod that serves, if there is one."""
        for pod in self.pods():
            conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
            if conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]:
                return pod
        return None

    def wait_ready(self) -> Object:
        return dict(eventually(self.ready, "the operator is ready", SECONDS))

    def kill(self) -> str:
        """Ends its pod without warning; the uid of the pod that is gone."""
        pod = self.wait_ready()
        name = pod["metadata"]["name"]
        self.kubectl("delete", "pod", name, "--grace-period=0", "--force")
        return str(pod["metadata"]["uid"])

    def log(self, lines: int = 60) -> str:
        return self.kubectl("logs", "-l", SELECTOR, f"--tail={lines}", "--prefix", check=False)
