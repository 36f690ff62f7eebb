"""A server's steps where the device need not wait for the host: the next is launched before the
tokens of the last are read.

While step n runs, the scheduler accounts for it (who ends by length is known without its tokens),
step n+1 is decided and launched on tokens that the device has, and only then the host waits for
those of step n. All contents that a scheduler names are known at any time: it accounts for a step
when the tokens of the one before have been read, and a state holds no more than those.

An answer that ends with a token, its stop token or none, has been extended by it in step n+1 when
that is found. It leaves when that step is accounted for; its state holds the stop token too, which
is a past like any other. What step n+1 chose for it is dropped.
"""

from dataclasses import dataclass

from infer.batch import Batch, Done
from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending
from infer.turns import Endings, Executor, Ran, Turn
from kernels.sampling.nucleus import NO_TOKEN


@dataclass(slots=True, eq=False)
class _Launched:
    """A step under way.

    done, held: as it was accounted for, and as `Turn.held`. turn: where its tokens are read.
    """

    batch: Batch
    ran: Ran
    began_s: float
    done: Done | None = None
    held: int = 0
    turn: Turn | None = None


class Ahead:
    """Takes a scheduler's steps on an executor that looks ahead.

    Between two calls at most one step is under way. Raises whatever the executor does; `abandon`
    must follow.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._steps: list[_Launched] = []
        #: Answers that have ended, which the scheduler does not know yet.
        self._late: list[Answer] = []
        #: Answers from whose state no token followed when it had been offered to others.
        self._spoilt: list[Answer] = []
        self._read_s = 0.0

    def step(self) -> Turn | None:
        """Launch a step, and tell what came of the one before; None when idle."""
        if not self._steps:
            self._launch()
        if not self._steps:
            return None
        first = self._steps[0]
        self._account(first)
        self._launch()
        turn = self._read(first)
        self._steps.remove(first)
        return turn

    def settle(self) -> None:
        """Wait for the step under way; its turn is what `step` returns next."""
        for step in self._steps:
            self._account(step)
            self._read(step)

    def abandon(self) -> list[Answer]:
        """Forget the steps under way; answers whose last token was in them, cancelled now."""
        cut: list[Answer] = []
        for step in self._steps:
            if step.turn is None:
                cut += self._account(step).ended
                for answer in step.batch.answers:
                    answer.made = len(answer.tokens)
        self._steps.clear()
        for answer in cut:
            answer.ending = Ending.CANCELLED
        self._let_go()
        return cut

    def _launch(self) -> None:
        """Decide and launch the next step, where there is one; those before are accounted for."""
        self._let_go()
        batch = self.scheduler.next()
        self._follow()
        if batch is None:
            return
        now_s = self.executor.now_s()
        for answer in batch.answers:
            if answer.admitted_s is None:
                answer.admitted_s = now_s
        self._steps.append(_Launched(batch, self.executor.run(batch, 1, now_s), now_s))

    def _account(self, step: _Launched) -> Done:
        """Tell the scheduler that a step was taken, once."""
        if step.done is None:
            step.done = self.scheduler.done(step.batch)
            step.held = sum(answer.held for answer in step.batch.answers)
            self._follow()
        return step.done

    def _read(self, step: _Launched) -> Turn:
        """The turn of a step that was accounted for; waits for its tokens, once."""
        if step.turn is not None:
            return step.turn
        assert step.ran.read is not None
        tokens = step.ran.read()
        now_s = self.executor.now_s()
        got, endings = self._account(step).got, Endings(tokens)
        for answer in got:
            by_length = answer.ending is not None
            ending = endings(answer)
            if ending is not None:
                answer.ending = ending
                if not by_length:
                    self._late.append(answer)
        self._spoilt += [answer for answer, made in tokens.items() if made[-1] == NO_TOKEN]
        ended = [answer for answer in got if answer.ending is not None]
        began_s = max(step.began_s, self._read_s)
        step.turn = Turn.told(step.batch, began_s, now_s, 1, got, ended, step.held)
        self._read_s = now_s
        return step.turn

    def _let_go(self) -> None:
        """Answers that ended with a token leave, and what nothing follows from is not offered."""
        for answer in self._late:
            self.scheduler.drop(answer)
        for answer in self._spoilt:
            self.scheduler.prefixes.retract(answer)
        self._late, self._spoilt = [], []

    def _follow(self) -> None:
        self.executor.follow(self.scheduler.changes())
