"""Quest: every decoded token reads only the pages with the highest upper bounds."""

from dataclasses import dataclass, field

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops.paged_attention import PAGE
from cachepress.press import BasePress, WrapperPress
from cachepress.presses.knorm import KnormPress
from cachepress.view import Needs, PageBudget

_DEFAULT_PAGES = 32
_KEEP_ALL = KnormPress(0.0)


@dataclass(frozen=True)
class QuestPress(WrapperPress, alias="quest"):
    """Evicts nothing by itself: each decoded token reads only the few pages that matter to it.

    Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference"
    (arXiv:2406.10774). The compressed layer keeps the lowest and the highest number of each channel
    of the keys of a page of 32 tokens. No logit of a query q in a page exceeds the sum over
    channels of max(q * lowest, q * highest); each KV head reads the ``pages`` pages with the
    highest bounds, the last one always among them. The query heads of a KV head read the same
    pages, by the highest bound for one of them, which the paper leaves open. Tokens that came since
    the last compression are read in full: 64 to 95 of them, older ones are put in pages as well.
    Forwards of one token read pages; those of several, such as prompts and chunks, read all. Needs
    what the inner press needs, and 2 numbers of each channel for every page.
    Best for long contexts of which nothing may be evicted, where decoding has to be fast.

    Attributes:
        press: the press that chooses which tokens are held; all unless it is given.
        pages: pages that a KV head reads; None for ``token_budget``, or 32 without it.
        skip_layers: first layers (of those that are compressed) that read all.
        token_budget: instead of ``pages``, tokens that a KV head reads, rounded up to pages.
    """

    press: BasePress = _KEEP_ALL
    pages: int | None = None
    skip_layers: int = 2
    token_budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "skip_layers", least=0)
        given = [name for name in ("pages", "token_budget") if getattr(self, name) is not None]
        for name in given:
            check_count(self, name)
        if len(given) > 1:
            raise CachepressError("got both pages and token_budget: give one")

    @property
    def needs(self) -> Needs:
        """What the inner press needs, and the page budget of a decoded token."""
        pages = self.pages or _DEFAULT_PAGES
        if self.token_budget is not None:
            pages = -(-self.token_budget // PAGE)
        return self.press.needs | Needs(page_budgets=(PageBudget(pages, self.skip_layers),))
