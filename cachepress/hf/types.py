"""Types of transformers that other packages annotate with: they import them from here alone."""

from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizer as PreTrainedTokenizer
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
from transformers import __version__ as TRANSFORMERS_VERSION
from transformers.cache_utils import Cache as Cache
from transformers.cache_utils import DynamicCache as DynamicCache

__all__ = [
    "TRANSFORMERS_VERSION",
    "Cache",
    "DynamicCache",
    "PreTrainedModel",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerBase",
]
