"""Configuration files and command lines of the node's programs; the reasons of unusual flags are in README.md."""

from __future__ import annotations

import json
import resource
from typing import Any

from lab import pki
from lab.programs import path
from lab.settings import (
    CGROUP,
    CLUSTER_DOMAIN,
    CNI_BIN,
    DNS_IP,
    HOST_PORT,
    KUBECONFIG,
    KUBERNETES_IP,
    NODE,
    NODE_IP,
    PAUSE_IMAGE,
    PKI,
    POD_CIDR,
    RUN,
    SERVICE_CIDR,
    SOCKET,
    STORE,
)

CLIENTS = {
    "admin": f"{pki.ADMINISTRATORS}/CN=lab-admin",
    "apiserver-kubelet-client": f"{pki.ADMINISTRATORS}/CN=apiserver-kubelet-client",
    "kube-controller-manager": "/CN=system:kube-controller-manager",
    "kube-scheduler": "/CN=system:kube-scheduler",
    "kube-proxy": "/CN=system:kube-proxy",
    "kubelet": f"/O=system:nodes/CN=system:node:{NODE}",
}
WITH_KUBECONFIG = ("kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet")
FIRST = ("etcd", "containerd", "kube-apiserver")
"""Started at once; the others wait until the API server is ready."""
STOP_ORDER = ("kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
CONTAINERD_TOML = """version = 2
root = "{store}"
state = "{run}/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{run}/cni"
"""


def make_keys() -> None:
    service = f"kubernetes.default.svc.{CLUSTER_DOMAIN}".split(".")
    # kubernetes, kubernetes.default, kubernetes.default.svc, and the whole name
    dns = [".".join(service[:count]) for count in (1, 2, 3, len(service))]
    addresses = ["127.0.0.1", KUBERNETES_IP, NODE_IP]
    server_names = [*(f"IP:{a}" for a in addresses), "DNS:localhost", *(f"DNS:{d}" for d in dns)]
    pki.cluster(PKI, server_names, CLIENTS, [f"DNS:{NODE}", f"IP:{NODE_IP}"])


def write_files() -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    for component in WITH_KUBECONFIG:
        (RUN / f"{component}.kubeconfig").write_text(pki.kubeconfig(PKI, component, f"https://{NODE_IP}:6443"))
    KUBECONFIG.write_text(pki.kubeconfig(PKI, "admin", f"https://127.0.0.1:{HOST_PORT}"))
    KUBECONFIG.chmod(0o600)
    (RUN / "resolv.conf").write_text("# no name server: the lab resolves only its own names\n")
    (RUN / "cni").mkdir(exist_ok=True)
    (RUN / "cni/10-lab.conflist").write_text(json.dumps(_cni()))
    toml = CONTAINERD_TOML.format(store=STORE, run=RUN, socket=SOCKET, pause=PAUSE_IMAGE, cni=CNI_BIN)
    (RUN / "containerd.toml").write_text(toml)
    (RUN / "kubelet.yaml").write_text(json.dumps(_kubelet(), indent=1))
    (RUN / "kube-proxy.yaml").write_text(json.dumps(_proxy(), indent=1))


def _cni() -> dict[str, Any]:
    ipam = {
        "type": "host-local",
        "dataDir": "/var/lib/cni/networks",
        "ranges": [[{"subnet": POD_CIDR}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "lab", "plugins": [bridge, portmap]}


def _kubelet() -> dict[str, Any]:
    free = {"memory.available": "200Mi"} | dict.fromkeys(
        ["nodefs.available", "imagefs.available", "nodefs.inodesFree", "imagefs.inodesFree"], "1%"
    )
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{PKI}/kubelet-server.crt",
        "tlsPrivateKeyFile": f"{PKI}/kubelet-server.key",
        "address": "0.0.0.0",
        "healthzBindAddress": "127.0.0.1",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}",
        "kubeletCgroups": f"/{CGROUP}/node",
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": ["pods"],
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [DNS_IP],
        "resolvConf": f"{RUN}/resolv.conf",
        "podLogsDir": "/var/log/pods",
        "volumePluginDir": f"{RUN}/volume-plugins",
        "oomScoreAdj": 0,
        "maxOpenFiles": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "evictionHard": free,
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "10s",
        "serializeImagePulls": False,
        "registerNode": True,
        "shutdownGracePeriod": "0s",
    }


def _proxy() -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{RUN}/kube-proxy.kubeconfig"},
        "hostnameOverride": NODE,
        "mode": "iptables",
        "clusterCIDR": POD_CIDR,
        "oomScoreAdj": 0,
        "iptables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
        # nf_conntrack_max belongs to the first network namespace and is read-only in this one
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    }


def commands() -> dict[str, list[str]]:
    """Every program's command line."""
    etcd = "http://127.0.0.1:2379"
    peer = "http://127.0.0.1:2380"
    return {
        "etcd": [
            str(path("etcd")),
            "--name=lab",
            f"--data-dir={RUN}/etcd",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=lab={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ],
        "containerd": ["containerd", "--config", f"{RUN}/containerd.toml"],
        "kube-apiserver": _api_server(etcd),
        "kube-controller-manager": [
            str(path("kube-controller-manager")),
            *_kubeconfig_flags("kube-controller-manager"),
            f"--cluster-signing-cert-file={PKI}/ca.crt",
            f"--cluster-signing-key-file={PKI}/ca.key",
            f"--root-ca-file={PKI}/ca.crt",
            f"--service-account-private-key-file={PKI}/sa.key",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            "--controllers=*,-nodeipam,-cloud-node-lifecycle,-service-lb-controller",
            "--enable-hostpath-provisioner=true",
            f"--flex-volume-plugin-dir={RUN}/volume-plugins",
        ],
        "kube-scheduler": [
            str(path("kube-scheduler")),
            *_kubeconfig_flags("kube-scheduler"),
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ],
        "kubelet": [
            str(path("kubelet")),
            f"--config={RUN}/kubelet.yaml",
            f"--kubeconfig={RUN}/kubelet.kubeconfig",
            f"--root-dir={RUN}/kubelet",
            f"--hostname-override={NODE}",
            f"--node-ip={NODE_IP}",
        ],
        "kube-proxy": [str(path("kube-proxy")), f"--config={RUN}/kube-proxy.yaml"],
    }


def _kubeconfig_flags(component: str) -> list[str]:
    flags = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [f"--{flag}={RUN}/{component}.kubeconfig" for flag in flags]


def _api_server(etcd: str) -> list[str]:
    return [
        str(path("kube-apiserver")),
        f"--etcd-servers={etcd}",
        f"--advertise-address={NODE_IP}",
        "--bind-address=0.0.0.0",
        "--secure-port=6443",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
        f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={PKI}/front-proxy-client.crt",
        f"--proxy-client-key-file={PKI}/front-proxy-client.key",
        "--allow-privileged=true",
    ]
