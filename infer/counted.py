"""Reference-counted numbers, of pages or of slots: free ones are found in constant time."""

from collections import OrderedDict


class Counted:
    """The numbers `first` to `first + count - 1`; each is free or held a number of times."""

    def __init__(self, count: int, first: int = 0) -> None:
        #: How often each number is held; those below `first` are nobody's.
        self.refs = [0] * (first + count)
        # The next to give away first: from the end, then what was freed longest ago, so that the
        # numbers that a sequence prefers stay free for it.
        self._free = OrderedDict.fromkeys(reversed(range(first, first + count)))
        #: Numbers that somebody holds.
        self.used = 0

    @property
    def free(self) -> int:
        """How many numbers nobody holds."""
        return len(self._free)

    def take(self, wanted: int) -> int | None:
        """Hold `wanted` if it is free, else any free number; None where there is none."""
        if wanted not in self._free:
            if not self._free:
                return None
            wanted = next(iter(self._free))
        del self._free[wanted]
        self.used += 1
        self.refs[wanted] = 1
        return wanted

    def hold(self, number: int) -> None:
        """Hold it once more, free or not."""
        if self.refs[number] == 0:
            del self._free[number]
            self.used += 1
        self.refs[number] += 1

    def drop(self, number: int) -> None:
        """Hold it once less."""
        self.refs[number] -= 1
        if self.refs[number] == 0:
            self._free[number] = None
            self.used -= 1
