"""The page of a real cluster's jobs in a real browser: whose rights, what is said without any, outages, and 1,000 jobs."""

from __future__ import annotations

import base64
import concurrent.futures
import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, expect

from cluster.api import Object, eventually
from cluster.manifests import job
from cluster.pod_logs import log_node
from cluster.server import Cluster
from nemo_rl.job import names
from ui.conftest import PATIENCE, PHONE, Server

Visit = Callable[..., Page]
Ui = Callable[..., Server]
pytestmark = pytest.mark.timeout(1800)
expect.set_options(timeout=1000 * PATIENCE)
EVIL = "<script>window.owned=1</script><img src=x onerror='window.owned=1'>"


class Team:
    """A namespace with jobs whose status the test writes, as the operator would."""

    def __init__(self, cluster: Cluster, word: str) -> None:
        self.cluster, self.api = cluster, cluster.api
        self.namespace = f"ui-{os.getpid()}-{word}"
        self.api.create("namespaces", None, {"metadata": {"name": self.namespace}})
        eventually(lambda: self.api.find("serviceaccounts", self.namespace, "default"), "the default service account")

    def job(self, name: str, **status: Any) -> Object:
        made = self.api.create(names.PLURAL, self.namespace, job(name))
        self.tell(name, **status)
        return made

    def tell(self, name: str, **status: Any) -> None:
        told = {"status": {"observedGeneration": 1} | status}
        self.api.patch(names.PLURAL, self.namespace, name, told, "status")

    def kubectl(self, *words: str, stdin: str = "") -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, stdin=stdin)

    def viewer(self, name: str) -> str:
        """A token of a new service account, which has no rights."""
        self.kubectl("create", "serviceaccount", name)
        return self.kubectl("create", "token", name, "--duration=2h").strip()

    def let_view(self, name: str) -> None:
        """The rights of the chart's role for viewers."""
        rules = [
            {"apiGroups": [names.GROUP], "resources": [names.PLURAL], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list", "watch"]},
        ]
        role = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "view"},
            "rules": rules,
        }
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(role))
        self.kubectl("create", "rolebinding", name, "--role=view", f"--serviceaccount={self.namespace}:{name}")

    def kubeconfig(self, token: str, folder: Path) -> Path:
        content = copy.deepcopy(yaml.safe_load(self.cluster.kubeconfig.read_text()))
        content["users"] = [{"name": user["name"], "user": {"token": token}} for user in content["users"]]
        for context in content["contexts"]:
            context["context"]["namespace"] = self.namespace
        path = folder / "viewer.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path


@pytest.fixture
def team(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Team]:
    made = Team(cluster, re.sub(r"\W|_", "-", request.node.name.removeprefix("test_"))[:30].strip("-"))
    yield made
    made.api.delete("namespaces", None, made.namespace)


def links(page: Page) -> Any:
    return page.locator(".table .row a")


def test_jobs_appear_change_and_go_while_the_page_is_open(ui: Ui, visit: Visit, team: Team) -> None:
    team.job(
        "waiting",
        phase="Pending",
        reason="Unschedulable",
        message="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    )
    page = visit(ui("-n", team.namespace, kubeconfig=team.cluster.kubeconfig).address)
    row = page.locator(".row", has_text="waiting")
    expect(row).to_contain_text("Pending")
    expect(row).to_contain_text("Insufficient nvidia.com/gpu")
    progress = {"step": 5, "totalSteps": 50, "eta": "9m", "metrics": {"reward": "0.25"}}
    team.tell("waiting", phase="Running", reason="Running", message="", progress=progress)
    expect(row).to_contain_text("Running")
    expect(row).to_contain_text("5/50")
    expect(row).to_contain_text("9m left")
    expect(row).to_contain_text("0.25")
    team.job("second", phase="Queued", reason="Queued", message="Waits for the quota of team-a.")
    expect(links(page)).to_have_count(2)
    team.api.delete(names.PLURAL, team.namespace, "second")
    expect(links(page)).to_have_text(["waiting"])


def test_a_job_shows_attempts_causes_curves_samples_and_its_log(
    ui: Ui, visit: Visit, team: Team, tmp_path: Path
) -> None:
    attempts = [
        {
            "number": 1,
            "job": "one-1",
            "cause": "OutOfMemory",
            "counted": True,
            "exitCode": 137,
            "message": f"killed {EVIL}",
        },
        {"number": 2, "job": "one-2", "fromStep": 2},
    ]
    uid = team.job("one", phase="Running", reason="Running", message=f"trains {EVIL}", attempt=2, attempts=attempts)[
        "metadata"
    ]["uid"]
    labels = {names.LABEL_JOB_UID: uid, names.LABEL_COMPONENT: names.COMPONENT_TRAINER}
    with log_node(team.api, f"node-{team.namespace}", tmp_path / "node") as node:
        node.pod(team.namespace, "one-2-0", labels | {names.LABEL_ATTEMPT: "2"})
        node.write(
            "one-2-0", "step=3/50 reward=0.5 loss=0.1", f'sample step=3 reward=0.5 prompt="p" completion="{EVIL}"', EVIL
        )
        page = visit(ui("-n", team.namespace, kubeconfig=team.cluster.kubeconfig).address)
        links(page).click()
        expect(page.get_by_role("region", name="Attempts")).to_contain_text("OutOfMemory")
        expect(page.get_by_role("region", name="Attempts")).to_contain_text(f"killed {EVIL}")
        expect(page.locator("header.job")).to_contain_text(f"trains {EVIL}")
        expect(page.locator("pre.completion")).to_have_text(EVIL)
        expect(page.locator("pre.log")).to_contain_text(EVIL)
        reward = page.locator("[data-metric=reward]")
        expect(reward.locator("canvas")).to_be_visible()
        node.write("one-2-0", "step=4/50 reward=0.75 loss=0.1", second=9)
        expect(reward.locator("figcaption")).to_contain_text("0.5 → 0.75")
        assert page.evaluate("window.owned") is None
        team.api.delete(names.PLURAL, team.namespace, "one")
        expect(page.get_by_role("alert")).to_contain_text("This job is not there")


def test_without_rights_the_page_says_so_and_shows_the_jobs_as_soon_as_there_are(
    ui: Ui, visit: Visit, team: Team, tmp_path: Path
) -> None:
    team.job("one", phase="Running")
    token = team.viewer("newcomer")
    page = visit(ui(kubeconfig=team.kubeconfig(token, tmp_path)).address)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("You have no right to see this")
    expect(alert).to_contain_text(f"You may not list the jobs of namespace {team.namespace}")
    expect(alert).to_contain_text("--clusterrole=nemo-rl-view")
    expect(links(page)).to_have_count(0)
    assert "Traceback" not in page.content()
    team.let_view("newcomer")
    expect(links(page)).to_have_text(["one"])
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Namespace").fill("kube-system")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_contain_text("the jobs of namespace kube-system")
    expect(links(page)).to_have_count(0)


def test_in_a_cluster_each_viewer_brings_his_own_token(ui: Ui, visit: Visit, team: Team, tmp_path: Path) -> None:
    team.job("one", phase="Running")
    known, unknown = team.viewer("known"), team.viewer("unknown")
    team.let_view("known")
    content = yaml.safe_load(team.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = tmp_path / "authority.crt"
    data = content.get("certificate-authority-data")
    authority.write_bytes(base64.b64decode(data) if data else Path(content["certificate-authority"]).read_bytes())
    words = [
        "--viewer-tokens",
        "--api-server",
        content["server"],
        "--certificate-authority",
        str(authority),
        "-n",
        team.namespace,
    ]
    # an administrator's kubeconfig is at hand, and must not be used
    server = ui(*words, kubeconfig=team.cluster.kubeconfig)
    assert "token" not in server.address
    page = visit(server.address, **PHONE)
    expect(page.get_by_role("alert")).to_contain_text("Sign in with a token of the cluster")
    expect(links(page)).to_have_count(0)
    for token, words_ in ((unknown, "You have no right"), ("not.a.token", "The cluster does not know you")):
        page.get_by_label("Token of the cluster").fill(token)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text(words_)
        expect(links(page)).to_have_count(0)
        if token == unknown:
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_role("alert")).to_contain_text("Sign in with a token")
    page.get_by_label("Token of the cluster").fill(known)
    page.get_by_role("button", name="Sign in").click()
    expect(links(page)).to_have_text(["one"])
    assert known not in page.content()
    page.get_by_role("button", name="Sign out").click()
    expect(links(page)).to_have_count(0)


def test_an_api_server_that_goes_and_comes_back(ui: Ui, visit: Visit, team: Team) -> None:
    plane = team.cluster.plane
    if plane is None:
        pytest.skip("the API server is somebody else's")
    team.job("one", phase="Running")
    page = visit(ui("-n", team.namespace, kubeconfig=team.cluster.kubeconfig).address)
    expect(links(page)).to_have_text(["one"])
    plane.kill("kube-apiserver")
    try:
        expect(page.get_by_role("status")).to_contain_text("The cluster does not answer")
        expect(page.get_by_role("status")).to_contain_text("Shown is what was there at")
        expect(links(page)).to_have_text(["one"])
    finally:
        plane.resume()
    expect(page.get_by_role("status")).to_have_count(0)
    team.tell("one", phase="Succeeded")
    expect(page.locator(".row", has_text="one")).to_contain_text("Succeeded")


LAID_OUT = """() => [...document.querySelectorAll(".row .cell-steps")]
  .filter(cell => cell.checkVisibility({contentVisibilityAuto: true})).length"""
FRAMES = """async () => {
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let n = 0; n < 40; n++) {
    window.scrollBy(0, 400);
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  times.sort((a, b) => a - b);
  return times[20];
}"""


def test_a_thousand_jobs_are_listed_filtered_and_scrolled(ui: Ui, visit: Visit, team: Team) -> None:
    phases = ("Running", "Queued", "Failed", "Succeeded")

    def make(number: int) -> None:
        phase = phases[number % 4]
        message = "Waits for quota." if phase == "Queued" else ""
        team.job(
            f"sweep-{number:04d}",
            phase=phase,
            reason=phase,
            message=message,
            progress={"step": number, "totalSteps": 1000},
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(1000)))
    page = visit(ui("-n", team.namespace, kubeconfig=team.cluster.kubeconfig).address)
    expect(links(page)).to_have_count(1000)
    expect(page.get_by_role("button", name=re.compile("^All"))).to_have_text("All 1000")
    # whatever is out of sight is neither laid out nor painted, so that scrolling costs the same for any number of jobs
    for _ in range(3):
        assert 0 < page.evaluate(LAID_OUT) < 150
        print(f"a frame while scrolling: {page.evaluate(FRAMES):.1f} ms")
    assert page.evaluate("window.scrollY") > 3000
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#filter").fill("sweep-004")
    expect(links(page)).to_have_count(10)
    page.locator("#filter").fill("")
    page.get_by_role("button", name="Queued 250").click()
    expect(links(page)).to_have_count(250)
    team.tell("sweep-0001", phase="Running", progress={"step": 2, "totalSteps": 1000})
    expect(page.get_by_role("button", name="Queued 249")).to_be_visible()
    expect(links(page)).to_have_count(249)
