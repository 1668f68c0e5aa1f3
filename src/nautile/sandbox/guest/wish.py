"""What a virtual machine is to be: for the process that makes it, whether that is the caller's or a host of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautile.sandbox.guest.driver import Machine
from nautile.sandbox.image import Image
from nautile.sandbox.limits import Limits
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.recorded import image_record, recorded_image

__all__ = ["MachineWish"]


@dataclass(frozen=True)
class MachineWish:
    """``kind``: microvm or vm. ``workspace``: a directory that is kept equal with /workspace."""

    kind: str
    image: Image
    limits: Limits
    policy: NetworkPolicy
    workspace: Path | None = None
    allow_emulation: bool = False

    def make(self, identity: str) -> Machine:
        """Start it. Raises SubstrateUnavailable, LimitUnavailable, InvalidRequest."""
        from nautile.sandbox.microvm import MicroVMDriver  # noqa: PLC0415
        from nautile.sandbox.vm import VMDriver  # noqa: PLC0415

        kind: type[MicroVMDriver] | type[VMDriver] = MicroVMDriver if self.kind == "microvm" else VMDriver
        options = {"allow_emulation": self.allow_emulation, "network": bool(self.policy.rules)}
        driver = kind.create(identity, self.image, self.limits, **options)
        try:
            if self.policy.rules:
                driver.give_network(self.policy)
            if self.workspace is not None:
                driver.give_workspace(self.workspace)
        except BaseException:
            driver.close()
            raise
        return driver

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "kind": self.kind,
            "image": image_record(self.image),
            "limits": dataclasses.asdict(self.limits),
            "rules": list(self.policy.texts),
            "workspace": None if self.workspace is None else str(self.workspace),
            "allow_emulation": self.allow_emulation,
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> MachineWish:
        """What ``record`` made. Raises InvalidRequest."""
        workspace = record["workspace"]
        return cls(
            kind=record["kind"],
            image=recorded_image(record["image"]),
            limits=Limits(**record["limits"]),
            policy=NetworkPolicy.of(record["rules"] or None),
            workspace=None if workspace is None else Path(workspace),
            allow_emulation=record["allow_emulation"],
        )
