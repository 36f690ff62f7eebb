"""Prefixes that are computed once: what is known of a request's tokens, and from where to go on.

A page of tokens is known by a hash of them and of all before. Rows that became full in it can be
shared by all that begin so; where an architecture remembers more than rows (windows, recurrent
states, compressed rows), a sequence can go on only from a checkpoint, which holds all that. A hit
is the longest past for which everything is there. Like the scheduler, this counts and knows no
tensors: `infer.kept` holds those.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from infer.cached import Cached, Checkpoint, Node, Windows
from infer.capacity import Capacity
from infer.ledger import Counts, Ledger
from infer.sequence import Answer


class Start(NamedTuple):
    """Where a sequence begins: after `tokens` tokens, with the pages up to a node.

    seen: tokens of known pages; where they are more, a checkpoint is missing. hands_over: the
    checkpoint is not kept beside the sequence, which takes its place.
    """

    node: Node
    point: Checkpoint | None = None
    tokens: int = 0
    seen: int = 0
    hands_over: bool = False


@dataclass(slots=True)
class _Past:
    """What is known of an answer: keys of its pages, the last of them that others can find, window
    pages that checkpoints of it hold, and where it is asked for one.
    """

    node: Node
    keys: list[bytes] = field(default_factory=list)
    windows: Windows = field(default_factory=dict)
    cuts: set[int] = field(default_factory=set)


class Prefixes:
    """The prefixes of a server.

    keeps: whether any are kept that nobody waits for. every: a checkpoint every so many tokens of a
    prompt; 0: only where two prompts part, and where answers end.
    """

    def __init__(
        self, capacity: Capacity, ledger: Ledger, *, keeps: bool = False, every: int = 0
    ) -> None:
        self.capacity = capacity
        self.ledger = ledger
        self.cached = Cached(capacity, ledger, keeps=keeps)
        self.keeps = keeps
        self.nothing = Start(self.cached.root)
        self._every = every if keeps and not capacity.only_rows else 0
        self._size = capacity.page_size
        self._tables = list(capacity.pages)
        self._pasts: dict[Answer, _Past] = {}
        self._waits: dict[Answer, Checkpoint] = {}
        self._starting: list[Checkpoint] = []

    def find(self, answer: Answer) -> Start:
        """The longest known past of an answer that leaves it a token to compute."""
        if not (self.keeps or answer in self._waits):
            return self.nothing
        limit = min(answer.length - 1, answer.known)
        deepest = self.cached.root
        while (deepest.depth + 1) * self._size <= limit:
            found = self.cached.nodes.get(self._key(answer, deepest.depth))
            if found is None:
                break
            deepest = found
        seen = deepest.depth * self._size
        for node in (*deepest.path(), self.cached.root):
            point = self._point(answer, node, limit)
            if point is not None:
                return Start(node, point, point.tokens, seen)
            if self.capacity.only_rows:
                return Start(node, None, node.depth * self._size, seen)
        return self.nothing._replace(seen=seen)

    def starts(self, answer: Answer, *, alone: bool) -> list[Start]:
        """Where an answer could begin, the best first. alone: nobody runs who would make room."""
        found = self.find(answer)
        starts = [found]
        if found.point is not None and not found.point.users:
            starts.append(found._replace(hands_over=True))
        if alone and found.tokens:
            starts.append(self.nothing._replace(seen=found.seen))
        return starts

    def idle_of(self, start: Start) -> Counts:
        """What a start would take up of what nobody uses."""
        found = [0] * len(self.ledger.total)
        if start.point is not None and not start.point.users and not start.hands_over:
            found = start.point.counts()
        for node in start.node.path():
            if node.users:
                break
            found = [f + p for f, p in zip(found, node.pages, strict=True)]
        return tuple(found)

    def begin(self, answer: Answer, start: Start) -> None:
        """An answer goes on from a start, which stays until `settle`."""
        answer.shared = start.node.shared
        answer.held = start.tokens
        if self.keeps or start.tokens:
            past = self._past(answer)
            self.cached.use(start.node)
            self.cached.leave(past.node)
            past.node = start.node
            if start.hands_over and start.point is not None:
                self.cached.drop_point(start.point)
            elif start.point is not None:
                self._starting.append(start.point)
                self.cached.start(start.point)
                past.windows = self._full(start.point.windows, start.tokens)
            if start.seen > start.tokens:
                past.cuts.add(start.seen)
        self._no_longer_waits(answer)

    def settle(self) -> bool:
        """Those that began hold what they need themselves; whether that leaves more to others."""
        settled, self._starting = self._starting, []
        for point in settled:
            self.cached.started(point)
        return bool(settled)

    def ask(self, answer: Answer, tokens: int) -> None:
        """A checkpoint will be wanted when an answer holds so many tokens."""
        self._past(answer).cuts.add(tokens)

    def chunk(self, answer: Answer, count: int) -> int:
        """How many of the next `count` tokens come before a checkpoint is due."""
        past = self._pasts.get(answer)
        if past is None:
            return count
        cuts = [cut for cut in past.cuts if cut > answer.held]
        if self._every:
            cuts.append((answer.held // self._every + 1) * self._every)
        return min([count, *(cut - answer.held for cut in cuts)])

    def read(self, answer: Answer) -> None:
        """An answer has read a chunk of its prompt: others can find that."""
        past = self._pasts.get(answer)
        if past is None or not self.keeps:
            return
        if answer.held in past.cuts or (self._every and answer.held % self._every == 0):
            self.checkpoint(answer)
        self.publish(answer)

    def publish(self, answer: Answer) -> None:
        """Let others find the full pages that an answer holds."""
        past = self._past(answer)
        end = min(answer.held, answer.known)
        while (past.node.depth + 1) * self._size <= end:
            key = self._key(answer, past.node.depth)
            node = self.cached.nodes.get(key)
            if node is None:
                begin = past.node.depth * self._size
                pages = self.capacity.full_pages(begin, begin + self._size)
                node = self.cached.add_node(answer, past.node, key, pages)
            else:
                self.cached.give_up_own(answer, node)
            self.cached.use(node)
            self.cached.leave(past.node)
            past.node = node

    def checkpoint(self, answer: Answer, waiting: Sequence[Answer] = ()) -> None:
        """Keep all that an answer holds, where there is room; `waiting` will go on from there."""
        if answer.held > answer.known or not (answer.held and (self.keeps or waiting)):
            return
        self.publish(answer)
        past, held = self._past(answer), answer.held
        base = past.node.depth * self._size
        if held == base and self.capacity.only_rows and not waiting:
            return
        rest = answer.told(base, held)
        point = past.node.points.get(held - base, {}).get(rest)
        if point is None:
            at = [
                (table, page) for table, key in enumerate(self._tables) if key.window is not None
                for page in self.capacity.window_pages(key, held)
            ]  # fmt: skip
            own = self.ledger.with_slot(self.capacity.newest_pages(held))
            point = self.cached.add_point(
                answer, past.node, held - base, rest, own, at, past.windows
            )
            if point is None:
                return
            past.windows = self._full(point.windows, held)
        point.wanted += len(waiting)
        self._waits.update(dict.fromkeys(waiting, point))
        self.cached.touch(point)

    def retract(self, answer: Answer) -> None:
        """Offer what an answer has left beyond its prompt to nobody, but to those who have it.

        For one that has left, and from whose state no token followed, as was found since.
        """
        if not self.keeps:
            return
        size, asked = self._size, len(answer.request.prompt)
        path = [self.cached.root]
        while len(path) * size <= answer.known:
            found = self.cached.nodes.get(self._key(answer, len(path) - 1))
            if found is None:
                break
            path.append(found)
        self.leave(answer)
        for node in reversed(path):
            base = node.depth * size
            for more in [more for more in node.points if asked <= base + more <= answer.known]:
                point = node.points[more].get(answer.told(base, base + more))
                if point is not None and point.is_idle:
                    self.cached.drop_point(point)
            if base <= asked:
                break
            if node.is_idle:
                self.cached.drop_node(node)

    def leave(self, answer: Answer) -> None:
        """An answer runs no more, and waits for nothing."""
        self._no_longer_waits(answer)
        past = self._pasts.pop(answer, None)
        if past is not None:
            self.cached.leave(past.node)

    # -- inside ----------------------------------------------------------------------------------

    def _past(self, answer: Answer) -> _Past:
        past = self._pasts.get(answer)
        if past is None:
            self._pasts[answer] = past = _Past(self.cached.root)
            self.cached.use(past.node)
        return past

    def _key(self, answer: Answer, page: int) -> bytes:
        """The key of a page of an answer."""
        keys = self._past(answer).keys
        while len(keys) <= page:
            begin = len(keys) * self._size
            before = keys[-1] if keys else b""
            said = answer.told(begin, begin + self._size)
            keys.append(hashlib.blake2b(before + said, digest_size=16).digest())
        return keys[page]

    def _point(self, answer: Answer, node: Node, limit: int) -> Checkpoint | None:
        """The checkpoint at or after a node from which an answer can go on furthest."""
        base = node.depth * self._size
        for more in sorted(node.points, reverse=True):
            if base + more <= limit:
                found = node.points[more].get(answer.told(base, base + more))
                if found is not None:
                    return found
        return None

    def _full(self, windows: Windows, tokens: int) -> Windows:
        """Pages of windows that are full; others are written on to, on a copy."""
        return {
            (table, page): held for (table, page), held in windows.items()
            if (page + 1) * self._size <= tokens // self._tables[table].every
        }  # fmt: skip

    def _no_longer_waits(self, answer: Answer) -> None:
        point = self._waits.pop(answer, None)
        if point is not None:
            point.wanted -= 1
            self.cached.forget_unwanted(point)
