"""What `rushhour serve` is pointed at: a run, a plan or a bundle; always turned into a plan and its bundles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rushhour.bundle import Bundle
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, PlanError
from rushhour.goal import SLO, Goal
from rushhour.machine import cores
from rushhour.plan import Plan, Policy, Variant


@dataclasses.dataclass(frozen=True)
class Target:
    """A plan, and the opened bundle of its first variant.

    Attributes:
        path: what was pointed at, to open it again.
    """

    path: Path
    plan: Plan
    bundle: Bundle

    @property
    def engine_config(self) -> EngineConfig:
        """How the plan runs its first variant."""
        variant, policy = self.plan.variants[0], self.plan.policy
        return EngineConfig(
            engine=variant.engine,
            precision=variant.precision,
            streams=policy.streams,
            threads=policy.threads,
            max_batch=policy.max_batch,
        )


def open_target(path: Path) -> Target:
    """Open a run's folder, a plan's file or a bundle's folder, and check the bundle against its hashes.

    A bundle without a plan is served by OpenVINO with one stream per core.

    Raises:
        PlanError: if there is nothing to serve at `path`, or the plan cannot be read.
        BundleError: if the bundle is missing, damaged, or not the one that the plan was made for.
    """
    if (path / "bundle.json").is_file():
        bundle = Bundle.open(path)
        return Target(path, _plan_of(bundle), bundle)
    file = path / "plan.json" if path.is_dir() else path
    if not file.is_file():
        raise PlanError(
            f"there is nothing to serve at {path}",
            "it is neither a run with a plan.json, nor a plan, nor a bundle",
            "name what `rushhour tune`, `rushhour demo` or `rushhour train` made",
        )
    plan = Plan.load(file)
    variant = plan.variants[0]
    relative = Path(variant.bundle)
    if relative.is_absolute() or ".." in relative.parts:
        raise PlanError(
            f"the plan {file} names the bundle {variant.bundle!r}",
            "a bundle lies below its plan's folder",
            "keep plan and bundles together as `rushhour tune` made them",
        )
    bundle = Bundle.open(file.parent / relative)
    if bundle.manifest.hash != variant.bundle_hash:
        raise BundleError(
            f"the bundle {bundle.path} is not the one that {file} was made for",
            f"its hash begins {bundle.manifest.hash[:12]}, the plan's {variant.bundle_hash[:12]}",
            "restore the bundle, or tune again",
        )
    return Target(path, plan, bundle)


def _plan_of(bundle: Bundle) -> Plan:
    manifest = bundle.manifest
    variant = Variant(
        name=f"{manifest.name}-{manifest.precision}",
        bundle=".",
        bundle_hash=manifest.hash,
        engine="openvino",
        precision=manifest.precision,
    )
    goal = Goal(slo=SLO(percentile=99, limit_s=0.05))
    return Plan(goal=goal, variants=(variant,), policy=Policy(streams=cores(), threads=1, max_batch=16))
