"""Manifests: a compose file, and for KServe a ServingRuntime with its InferenceService.

Cores, memory and admission belong together: the server derives its layout from the cores that it may use, so the limit
on CPUs is what the Plan was measured with. Requests equal limits: that is Kubernetes' class Guaranteed, to which the
static CPU manager gives cores of its own.

Sources: kserve/kserve, config/crd/full; compose-spec, schema/compose-spec.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from rushhour.cluster.container import USER
from rushhour.cluster.deployment import DRAIN_DELAY_S, Deployment
from rushhour.cluster.yaml import Value, document

_HEADER: Final = "# Made by `rushhour export`"
_READY, _LIVE = "/v2/health/ready", "/v2/health/live"
_FORMAT: Final = "rushhour"
_KSERVE: Final = "serving.kserve.io"
_TMP_MIB: Final = 64


def is_manifest(content: bytes) -> bool:
    """Whether a file was written by this module."""
    return content.startswith(_HEADER.encode())


def kserve_file(deployment: Deployment) -> str:
    """The ServingRuntime and the InferenceService of a deployment, as one YAML file."""
    note = (
        f"{_HEADER}: kubectl apply -f FILE\n"
        f"# CPU, memory, cells, streams, threads and admission are one answer, measured together: change none alone.\n"
    )
    return note + document(_runtime(deployment)) + "---\n" + document(_service(deployment))


def compose_file(deployment: Deployment, *, context: Path | None = None, beside: Path | None = None) -> str:
    """The compose file of a deployment.

    Args:
        deployment: what is served, and how.
        context: of the container, where the image is to be built from it.
        beside: the folder that the compose file is in: the context is named relative to it.
    """
    ports = [deployment.port] if deployment.grpc_port is None else [deployment.port, deployment.grpc_port]
    resources: Value = {"cpus": str(deployment.cpus), "memory": f"{deployment.memory_mib}M"}
    service: dict[str, Value] = {"image": deployment.image}
    if context is not None:
        place = os.path.relpath(context.absolute(), (beside or Path()).absolute())
        service["build"] = {"context": place if place.startswith(".") else f"./{place}"}
    service |= {
        "command": ["--drain-delay=0s"],
        "ports": [_published(port, deployment.replicas) for port in ports],
        "user": USER,
        "read_only": True,
        "tmpfs": [f"/tmp:size={_TMP_MIB}m"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "stop_grace_period": f"{deployment.grace_s(0)}s",
        "restart": "unless-stopped",
        "labels": {f"rushhour.{name}": value for name, value in deployment.facts.items()},
        "deploy": {
            "replicas": deployment.replicas,
            "resources": {"limits": resources, "reservations": resources},
        },
    }
    note = f"{_HEADER}: docker compose -f FILE up\n# Ports are published on this machine alone.\n"
    return note + document({"name": deployment.name, "services": {deployment.name: service}})


def _published(port: int, replicas: int) -> str:
    """A port of the container, on loopback: replicas take the ports that follow."""
    last = port + replicas - 1
    return f"127.0.0.1:{port}:{port}" if last == port else f"127.0.0.1:{port}-{last}:{port}"


def _resources(deployment: Deployment) -> dict[str, Value]:
    amount: Value = {"cpu": str(deployment.cpus), "memory": f"{deployment.memory_mib}Mi"}
    return {"requests": amount, "limits": amount}


def _runtime(deployment: Deployment) -> dict[str, Value]:
    port = deployment.port
    named = [] if deployment.name == deployment.model else [f"--model-name={deployment.name}"]
    container: dict[str, Value] = {
        "name": "kserve-container",
        "image": deployment.image,
        "args": [f"--drain-delay={DRAIN_DELAY_S}s", *named],
        "ports": [{"name": "http1", "containerPort": port, "protocol": "TCP"}],
        "resources": _resources(deployment),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": int(USER.partition(":")[0]),
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": {"httpGet": {"path": _READY, "port": port}, "periodSeconds": 1, "failureThreshold": 120},
        "readinessProbe": {"httpGet": {"path": _READY, "port": port}, "periodSeconds": 2, "failureThreshold": 1},
        "livenessProbe": {"httpGet": {"path": _LIVE, "port": port}, "periodSeconds": 10, "timeoutSeconds": 5},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "apiVersion": f"{_KSERVE}/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": deployment.name},
        "spec": {
            "annotations": {"prometheus.kserve.io/port": str(port), "prometheus.kserve.io/path": "/metrics"},
            "supportedModelFormats": [{"name": _FORMAT, "version": "1", "autoSelect": False}],
            "protocolVersions": ["v2"],
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": f"{_TMP_MIB}Mi"}}],
        },
    }


def _service(deployment: Deployment) -> dict[str, Value]:
    return {
        "apiVersion": f"{_KSERVE}/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": deployment.name,
            "annotations": {
                f"{_KSERVE}/deploymentMode": "RawDeployment",
                f"{_KSERVE}/autoscalerClass": "none",
                **{f"rushhour/{name}": value for name, value in deployment.facts.items()},
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": deployment.replicas,
                "maxReplicas": deployment.replicas,
                "deploymentStrategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
                },
                "terminationGracePeriodSeconds": deployment.grace_s(DRAIN_DELAY_S),
                "automountServiceAccountToken": False,
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "model": {
                    "runtime": deployment.name,
                    "modelFormat": {"name": _FORMAT, "version": "1"},
                    "protocolVersion": "v2",
                    "resources": _resources(deployment),
                },
            }
        },
    }
