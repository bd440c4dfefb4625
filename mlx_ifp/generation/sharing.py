"""Channels that requests of different selections have in common are read once a step."""

import logging
import weakref

from ..model import IFPModel
from ..subnetwork.united import Member, RowCost, United, pays, union_widths, unite
from .admission import Admission
from .job import Job


class Sharing:
    """Unites the sub-networks of the requests that run, if that is faster and there is room.

    Args:
        model (IFPModel): what answers.
        admission (Admission): knows what room there is.

    Attributes:
        cost: what a row costs, once it was measured.
    """

    def __init__(self, model: IFPModel, admission: Admission) -> None:
        self._model, self._admission = model, admission
        self.cost: RowCost | None = None
        # Bytes count for as long as somebody has them.
        self._made: weakref.WeakSet[United] = weakref.WeakSet()
        self._making = 0
        self._last: weakref.ref[United] | None = None
        admission.beside = lambda: self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all united channels, and of those that are being united."""
        return self._making + sum(united.nbytes for united in list(self._made))

    def unite(self, jobs: list[Job]) -> tuple[United, RowCost] | None:
        """Unite the sub-networks of some requests.

        Returns:
            tuple: their channels, and what a row costs; None if they stay apart.
        """
        try:
            return self._unite(jobs)
        except Exception:
            # Requests are answered without it, too.
            logging.exception("Sub-networks could not be united.")
            return None
        finally:
            self._making = 0

    def _unite(self, jobs: list[Job]) -> tuple[United, RowCost] | None:
        members: dict[str, Member] = {}
        rows: dict[str, int] = {}
        for job in jobs:
            ready = job.ticket.ready
            if ready is None or job.ticket.over:
                continue
            if ready.selection is not None and ready.selection.soft_values is not None:
                # A channel has another weight in each sub-network.
                return None
            members[job.group] = Member(ready.selection, ready.network)
            rows[job.group] = rows.get(job.group, 0) + 1
        last = None if self._last is None else self._last()
        if len(members) < 2 or (last is not None and members.keys() <= last.places.keys()):
            return None
        model = self._model
        parent = model.parent
        cost = self.cost
        if cost is None:
            cost = self.cost = RowCost.measured(parent, next(iter(members.values())))
        widths = union_widths(parent, list(members.values()))
        parts = {
            digest: (
                sum(len(member.channels(i, ffn)) for i, ffn in enumerate(parent.ffns)),
                rows[digest],
            )
            for digest, member in members.items()
        }
        if not pays(sum(widths), parts, cost):
            return None
        nbytes = self._admission.network_bytes(widths)
        if nbytes > self._admission.room_for_network():
            return None
        self._making = nbytes
        room = self._admission.room_for_prompts()
        if room is not None:
            # Sub-networks that nobody uses make room.
            model.networks.shrink(max(0, model.networks.max_bytes - nbytes))
        united = unite(parent, members)
        self._made.add(united)
        self._last = weakref.ref(united)
        return united, cost
