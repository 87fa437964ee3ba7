# SPDX-License-Identifier: Apache-2.0
"""The family's own page: what was aimed at and what was found, and what each operator takes, from a results file."""

from __future__ import annotations

from cofire.bench.results import Results
from cofire.bench.targets import (
    BOTH_WAYS,
    HOT,
    Draw,
    Found,
    Index,
    Key,
    Target,
    beside,
    faster,
    index_of,
    memory_share,
    page,
    ratio,
)

SELECT, GATHER = "1x32, 256 and 256 of 1024", "1x32, 256 of 1024x128"
FUSE = {"1,024 to 512": "1x32, 1024x256 to 512, 21 taps", "768 to 256": "1x32, 768x256 to 256, 21 taps"}
STEP = "a decoding step with its cache, 1x{}, 4096 keys of 128"
MASKED = "1x32, 700 tokens of 128, half of them dropped"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _select_and_gather(index: Index, results: Results) -> Found:
    """Both one after the other."""
    times = [
        sum(index[case, "float32", HOT, provider]["median_ms"] for case in (SELECT, GATHER))
        for provider in ("eager", "cofire")
        if all((case, "float32", HOT, provider) in index for case in (SELECT, GATHER))
    ]
    return [("", times[0] / times[1])] if len(times) == 2 else []


def _bandwidth(index: Index, results: Results) -> Found:
    rows = ((name, index.get((GATHER, dtype, HOT, "cofire"))) for name, dtype in DTYPES.items())
    return [(name, row["bytes"] / row["median_ms"] / 1e6) for name, row in rows if row is not None]


def _fuse(dtype: str, mode: str) -> dict[str, Key]:
    return {where: (case, dtype, mode) for where, case in FUSE.items()}


SCORES = {
    "causal": ("1x32, 512 queries, 1024 keys of 128, causal", "float32", HOT),
    "causal, heads in groups": ("1x32/8, 512 queries, 1024 keys of 128, causal", "float32", HOT),
    "all keys": ("1x32, 512 queries, 1024 keys of 128", "float32", HOT),
    "causal, bf16": ("1x32, 512 queries, 1024 keys of 128, causal", "bfloat16", HOT),
}
STEPS = {
    "": (STEP.format("32"), "float32", HOT),
    "heads in groups": (STEP.format("32/8"), "float32", HOT),
    "bf16": (STEP.format("32"), "bfloat16", HOT),
}
DROPPED = {name: (MASKED, dtype, BOTH_WAYS) for name, dtype in DTYPES.items()}
TARGETS = (
    Target("selection and copies, 32 heads, 1,024 tokens of 128, against eager", 4, "x", _select_and_gather),
    Target("the copies", 15, " GB/s", _bandwidth),
    Target("selection, copies and fusion, 8x4 heads, 192 tokens to 64 slots, 9 taps, against eager", 3, "x",
           faster("eager", {"": ("selection and copies too, 8x4, 192x32 to 64, 9 taps", "float32", HOT)})),
    Target("fusion, 32 heads, 21 taps, fp32, against eager", 1.2, "x", faster("eager", _fuse("float32", HOT))),
    Target("the same in bf16, against eager in bf16", 1, "x", faster("eager", _fuse("bfloat16", HOT))),
    Target("fusion, forward and backward, fp32, against eager", 1.5, "x", faster("eager", _fuse("float32", BOTH_WAYS))),
    Target("the same in bf16, against eager in bf16", 1.5, "x", faster("eager", _fuse("bfloat16", BOTH_WAYS))),
    Target("fusion, fp32: memory, of eager's", None, "", beside(memory_share, "eager", _fuse("float32", HOT))),
    Target("fusion, forward and backward, fp32: memory, of eager's", None, "",
           beside(memory_share, "eager", _fuse("float32", BOTH_WAYS))),
    Target("attention with scores, 512 queries, 1,024 keys, 32 heads of 128, against eager", 1.3, "x",
           faster("eager", SCORES)),
    Target("the same: memory, of eager's", 0.1, "", beside(memory_share, "eager", SCORES), most=True),
    Target("the same: time, in that of torch's attention without scores", 1.6, "x",
           beside(ratio, "peer:library without scores", SCORES), most=True),
    Target("a decoding step with its cache, 4,096 keys, against a cache by torch.cat", 2, "x", faster("eager", STEPS)),
    Target("masked attention, 700 tokens, forward and backward, against eager", 1.5, "x", faster("eager", DROPPED)),
    Target("the same: memory, of eager's", 0.2, "", beside(memory_share, "eager", DROPPED), most=True),
)  # fmt: skip

targets = page(
    "kv_fusion",
    'A target that was missed is bold. "x": how many times as fast, or how much of the time; memory is what a call holds at '
    "most, outputs included. fp32 and forward, unless stated.",
    TARGETS,
)
COMPRESS = "selection and copies too, {}"
#: What the table of times calls each case; in fp32 and in bf16 where it is, forward and both ways.
FIGURES = {
    "select 256 heavy and 256 merged of 1,024 tokens, 32 heads": SELECT,
    "gather them, 128 features": GATHER,
    "fuse 768 of them into 256, 21 taps": FUSE["768 to 256"],
    "fuse 1,024 into 512, 21 taps": FUSE["1,024 to 512"],
    "fuse 160 into 32, 8x4 heads, 9 taps": "8x4, 160x64 to 32, 9 taps",
    "selection, copies and fusion, 8x4 heads, 192 tokens to 64 slots, 9 taps": COMPRESS.format("8x4, 192x32 to 64, 9 taps"),
    "the same, 32 heads, 1,024 tokens to 512 slots, 21 taps": COMPRESS.format("1x32, 1024x128 to 512, 21 taps"),
    "attention with scores, 512 queries, 1,024 keys, 32 heads of 128, causal": SCORES["causal"][0],
    "the same, one query": "1x32, 1 queries, 1024 keys of 128, causal",
    "the same, 64 queries, 192 keys, 8x4 heads of 32": "8x4, 64 queries, 192 keys of 32, causal",
    "a decoding step with its cache, 4,096 keys, 32 heads of 128": STEP.format("32"),
    "the same, 32 heads of queries, 8 of keys": STEP.format("32/8"),
    "masked attention, 700 tokens, 32 heads of 128": MASKED,
    "write a token behind one sequence, 32 heads of 128": "1x32, 700 slots of 128",
}  # fmt: skip
TIMES = ("what", "type", "mode", "cofire", "against eager", "against plain torch", "memory, of eager's")


def _times(index: Index) -> list[list[str]]:
    """A line for each case that was measured."""
    found = []
    for what, case in FIGURES.items():
        for name, dtype in DTYPES.items():
            for mode in (HOT, BOTH_WAYS):
                ours, eager, dense = (index.get((case, dtype, mode, p)) for p in ("cofire", "eager", "dense"))
                if ours is not None:
                    words = f"{'~' if ours['noisy'] else ''}{ours['median_ms']:.3g} ms"
                    share = memory_share(ours, eager)
                    cells = [_cell(ratio(eager, ours)), _cell(ratio(dense, ours))]
                    found.append([what, name, mode, words, *cells, "-" if share is None else f"{share:.2g}"])
    return found


def _cell(times: float | None) -> str:
    text = "-" if times is None else f"{times:.3g}x"
    return f"**{text}**" if times is not None and times < 1 else text


def summary(results: Results, table: Draw) -> str:
    """Markdown; ``table`` draws one from headings and lines. What was missed, and what was lost, is bold."""
    words = "What each takes; `~`: the machine was busy, or the readings spread. Slower is bold."
    return "\n\n".join([targets(results, table), words, table(TIMES, _times(index_of(results, "kv_fusion")))])
