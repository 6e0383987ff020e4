"""What a GPU should show, computed from the cells: ratios of times and of bytes."""

from typing import NamedTuple

from benchmarks.card.records import LINE, NO_TIME, Record

SERIES = ("snapkv", "adakv", "knorm", "keydiff", "tova", "streaming_llm")
REPEATS_CONTEXT = ("kvzip", "kvgrad")
"""Presses under which the model reads its context again, and whose peak may be higher."""
BIG = 2**28
"""Bytes that attention of a layer has to read before it is held to the bandwidth of a copy."""
ADA_90, ADA_75, WHOLE, DYNAMIC = (
    "AdaKV(SnapKV) 0.9",
    "AdaKV(SnapKV) 0.75",
    "whole, ours",
    "DynamicCache",
)


class Wanted(NamedTuple):
    """A figure, and what it should be.

    Attributes:
        what: in words.
        value: the figure; None where a part of it was not measured.
        bound: what it should not exceed, or be below.
        least: whether the bound is the least and not the most.
    """

    what: str
    value: float | None
    bound: float
    least: bool = False

    @property
    def said(self) -> str:
        """Whether it is what it should be, in a word."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.bound if self.least else self.value <= self.bound
        return "yes" if met else "no"


def wanted(record: Record) -> list[Wanted]:
    """Compute every figure of a run."""
    return [*_steps(record), *_attention(record), *_prefill(record), *_parity(record)]


def ratio(above: float | None, below: float | None) -> float | None:
    """Divide, where both were measured; differences of times can come out below 0."""
    return None if above is None or below is None or below <= 0 else above / below


def _steps(record: Record) -> list[Wanted]:
    long, (one, some, _) = record.sizes["long"], record.sizes["batches"]  # type: ignore

    def ms(cache: str, way: str = "loop", batch: object = one, key: str = "ms") -> float | None:
        own = {"cache": cache, "way": way, "batch": batch, "length": long}
        modes = ("recorded", "eager", "transformers")
        found = (record.one("decode", key, mode=mode, **own) for mode in modes)
        return next((x for x in found if x is not None), None)

    def few(cache: str, mode: str | None = None) -> float | None:
        own = {"cache": cache, "length": long} | ({} if mode is None else {"mode": mode})
        return record.one("transformers", "ms", **own)

    own = {"cache": ADA_90, "batch": one, "length": long, "mode": "compiled"}
    static = few("StaticCache, compiled")
    best = min((x for x in (few(ADA_90), few(ADA_90, "compiled")) if x is not None), default=None)
    return [
        Wanted(f"a token, {one} x {long}, 0.9: times its limit", ms(ADA_90, key="of_limit"), 2.0),
        Wanted("the same, compiled", record.one("decode", "of_limit", **own), 1.6),
        Wanted(
            "transformers' `generate()` with a DynamicCache, times ours",
            ratio(ms(DYNAMIC, "generate()"), ms(ADA_90, "generate()")),
            5.0,
            True,
        ),
        Wanted(
            "transformers' compiled StaticCache on some layers, times ours",
            ratio(static, best),
            1.0,
            True,
        ),
        Wanted(
            f"tokens a second, {some} x {long}, 0.75: times those of the whole cache",
            ratio(ms(WHOLE, batch=some), ms(ADA_75, batch=some)),
            1.6,
            True,
        ),
        Wanted(
            "`generate()` there: times the loop",
            ratio(ms(ADA_75, "generate()", some), ms(ADA_75, batch=some)),
            1.3,
        ),
    ]


def _attention(record: Record) -> list[Wanted]:
    short, (one, *_) = record.sizes["short"], record.sizes["batches"]  # type: ignore
    small = {"batch": one, "length": short, "ratio": 0.9, "even": False}
    whole = list(record.measured("kernel", ratio=0.0, storage="full"))
    big = [x for x in record.measured("kernel", storage="full") if float(x["bytes"]) >= BIG]  # type: ignore
    return [
        Wanted(
            f"attention of a layer, {one} x {short}, 0.9 unevenly: times SDPA over all pairs",
            record.one("kernel", "of_sdpa", **small),
            1.0,
        ),
        Wanted(
            "the least share of a copy's bandwidth, from 256 MiB on",
            min((float(x["of_copy"]) for x in big), default=None),  # type: ignore
            0.8,
            True,
        ),
        Wanted(
            "over all pairs: times SDPA, at most, from 256 MiB on",
            max((float(x["of_sdpa"]) for x in whole if x in big), default=None),  # type: ignore
            1.15,
        ),
    ]


def _prefill(record: Record) -> list[Wanted]:
    few = record.sizes["few_layers"]

    def added(name: str, length: object, key: str = "seconds") -> float | None:
        own = {"length": length, "layers": few}
        found = (record.one("peaks", key, press=press, **own) for press in (name, "none"))
        share = ratio(*found)
        return None if share is None else share - 1

    def most(names: tuple[str, ...], length: object, key: str = "seconds") -> float | None:
        found = [x for x in (added(name, length, key) for name in names) if x is not None]
        return max(found, default=None)

    short, long = record.sizes["short"], record.sizes["long"]
    others = [str(x["press"]) for x in record.measured("peaks", length=long, layers=few)]
    calm = tuple(name for name in others if name not in ("none", *REPEATS_CONTEXT))
    cheap = ", ".join(SERIES)
    expected = ("expected_attention",)
    return [
        Wanted(f"most that {cheap} add to a prefill of {short}", most(SERIES, short), 0.08),
        Wanted(f"the same at {long}", most(SERIES, long), 0.03),
        Wanted(f"what expected_attention adds at {long}", most(expected, long), 0.15),
        Wanted("most that any other press adds to the peak", most(calm, long, "peak_mib"), 0.10),
    ]


def _parity(record: Record) -> list[Wanted]:
    total = sum(x.get(LINE) != NO_TIME for x in record.cells("parity").values())
    equal = len(list(record.measured("parity", equal=True)))
    return [Wanted("share of comparisons that are equal", ratio(equal, total), 1.0, True)]
