"""Decodes tokens from compressed caches on a GPU by steps that are recorded once, as CUDA graphs.

A forward of one token launches the same kernels again and again. It is recorded, and replayed with
other tokens: of this cache or of any other of the same form, since addresses and lengths are in
tables on the device. ``generate()`` and any other loop call the model as ever; a forward that is no
such step runs as it is. A model that cannot be recorded decodes as it is, and one line says why.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import cast
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cachepress.cache.stepping import can_step
from cachepress.hf.around import Around, Call, put_around, take_away
from cachepress.hf.attention import Selection
from cachepress.hf.blocks import acting
from cachepress.hf.recording import Asked, Form, Recording, UnrecordableError
from cachepress.hf.types import PreTrainedModel
from cachepress.hf.unchanged import is_plain
from cachepress.settings import is_compiled, is_recorded

logger = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Steps of a form that run as they are before one is recorded: short answers cost nothing more."""
MOST_RECORDINGS = 16
_CACHES = ("cache", "past_key_values")
_UNDERSTOOD = {"input_ids", "position_ids", "attention_mask", "use_cache", "return_dict", *_CACHES}
_UNDERSTOOD |= {"logits_to_keep", "cache_position"}
_LATEST: OrderedDict[tuple[ref[nn.Module], Form], Recording] = OrderedDict()
"""The recordings of all models, the last used last."""
_LOCK = threading.Lock()


class Steps:
    """The recorded steps of a model, whose text decoder fills the cache.

    Attributes:
        windows: the layers whose tokens see a window of the newest ones.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder, self.windows = ref(decoder), _windows(decoder)
        self._lock = threading.Lock()
        self._ran: dict[Form, int] = {}
        self._refused: set[Form] = set()
        self._last: Recording | None = None
        self._wished = False

    def is_observed(self) -> bool:
        """Tell whether a block acts on forwards of the model, here and now."""
        decoder = self._decoder()
        return decoder is None or acting(decoder) is not None

    def forward(self, call: Call, asked: Asked) -> object:
        """Replay a recorded step, record one, or run the forward as it is."""
        if not self._lock.acquire(blocking=False):
            return call.run()  # Another thread is in a step, or this one in its first part.
        try:
            return self._forward(call, asked)
        finally:
            self._lock.release()

    def _forward(self, call: Call, asked: Asked) -> object:
        wished = is_compiled()
        if self._last is not None and wished == self._wished and self._last.serves(asked):
            return self._last.step(asked)
        self._wished = wished
        form = Form.of(call.module, asked)
        if form is not None and form.compiled and form in self._refused:
            form = form._replace(compiled=False)
        if form is None or form in self._refused or not is_plain(list(call.module.modules())):
            return call.run()
        recording = _recalled(call.module, form)
        if recording is not None and recording.holds():
            self._last = recording
            recording.bind(asked.cache)
            return recording.step(asked)
        self._ran[form] = self._ran.get(form, 0) + 1
        if self._ran[form] <= EAGER_STEPS:
            return call.run()
        return self._record(call, asked, form)

    def _record(self, call: Call, asked: Asked, form: Form) -> object:
        """Record a step, and run it as it is besides: both must give the same."""
        recording, recorded, reason = None, None, "what was recorded gives something else"
        try:
            recording = Recording(call, asked, form)
            recorded = recording.first(asked)
        except (RuntimeError, UnrecordableError) as error:
            reason = str(error).strip().partition("\n")[0]
        output = call.run()
        if recording is not None and recorded is not None and recording.same(recorded, output):
            _remember(call.module, form, recording)
            self._last = recording
            return output
        self._refused.add(form)
        name = type(call.module).__name__
        if form.compiled:
            self._ran[form._replace(compiled=False)] = EAGER_STEPS
            logger.warning("steps of %s are recorded without torch.compile: %s", name, reason)
        else:
            logger.warning("steps of %s are not recorded, and decode as they are: %s", name, reason)
        return output


def _recalled(model: nn.Module, form: Form) -> Recording | None:
    with _LOCK:
        for key in [key for key in _LATEST if key[0]() is None]:
            del _LATEST[key]  # With its model, whatever a recording needs is gone.
        recording = _LATEST.get((ref(model), form))
        if recording is not None:
            _LATEST.move_to_end((ref(model), form))
        return recording


def _remember(model: nn.Module, form: Form, recording: Recording) -> None:
    """Keep a recording, and let those go that were used longest ago."""
    with _LOCK:
        _LATEST[ref(model), form] = recording
        while len(_LATEST) > MOST_RECORDINGS:
            _LATEST.popitem(last=False)


_STEPS: WeakKeyDictionary[nn.Module, Steps] = WeakKeyDictionary()


def stand_around(model: nn.Module, decoder: nn.Module, selection: Selection) -> None:
    """Let forwards of a model be recorded for as long as a selection lives, on a GPU."""
    if not (isinstance(model, PreTrainedModel) and records_on(model.device)):
        return
    with _LOCK:
        if model in selection.recorded:
            return
        selection.recorded.add(model)
        _STEPS.setdefault(model, Steps(decoder))
    user = object()
    around = put_around(model, "forward", _forward, user, traced=True)
    finalize(selection, _leave, ref(model), around, user).atexit = False


def records_on(device: torch.device) -> bool:
    """Tell whether steps are recorded on a device."""
    return device.type == "cuda"


def _leave(model: Callable[[], nn.Module | None], around: Around, user: object) -> None:
    found = model()
    if found is not None:
        take_away(found, "forward", around, user)


def _forward(call: Call) -> object:
    """Let a forward of one token on a compressed cache be recorded; run any other as it is."""
    if not is_recorded() or torch.is_grad_enabled():
        return call.run()
    steps = _STEPS.get(call.module)
    asked = None if steps is None else _asked(call.named(), steps.windows)
    if asked is None or steps is None or steps.is_observed():
        return call.run()
    return steps.forward(call, asked)


def _asked(given: Mapping[str, object], windows: frozenset[int]) -> Asked | None:
    """Read the arguments of a forward; None where it is no step that can be recorded."""
    ids, positions, mask = (
        given.get(name) for name in ("input_ids", "position_ids", "attention_mask")
    )
    names = [name for name in _CACHES if given.get(name) is not None]
    odd = [x for name, x in given.items() if name not in _UNDERSTOOD and x is not None]
    wanted = given.get("use_cache") in (None, True) and given.get("return_dict") in (None, True)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or not wanted:
        return None
    if len(names) != 1 or any(x is not False for x in odd):
        return None
    cache = cast(Cache, given[names[0]])
    if not can_step(getattr(cache, "layers", ()), len(ids), windows):
        return None
    n = cache.get_seq_length() + 1
    right = mask is None or (isinstance(mask, Tensor) and mask.shape == (len(ids), n))
    placed = positions is None or (isinstance(positions, Tensor) and positions.shape == ids.shape)
    if not right or not placed:
        return None
    options = tuple((name, x) for name in ("logits_to_keep",) if (x := given.get(name)) is not None)
    if not all(isinstance(x, int) for _, x in options):
        return None
    return Asked(
        ids, cast(Tensor | None, positions), cast(Tensor | None, mask), cache, names[0], options
    )


def _windows(decoder: nn.Module) -> frozenset[int]:
    """List the layers of a decoder whose tokens see a window of the newest ones.

    Others that transformers keeps in the same kind of cache layer, as chunks, see something else.
    """
    config = cast(PreTrainedModel, decoder).config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    return frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
