"""What a server keeps of prefixes, and whose memory it is: pages and checkpoints, counted.

Units are held in memory as long as nobody needs it for more; what was used longest ago goes first.
What is in use stays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TypeVar

from infer.capacity import Capacity
from infer.ledger import Counts, Ledger
from infer.sequence import Answer

#: Pages that are remembered at most: those of an architecture without rows take no memory of the
#: device, and a host's is not endless either.
MOST_NODES = 100_000
#: Stale entries of a heap that are not worth looking for.
STALE = 256


@dataclass(slots=True, eq=False)
class Node:
    """A page of tokens after all those of its parent; the root is no page.

    key: of it and of all before. depth: pages up to its end. pages: of each table, that became full
    in it. shared: those, and its parents'. users: answers that go on from it, and children that
    have any. points: checkpoints at its end or inside the next page, by how many tokens further,
    and what these say.
    """

    parent: "Node | None"
    key: bytes
    depth: int
    pages: Counts
    shared: tuple[int, ...]
    users: int = 0
    children: int = 0
    stamp: int = 0
    points: dict[int, dict[bytes, "Checkpoint"]] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether nothing depends on it."""
        return not (self.users or self.children or self.points)

    def path(self) -> Iterator["Node"]:
        """Itself and its parents, the root apart."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(slots=True, eq=False)
class WindowPage:
    """A window's page that checkpoints of one past share.

    table: which. points: how many; used: how many of those are in use.
    """

    table: int
    points: int = 0
    used: int = 0


#: By table and logical page.
Windows = dict[tuple[int, int], WindowPage]


@dataclass(slots=True, eq=False)
class Checkpoint:
    """All that a sequence of `tokens` tokens remembers beside full pages of rows.

    more, rest: tokens past the node's end, and what they say. own: newest pages of tables without a
    window, and its slot. wanted: answers that wait for it. users: answers that start from it.
    """

    node: Node
    tokens: int
    more: int
    rest: bytes
    own: Counts
    windows: Windows
    wanted: int = 0
    users: int = 0
    stamp: int = 0
    gone: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing depends on it."""
        return not (self.users or self.gone)

    def counts(self) -> list[int]:
        """What it holds that no other checkpoint in use holds."""
        found = list(self.own)
        for page in self.windows.values():
            found[page.table] += page.used == 0
        return found


Unit = Node | Checkpoint
U = TypeVar("U", Node, Checkpoint)


class Cached:
    """Units and their memory.

    keeps: whether anything is kept that nobody uses or waits for. kept: (answer, unit) that are to
    be held from now on; twice: (answer, node) where both have the same page; forgotten: units that
    are held no longer. Whoever reads them empties them.
    """

    def __init__(self, capacity: Capacity, ledger: Ledger, *, keeps: bool) -> None:
        self.ledger = ledger
        self.keeps = keeps
        self.nodes: dict[bytes, Node] = {}
        #: How many checkpoints there are.
        self.points = 0
        self.kept: list[tuple[Answer, Unit]] = []
        self.twice: list[tuple[Answer, Node]] = []
        self.forgotten: list[Unit] = []
        tables = list(capacity.pages)
        #: Resources of which only checkpoints hold any: windows, and slots.
        self._of_points = {at for at, key in enumerate(tables) if key.window is not None}
        self._of_points.add(len(tables))
        nothing = (0,) * len(tables)
        self.root = Node(None, b"", 0, (*nothing, 0), nothing)
        #: Heaps by when units were last used; an entry whose stamp is not its unit's is stale.
        self._old_nodes: list[tuple[int, int, Node]] = []
        self._old_points: list[tuple[int, int, Checkpoint]] = []
        self._time = 0

    # -- memory ----------------------------------------------------------------------------------

    def take(self, wanted: Counts) -> bool:
        """Hold so much; what was used longest ago makes room. False where that does not suffice."""
        if not self.ledger.has(wanted):
            if not self.ledger.could_have(wanted):
                return False
            while not self.ledger.has(wanted):
                went = self._evict(wanted)
                assert went
        self.ledger.take(wanted)
        return True

    def clear(self) -> None:
        """Forget all that nobody uses."""
        while self._evict((0,) * len(self.ledger.total)):
            pass

    def _evict(self, wanted: Counts) -> bool:
        """Forget the unit that was used longest ago among those that may help."""
        lacking = {
            at for at, (w, f) in enumerate(zip(wanted, self.ledger.free, strict=True)) if w > f
        }
        point = _oldest(self._old_points)
        node = None if lacking and lacking <= self._of_points else _oldest(self._old_nodes)
        if point is not None and (node is None or point.stamp <= node.stamp):
            self.drop_point(point)
        elif node is not None:
            self.drop_node(node)
        else:
            return False
        return True

    # -- pages -----------------------------------------------------------------------------------

    def add_node(self, answer: Answer, parent: Node, key: bytes, pages: tuple[int, ...]) -> Node:
        """A node for an answer's next page; `pages` of tables pass from it to the cache."""
        if len(self.nodes) >= MOST_NODES:
            self._evict((0,) * len(self.ledger.total))
        shared = tuple([s + p for s, p in zip(parent.shared, pages, strict=True)])
        node = Node(parent, key, parent.depth + 1, (*pages, 0), shared)
        _share(answer, pages)
        parent.children += 1
        self.nodes[key] = node
        self.ledger.lay_by(node.pages)
        self.kept.append((answer, node))
        return node

    def give_up_own(self, answer: Answer, node: Node) -> None:
        """An answer has computed a page that is there: it shares that one instead."""
        _share(answer, node.pages[:-1])
        self.ledger.give(node.pages)
        self.twice.append((answer, node))

    def use(self, node: Node) -> None:
        """An answer goes on from a node."""
        at: Node | None = node
        while at is not None:
            at.users += 1
            if at.users > 1:
                break
            self.ledger.take_up(at.pages)
            at = at.parent

    def leave(self, node: Node) -> None:
        """It does no more."""
        at: Node | None = node
        while at is not None:
            at.users -= 1
            if at.users:
                break
            self.ledger.lay_by(at.pages)
            parent = at.parent
            self.touch(at)
            at = parent

    def drop_node(self, node: Node) -> None:
        """Forget a page that nothing depends on."""
        del self.nodes[node.key]
        self.ledger.take_up(node.pages)
        self.ledger.give(node.pages)
        self.forgotten.append(node)
        node.stamp = -1
        parent = node.parent
        assert parent is not None
        parent.children -= 1
        self._offer(parent)

    # -- checkpoints -----------------------------------------------------------------------------

    def add_point(
        self, answer: Answer, node: Node, more: int, rest: bytes, own: Counts,
        at: Iterable[tuple[int, int]], windows: Windows,
    ) -> Checkpoint | None:  # fmt: skip
        """A checkpoint of all that an answer holds now; None where there is no room for it.

        at: its pages of windows, by table and logical page; `windows`: those of them that earlier
        checkpoints of its past have.
        """
        at = list(at)
        while True:
            wanted = list(own)
            for place in at:
                page = windows.get(place)
                wanted[place[0]] += page is None or page.points == 0
            counts = tuple(wanted)
            if self.ledger.has(counts):
                break
            # What goes may be a page that counted as there: it is counted again.
            if not (self.ledger.could_have(counts) and self._evict(counts)):
                return None
        self.ledger.take(counts)
        self.ledger.lay_by(counts)
        shared = {place: windows.get(place) or WindowPage(place[0]) for place in at}
        for page in shared.values():
            page.points += 1
        point = Checkpoint(node, answer.held, more, rest, own, shared)
        node.points.setdefault(more, {})[rest] = point
        self.points += 1
        self.kept.append((answer, point))
        return point

    def start(self, point: Checkpoint) -> None:
        """An answer starts from a checkpoint, which stays until `started`."""
        if point.users == 0:
            self.ledger.take_up(tuple(point.counts()))
            for page in point.windows.values():
                page.used += 1
        point.users += 1

    def started(self, point: Checkpoint) -> None:
        """It has what it needs."""
        point.users -= 1
        if point.users == 0:
            for page in point.windows.values():
                page.used -= 1
            self.ledger.lay_by(tuple(point.counts()))
            self.touch(point)
            self.forget_unwanted(point)

    def forget_unwanted(self, point: Checkpoint) -> None:
        """Where nothing is kept, a checkpoint goes when the last who waited for it has begun."""
        if not self.keeps and point.is_idle and not point.wanted:
            self.drop_point(point)

    def drop_point(self, point: Checkpoint) -> None:
        """Forget a checkpoint that nobody is starting from."""
        freed = list(point.own)
        for page in point.windows.values():
            page.points -= 1
            freed[page.table] += page.points == 0
        self.ledger.take_up(tuple(freed))
        self.ledger.give(tuple(freed))
        alike = point.node.points[point.more]
        del alike[point.rest]
        if not alike:
            del point.node.points[point.more]
        self.points -= 1
        point.gone = True
        point.stamp = -1
        self.forgotten.append(point)
        self._offer(point.node)

    # -- the order in which units go ---------------------------------------------------------------

    def touch(self, unit: Unit) -> None:
        """A unit was used just now."""
        self._time += 1
        unit.stamp = self._time
        self._offer(unit)

    def _offer(self, unit: Unit) -> None:
        """A unit may be forgotten if nothing depends on it."""
        if not unit.is_idle:
            return
        if isinstance(unit, Checkpoint):
            _push(self._old_points, unit, self.points)
        elif unit is not self.root:
            if self.keeps:
                _push(self._old_nodes, unit, len(self.nodes))
            else:
                self.drop_node(unit)


def _share(answer: Answer, pages: tuple[int, ...]) -> None:
    """Pages of an answer are its own no more."""
    answer.pages = tuple([h - p for h, p in zip(answer.pages, pages, strict=True)])
    answer.shared = tuple([s + p for s, p in zip(answer.shared, pages, strict=True)])


def _push(heap: list[tuple[int, int, U]], unit: U, there: int) -> None:
    """Put a unit into its place; of `there` units at most twice as many entries are kept."""
    heappush(heap, (unit.stamp, id(unit), unit))
    if len(heap) > 2 * there + STALE:
        heap[:] = [e for e in heap if e[2].stamp == e[0] and e[2].is_idle]
        heapify(heap)


def _oldest(heap: list[tuple[int, int, U]]) -> U | None:
    """The unit that was used longest ago; what is stale goes."""
    while heap:
        stamp, _, unit = heap[0]
        if unit.stamp == stamp and unit.is_idle:
            return unit
        heappop(heap)
    return None
