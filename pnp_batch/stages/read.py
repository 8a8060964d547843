"""Before the first stage: guidance pictures are decoded and digested where their digest is not known, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pnp_batch.errors import ItemError
from pnp_batch.media.images import Pixels
from pnp_batch.stages import threads
from pnp_batch.stages.batches import Group, attempt
from pnp_batch.stages.work import READ, Context, Item


def run(context: Context, items: Sequence[Item]) -> list[Item]:
    """Gives the items whose key can be told; the others fail."""
    unread = [_Unread(item) for item in items if item.job.size is not None and not item.knows_key()]
    is_clip = bool(items) and items[0].job.window is not None
    for batch in [[each] for each in unread] if is_clip else threads.in_hand(unread, context.device):
        attempt([batch], _read, _give_up, context.ledger, READ)
    return [item for item in items if not item.failed and _is_readable(item)]


def pixels_of(context: Context, items: Sequence[Item]) -> list[Pixels]:
    """The guidance images of a batch; a video's frames one after the other, since its decoder goes forward."""
    if items[0].job.window is not None:
        return [item.pixels for item in items]
    return threads.each(lambda item: item.pixels, items, context.device)


@dataclass(frozen=True)
class _Unread:
    """A picture whose digest, and so whose key, is not known yet."""

    item: Item

    @property
    def key(self) -> str:
        """What it is called until then."""
        return self.item.place


def _read(group: Group[_Unread]) -> None:
    (batch,) = group
    threads.each(Item.read, [unread.item for unread in batch], batch[0].item.context.device)


def _give_up(unread: _Unread, error: BaseException) -> None:
    unread.item.fail(READ, error)


def _is_readable(item: Item) -> bool:
    try:
        return bool(item.key)
    except ItemError as error:
        item.fail(READ, error)
        return False
