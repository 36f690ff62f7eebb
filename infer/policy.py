"""How a server batches, as data."""

from dataclasses import dataclass

from archs.checks import at_least
from archs.errors import UserError, unknown_name

#: Ways to batch (`infer.scheduler.SCHEDULERS`), and whether answers join and leave at every step.
BATCHING = {"continuous": True, "static": False}
#: How rows are set aside: page by page as they come, or for the longest context at once.
PAGED, CONTIGUOUS = "paged", "contiguous"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How a server batches.

    batching: continuous (answers join and leave at every step) or static (a batch runs until its
    last answer has ended; who has ended stays in it, as in a padded batch). token_budget: tokens of
    a step at most, decoded ones first; prompts are cut into chunks to keep it. reserve: share of
    the pages that an admission leaves free, for those that run to grow into. allocation: paged, or
    contiguous: the longest context is set aside for each sequence. prefix_cache: prefixes that have
    been computed are kept while there is room, and not computed again. checkpoint_every: of what is
    not only rows, a checkpoint every so many tokens of a prompt; 0: where two prompts part and
    where answers end. drafts: K, that an answer may be drafted in a step beside the token that it
    gets anyway.
    """

    batching: str = "continuous"
    token_budget: int = 512
    reserve: float = 0.02
    allocation: str = PAGED
    prefix_cache: bool = False
    checkpoint_every: int = 0
    drafts: int = 0

    def __post_init__(self) -> None:
        if self.batching not in BATCHING:
            raise unknown_name("batching", self.batching, BATCHING)
        if self.allocation not in (PAGED, CONTIGUOUS):
            raise unknown_name("allocation", self.allocation, (PAGED, CONTIGUOUS))
        at_least(self, 1, "token_budget")
        if not 0 <= self.reserve < 1:
            raise UserError(f"reserve={self.reserve} must be a share from 0 to below 1")
        at_least(self, 0, "checkpoint_every", "drafts")
        if self.drafts and not BATCHING[self.batching]:
            raise UserError(
                f"drafts={self.drafts} with batching='{self.batching}': answers advance unlike "
                "far, so drafts are for continuous batches"
            )
        if self.checkpoint_every and not self.prefix_cache:
            raise UserError(
                f"checkpoint_every={self.checkpoint_every} without prefix_cache=true: nothing is "
                "kept; ask for both, or neither"
            )
        if self.prefix_cache and not self.shares:
            raise UserError(
                f"prefix_cache=true with batching='{self.batching}' and allocation="
                f"'{self.allocation}': prefixes are shared by continuous batches on pages"
            )

    @property
    def shares(self) -> bool:
        """Whether sequences can share pages."""
        return BATCHING[self.batching] and self.allocation == PAGED

    def require_shares(self) -> None:
        """Raise UserError where they cannot: nothing can be forked then."""
        if not self.shares:
            raise UserError(
                f"batching='{self.batching}' with allocation='{self.allocation}' shares nothing, "
                "so nothing can be forked; serve continuous batches on pages"
            )
