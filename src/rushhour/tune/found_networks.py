"""What the search for smaller networks found, kept beside their bundles: a run that goes on does not search again."""

from __future__ import annotations

from typing import Final

import msgspec

from rushhour.bundle import Bundle
from rushhour.compress import Store
from rushhour.errors import BundleError
from rushhour.plan import Decision, Trial
from rushhour.system.storage import write_whole

_FILE: Final = "networks.json"


class FoundNetworks(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        bundles: role -> name of its folder in the store: trained, in f32, inside the accuracy budget.
        trials: of all other shapes, with the reason.
        key: of all that it was found from.
        decisions: on the way there.
    """

    bundles: dict[str, str]
    trials: tuple[Trial, ...]
    key: str
    decisions: tuple[Decision, ...] = ()

    @classmethod
    def read(cls, store: Store, key: str) -> FoundNetworks | None:
        """What was found from inputs of this key; None where there is none, or a bundle of it is missing."""
        try:
            found = msgspec.json.decode((store.folder / _FILE).read_bytes(), type=cls)
            for name in found.bundles.values():
                Bundle.open(store.folder / name)
        except (OSError, msgspec.DecodeError, BundleError):
            return None
        return found if found.key == key else None

    def save(self, store: Store) -> None:
        """Write it into the store's folder.

        Raises:
            StorageError: if the disk does not take it.
        """
        write_whole(store.folder / _FILE, msgspec.json.format(msgspec.json.encode(self)) + b"\n")
