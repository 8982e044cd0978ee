"""What a pipeline keeps on a device beside the model that is planned, as far as it was seen."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EncoderBytes:
    """One encoder of conditions, in one call of a pipeline.

    Attributes:
        nbytes: of all that it has on its device; cut: of those, what ranks can share out.
        coming: of what they share out, what is there at a time while it runs.
        messages: in which parts of what they share out come together, in all its calls; calls: how many these are.
    """

    nbytes: int
    cut: int = 0
    coming: int = 0
    messages: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Beside:
    """Components beside the model that is planned, where they stay on its device.

    Attributes:
        denoisers: bytes of those that run at each step too, and are shared out as it is; others: of those that every
            rank holds whole.
    """

    denoisers: int = 0
    encoders: tuple[EncoderBytes, ...] = ()
    others: int = 0

    def uncut(self) -> Beside:
        """The same with encoders that ranks do not share out."""
        return replace(self, encoders=tuple(EncoderBytes(e.nbytes) for e in self.encoders))


ALONE = Beside()
"""Of a model that is in no pipeline."""
