"""What the published schemas allow in the parts of manifests that an export writes, as JSON Schema, in our own words.

Sources: kserve/kserve `config/crd/full` (ServingRuntime v1alpha1, InferenceService v1beta1, Apache-2.0), its constants
and its validation of names; compose-spec `schema/compose-spec.json` (Apache-2.0). A field that is not here is refused:
whoever adds one to an export looks it up there first.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
TRUTH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
DNS_LABEL: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
ANNOTATIONS: Schema = {
    "type": "object",
    "additionalProperties": TEXT,
    "propertyNames": {"pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"},
}


def fields(*required: str, **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def items(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


PROBE = fields(
    "httpGet",
    httpGet=fields("port", path=TEXT, port=WHOLE, scheme=TEXT),
    periodSeconds=WHOLE,
    timeoutSeconds=WHOLE,
    failureThreshold=WHOLE,
    initialDelaySeconds=WHOLE,
)
AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields(requests=AMOUNTS, limits=AMOUNTS)
CONTAINER = fields(
    "name",
    name=one_of("kserve-container"),
    image=TEXT,
    args=items(TEXT),
    ports=items(fields("containerPort", containerPort=WHOLE, name=TEXT, protocol=one_of("TCP", "UDP", "SCTP"))),
    resources=RESOURCES,
    securityContext=fields(
        runAsNonRoot=TRUTH,
        runAsUser=WHOLE,
        privileged=TRUTH,
        allowPrivilegeEscalation=TRUTH,
        readOnlyRootFilesystem=TRUTH,
        capabilities=fields(drop=items(TEXT), add=items(TEXT)),
    ),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    volumeMounts=items(fields("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=TRUTH)),
)
SERVING_RUNTIME = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("serving.kserve.io/v1alpha1"),
    kind=one_of("ServingRuntime"),
    metadata=fields("name", name=DNS_LABEL, annotations=ANNOTATIONS, labels=TEXTS),
    spec=fields(
        "containers",
        annotations=ANNOTATIONS,
        supportedModelFormats=items(
            fields("name", name=TEXT, version=TEXT, autoSelect=TRUTH, priority={"type": "integer", "minimum": 1})
        ),
        protocolVersions=items(one_of("v1", "v2", "grpc-v1", "grpc-v2")),
        containers=items(CONTAINER),
        volumes=items(fields("name", name=TEXT, emptyDir=fields(medium=TEXT, sizeLimit=QUANTITY))),
    ),
)
INFERENCE_SERVICE = fields(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("serving.kserve.io/v1beta1"),
    kind=one_of("InferenceService"),
    metadata=fields(
        "name",
        name=DNS_LABEL,
        annotations={
            **ANNOTATIONS,
            "properties": {
                "serving.kserve.io/deploymentMode": one_of("RawDeployment", "Standard", "Knative", "Serverless"),
                "serving.kserve.io/autoscalerClass": one_of("hpa", "keda", "external", "none"),
            },
        },
    ),
    spec=fields(
        "predictor",
        predictor=fields(
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            deploymentStrategy=fields(
                type=one_of("RollingUpdate", "Recreate"),
                rollingUpdate=fields(
                    maxUnavailable={"type": ["integer", "string"]}, maxSurge={"type": ["integer", "string"]}
                ),
            ),
            terminationGracePeriodSeconds=WHOLE,
            automountServiceAccountToken=TRUTH,
            securityContext=fields(runAsNonRoot=TRUTH, seccompProfile=fields("type", type=TEXT, localhostProfile=TEXT)),
            model=fields(
                runtime=TEXT,
                modelFormat=fields("name", name=TEXT, version=TEXT),
                protocolVersion=one_of("v1", "v2", "grpc-v1", "grpc-v2"),
                resources=RESOURCES,
            ),
        ),
    ),
)
COMPOSED = fields(cpus={"type": ["number", "string"]}, memory=QUANTITY)
COMPOSE = fields(
    "services",
    name={"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
    services={
        "type": "object",
        "propertyNames": {"pattern": "^[a-zA-Z0-9._-]+$"},
        "additionalProperties": fields(
            image=TEXT,
            build=fields(context=TEXT),
            command=items(TEXT),
            ports={**items({"type": "string", "pattern": r"^127\.0\.0\.1:\d+(-\d+)?:\d+$"}), "uniqueItems": True},
            user=TEXT,
            read_only=TRUTH,
            tmpfs=items(TEXT),
            cap_drop={**items(TEXT), "uniqueItems": True},
            security_opt={**items(TEXT), "uniqueItems": True},
            stop_grace_period=TEXT,
            restart=one_of("no", "always", "on-failure", "unless-stopped"),
            labels=TEXTS,
            deploy=fields(replicas=WHOLE, resources=fields(limits=COMPOSED, reservations=COMPOSED)),
        ),
    },
)
