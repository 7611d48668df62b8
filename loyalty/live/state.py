"""The state of live updates, and the one table of its transitions."""

from enum import StrEnum


class LiveState(StrEnum):
    """What live updates are doing. `docs/live-updates.md` has the same table."""

    OFF = "off"
    """No change stream: only full recounts."""
    OPENING = "opening"
    """The change stream is open, and its first full recount is not finished."""
    LIVE = "live"
    """Customers are recounted as soon as their orders have changed."""
    PAUSED = "paused"
    """A mass change: the change stream is read, and customers are not recounted."""
    RESYNC = "resync"
    """The change stream is closed; a full recount that opens another follows immediately."""

    @property
    def has_stream(self) -> bool:
        return self in (LiveState.OPENING, LiveState.LIVE, LiveState.PAUSED)


TRANSITIONS = {
    (LiveState.OFF, LiveState.OPENING): "the change stream was opened before a full recount",
    (LiveState.OPENING, LiveState.LIVE): "the full recount was successful",
    (LiveState.OPENING, LiveState.OFF): "a failed or refused recount, or a mixed-case id",
    (LiveState.LIVE, LiveState.PAUSED): "a live update would take points from too many users",
    (LiveState.LIVE, LiveState.RESYNC): "the change stream cannot be continued",
    (LiveState.LIVE, LiveState.OFF): (
        "an error, a reload, a refused recount, a mixed-case id, a second mass change"
    ),
    (LiveState.PAUSED, LiveState.LIVE): "a scheduled full recount was successful",
    (LiveState.PAUSED, LiveState.RESYNC): (
        "the mass change is over, or has taken too long: a full recount checks it"
    ),
    (LiveState.PAUSED, LiveState.OFF): "an error, a reload, a refused recount, or a mixed-case id",
    (LiveState.RESYNC, LiveState.OPENING): "another change stream was opened",
    (LiveState.RESYNC, LiveState.OFF): "no other change stream was opened",
}
