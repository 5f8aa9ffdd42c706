"""What a loss is printed in: nats or bits, of a datum or of a coordinate."""

import math
import re

__all__ = ["Unit"]

# what an amount of information is counted in, in nats
AMOUNTS = {"nats": 1.0, "bits": math.log(2)}


class Unit:
    """An amount of information per datum or per observed coordinate.

    Args:
        name: "nats/datum", "bits/datum", or with any other word after the slash, which then stands for one
            observed coordinate: "nats/dim", "bits/dim", "bits/pixel", "bits/char".

    Raises:
        ValueError: for other names.
    """

    def __init__(self, name: str) -> None:
        found = re.fullmatch(r"(nats|bits)/([a-z]+)", name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(
                f'unit: got {name!r}, expected "nats/datum", "bits/datum", or nats or bits per coordinate '
                'such as "nats/dim", "bits/dim", "bits/char"'
            )
        self.name, self.nats = name, AMOUNTS[found[1]]
        self.per_datum = found[2] == "datum"

    def of_datum(self, coordinates: float) -> float:
        """How many nats of one datum make one unit.

        Args:
            coordinates: how many numbers a datum has.
        """
        return self.nats * (1.0 if self.per_datum else coordinates)
