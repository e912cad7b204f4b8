"""The web page as the chart runs it, in a pod of a real cluster (the lab): its image, its Deployment, and a viewer's token."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
import uuid
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from charts import CHART, ROOT, helm_program
from cluster.manifests import job
from e2e.kubectl import Kubectl, eventually
from e2e.scene import RESTRICTED, SECONDS
from ui.conftest import PATIENCE, PHONE

Visit = Callable[..., Page]
expect.set_options(timeout=1000 * PATIENCE)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE = os.environ.get("NEMO_RL_TEST_UI_IMAGE", f"localhost/nemo-rl-ui:{VERSION}")
"""`make image-ui` builds it, and in the lab `make e2e-using`."""


class Deployed:
    """A namespace where only restricted pods may run, with the page's part of the chart, and kubectl's way to it."""

    def __init__(self) -> None:
        self.namespace = f"e2e-page-{uuid.uuid4().hex[:6]}"
        self.kubectl = Kubectl(self.namespace)

    def open(self) -> str:
        metadata = {"name": self.namespace, "labels": {RESTRICTED: "restricted"}}
        Kubectl().apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        repository, _, tag = IMAGE.rpartition(":")
        values = ["ui.enabled=true", f"ui.image.repository={repository}", f"ui.image.tag={tag}"]
        command = [helm_program(), "template", "page", str(CHART), "--namespace", self.namespace]
        command += ["--show-only", "templates/ui.yaml", *(word for value in values for word in ("--set", value))]
        made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
        self.kubectl("apply", "-f", "-", stdin=made)
        deployment, service = (self.kubectl("get", kind, "-o", "name").strip() for kind in ("deployments", "services"))
        try:
            self.kubectl("rollout", "status", deployment, f"--timeout={SECONDS:.0f}s", seconds=SECONDS + 10)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.kubectl('describe', 'pods', check=False)}") from error
        self.way = self.kubectl.stream("port-forward", service, ":80")
        assert self.way.stdout is not None
        line = self.way.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", line)
        assert found, line
        return f"http://{found[0]}/"

    def viewer(self, name: str, *verbs: str) -> str:
        """A token of a new service account with these rights to jobs and the logs of pods."""
        self.kubectl("create", "serviceaccount", name)
        if verbs:
            resources = "rltrainingjobs.nemo-rl.io,pods,pods/log"
            self.kubectl("create", "role", name, f"--verb={','.join(verbs)}", f"--resource={resources}")
            self.kubectl("create", "rolebinding", name, f"--role={name}", f"--serviceaccount={self.namespace}:{name}")
        return self.kubectl("create", "token", name, "--duration=1h").strip()

    def close(self) -> None:
        if hasattr(self, "way"):
            self.way.terminate()
        Kubectl()("delete", "namespace", self.namespace, "--wait=false", check=False)


@pytest.fixture
def deployed() -> Iterator[Deployed]:
    made = Deployed()
    yield made
    made.close()


def test_viewers_sign_in_at_the_page_that_the_chart_runs_and_see_what_they_may(
    deployed: Deployed, visit: Visit
) -> None:
    address = deployed.open()
    eventually(
        lambda: "default" in deployed.kubectl("get", "serviceaccounts", check=False), "a service account", SECONDS
    )
    deployed.kubectl.apply(job("waits", suspend=True))
    known, unknown = deployed.viewer("known", "get", "list", "watch"), deployed.viewer("unknown")
    pod = deployed.kubectl.items("pods")[0]
    assert pod["spec"]["automountServiceAccountToken"] is False
    page = visit(address, **PHONE)
    expect(page.get_by_role("alert")).to_contain_text("Sign in with a token of the cluster")
    for token, said in ((unknown, "You have no right"), ("not.a.token", "The cluster does not know you")):
        page.get_by_label("Token of the cluster").fill(token)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text(said)
        expect(page.locator(".table .row a")).to_have_count(0)
        if token == unknown:
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_role("alert")).to_contain_text("Sign in with a token")
    page.get_by_label("Token of the cluster").fill(known)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_label("Namespace").fill(deployed.namespace)
    page.get_by_role("button", name="Show").click()
    expect(page.locator(".table .row a")).to_have_text(["waits"])
    expect(page.locator(".row", has_text="waits")).to_contain_text("Suspended")
    page.locator(".table .row a").click()
    expect(page.locator("h1")).to_have_text("waits")
    expect(page.locator("header.job")).to_contain_text("GRPO")
