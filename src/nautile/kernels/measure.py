"""Time the kernels in V4-Flash's shapes on this GPU, beside their floors and beside the libraries made for the same work.

All calls of a case lie in one CUDA graph and every call has inputs of its own, at least 60 MB in all, so that neither launch
gaps of the host nor a warm cache flatter a figure. The floor of a case is the larger of its bytes over the card's copy rate
and its operations over the card's bfloat16 product rate, both measured first. Peers are timed the same way, in the same run,
where they are installed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nautile.kernels.decode.linear import Matrix, linear, linear_reference
from nautile.kernels.decode.streams import Site, join, join_reference, mix, mix_reference
from nautile.kernels.fp4_experts import FewTiles, FP4Experts, ManyTiles, fp4_experts, fp4_experts_reference
from nautile.kernels.index_select import Kernel, index_scores_reference, index_select, index_select_reference
from nautile.kernels.row_pool import RowPool
from nautile.kernels.sparse_attention import HopperTiles, fast_split, sparse_attention, sparse_attention_reference
from nautile.quant import mxfp4

__all__ = [
    "CASES", "VARIANTS", "CardLostError", "Case", "Ceilings", "Measured", "best", "ceilings", "measure", "microseconds", "run",
]  # fmt: skip

HEADS, C, ROW = 64, 512, 584
_COLD = 60 << 20  # bytes that the calls of a graph read together, more than the L2 of an H100
Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this card does: bytes a second (read plus written) of a large copy, bfloat16 operations a second."""

    copy: float
    product: float

    def floor(self, flops: float, read: float) -> float:
        """Microseconds below which the work cannot be done."""
        return 1e6 * max(flops / self.product, read / self.copy)


@dataclass(frozen=True)
class Case:
    """One line of the table: ``make(peer)`` returns the work, for a peer's call the same without an error."""

    name: str
    bar: str
    make: Callable[[], Work]
    peer: Callable[[], list[Call]] | None = None


@dataclass(frozen=True)
class Work:
    """Calls that do the same on different inputs, the relative error of one, operations and least bytes of each."""

    calls: list[Call]
    error: float
    flops: float
    read: float


@dataclass(frozen=True)
class Measured:
    """Microseconds of ours, of the floor and of the peer (None without one); ``failure`` instead of all where it failed."""

    name: str
    bar: str
    ours: float | None
    floor: float | None
    error: float | None
    peer: float | None
    failure: str = ""


def microseconds(calls: list[Call], rounds: int = 9) -> float:
    """Median time of one call in a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / len(calls))
    return statistics.median(times)


def ceilings() -> Ceilings:
    """Measure the card: a copy of 4 GiB and a product of 8,192 x 8,192 x 8,192."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds([lambda: target.copy_(source)] * 3)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = 2 * 8192**3 / microseconds([lambda: torch.mm(a, b, out=out)] * 4)
    return Ceilings(copy * 1e6, product * 1e6)


def measure(case: Case, card: Ceilings) -> Measured:
    """One case; a failure becomes a line of the table, not its end."""
    try:
        work = case.make()
        ours = microseconds(work.calls)
    except Exception as failure:
        return Measured(case.name, case.bar, None, None, None, None, repr(failure)[-300:])
    try:
        peer = microseconds(case.peer()) if case.peer else None
    except ImportError:
        peer = None
    return Measured(case.name, case.bar, ours, card.floor(work.flops, work.read), work.error, peer)


def _error(out: Tensor, reference: Tensor) -> float:
    """||out - ref|| / ||ref||."""
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def _pool(rows: int) -> RowPool:
    """Packed rows of random values."""
    data = torch.zeros(rows, ROW, dtype=torch.uint8, device="cuda")
    data[:, :448] = (torch.randn(rows, 448, device="cuda") * 20).to(torch.float8_e4m3fn).view(torch.uint8)
    data[:, 448:576] = torch.randn(rows, 64, device="cuda").bfloat16().view(torch.uint8)
    data[:, 576:583] = torch.randint(119, 125, (rows, 7), device="cuda", dtype=torch.uint8)
    return RowPool(data.flatten(), ROW, C, 64)


def _sets(read: int) -> int:
    return max(3, min(160, _COLD // read)) if read < 1 << 30 else 1


def _attention(tokens: int, far_count: int, far_rows: int, kernel: HopperTiles | None = None) -> Work:
    """128 window rows and ``far_count`` of ``far_rows`` entries a query; splits as fast as the batch allows."""
    read = tokens * (128 + far_count) * ROW
    near, far, sink = _pool(65536), _pool(far_rows), torch.randn(HEADS, device="cuda")
    block = kernel.rows if kernel else HopperTiles().rows
    tiles = fast_split(tokens, HEADS, 128, far_count, block=block)
    calls: list[Call] = []
    for _ in range(_sets(read)):
        q = torch.randn(tokens, HEADS, C, device="cuda", dtype=torch.bfloat16)
        near_ids = torch.randint(0, 65536, (tokens, 128), dtype=torch.int32, device="cuda")
        far_ids = torch.randint(0, far_rows, (tokens, far_count), dtype=torch.int32, device="cuda")
        calls.append(
            lambda q=q, i=near_ids, j=far_ids: sparse_attention(  # type: ignore[misc]
                q, near, i, far, j, sink, tiles_per_split=tiles, tiles=kernel
            )
        )
    some = slice(-min(tokens, 3), None)
    right = sparse_attention_reference(q[some].double(), near, near_ids[some], far, far_ids[some], sink)
    out = calls[-1]()
    assert isinstance(out, Tensor)
    least = min(read, (65536 + far_rows) * ROW) + 4 * q.numel()
    return Work(calls, _error(out[some], right), 4.0 * tokens * HEADS * (128 + far_count) * C, least)


def _indexer(tokens: int, count: int, k: int = 512, kernel: Kernel = "auto") -> Work:
    """64 heads of 128 over ``count`` stored FP4 keys, exact top-k; a selection that is not exact is an error of 1."""
    visible = torch.full((tokens,), count, dtype=torch.int32, device="cuda")
    calls: list[Call] = []
    for _ in range(_sets(count * 68)):
        codes, scales = mxfp4.encode(torch.randn(count, 128, device="cuda"))
        keys = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=-1)
        q = mxfp4.decode(*mxfp4.encode(torch.randn(tokens, 64, 128, device="cuda"))).bfloat16()
        weights = torch.randn(tokens, 64, device="cuda")
        calls.append(lambda q=q, w=weights, s=keys: index_select(q, w, s, visible, k, kernel=kernel))  # type: ignore[misc]
    scores, selected = index_select(q, weights, keys, visible, k, kernel=kernel)
    wrong = _error(scores[:1], index_scores_reference(q[:1], weights[:1], keys))
    exact = torch.equal(selected[:1], index_select_reference(scores[:1], visible[:1], k))
    return Work(calls, wrong if exact else 1.0, 2.0 * tokens * 64 * 128 * count, count * 68)


def _experts(tokens: int, tiles: FewTiles | ManyTiles | None = None, top: int = 6, count: int = 256) -> Work:
    """Flash's routed experts (4,096 x 2,048) on FP4 weights, uniform routing."""

    def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (count, rows, columns // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.randint(118, 122, (count, rows, columns // 32), dtype=torch.uint8, device="cuda")

    weights = FP4Experts(*packed(2048, 4096), *packed(2048, 4096), *packed(4096, 2048), 10.0)
    calls: list[Call] = []
    read = 0.0
    for _ in range(4):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        chosen = torch.stack([torch.randperm(count, device="cuda")[:top] for _ in range(tokens)])
        shares = torch.rand(tokens, top, device="cuda")
        calls.append(lambda x=x, c=chosen, s=shares: fp4_experts(x, c, s, weights, tiles=tiles))  # type: ignore[misc]
        read += len(chosen.unique()) * 3 * 4096 * 2048 * (0.5 + 1 / 32) / 4
    some = slice(0, min(tokens, 3))
    right = fp4_experts_reference(x[some], chosen[some], shares[some], weights)
    wrong = _error(fp4_experts(x, chosen, shares, weights, tiles=tiles)[some], right)
    return Work(calls, wrong, 2.0 * tokens * top * 3 * 4096 * 2048, read)


def _streams(tokens: int, joined: bool, n: int = 4, d: int = 4096) -> Work:
    """One site's reading of the streams, or its writing back of two parts."""
    site = Site(
        torch.randn((2 + n) * n, n * d, device="cuda") / (n * d) ** 0.5, torch.randn((2 + n) * n, device="cuda"),
        torch.rand(3, device="cuda") + 0.5, torch.rand(d, device="cuda") + 0.5, 20, 1e-6, 1e-6,
    )  # fmt: skip
    calls: list[Call] = []
    whole = tokens * n * d * 4
    for _ in range(_sets(whole)):
        x = torch.randn(tokens, n, d, device="cuda")
        if joined:
            parts = tuple(torch.randn(tokens, d, device="cuda") for _ in range(2))
            _, post, matrix = mix_reference(x, site, torch.bfloat16)
            calls.append(lambda x=x, p=parts, a=post, m=matrix: join(x, p, a, m))  # type: ignore[misc]
        else:
            calls.append(lambda x=x: mix(x, site, torch.bfloat16)[0])  # type: ignore[misc]
    out = calls[-1]()
    assert isinstance(out, Tensor)
    wide = x.double()
    if joined:
        return Work(
            calls, _error(out, join_reference(wide, parts, post.double(), matrix.double())), 0.0, 2.0 * whole + whole / 2
        )
    fields = (site.fn.double(), site.base.double(), site.scale.double(), site.norm.double())
    right = mix_reference(wide, Site(*fields, site.iterations, site.eps, site.norm_eps), torch.float64)[0]
    return Work(calls, _error(out, right), 0.0, whole + whole / 8 + site.fn.nbytes)


def _flash_mla(tokens: int, far_count: int, blocks: int, page: int) -> list[Call]:
    """FlashMLA's decode on its own V4 rows (any bytes that are finite numbers)."""
    import flash_mla  # noqa: PLC0415

    near, far = (
        torch.randint(0x30, 0x3F, (n, size, 1, ROW), dtype=torch.uint8, device="cuda")
        for n, size in ((1024, 64), (blocks, page))
    )
    sink = torch.randn(HEADS, device="cuda")

    def one() -> Call:
        q = torch.randn(tokens, 1, HEADS, C, device="cuda", dtype=torch.bfloat16)
        ids = torch.randint(0, 65536, (tokens, 1, 128), dtype=torch.int32, device="cuda")
        extra = torch.randint(0, blocks * page, (tokens, 1, far_count), dtype=torch.int32, device="cuda")
        plan = flash_mla.get_mla_metadata()[0]
        return lambda: flash_mla.flash_mla_with_kvcache(
            q, near, None, None, C, plan, indices=ids, attn_sink=sink, extra_k_cache=far, extra_indices_in_kvcache=extra,
            use_legacy=True, kv_format="V4",
        )  # fmt: skip

    return [one() for _ in range(_sets(tokens * (128 + far_count) * ROW))]


def _flash_mla_prefill(rows: int) -> list[Call]:
    """FlashMLA's prefill: 4,096 queries, 640 of ``rows`` bfloat16 rows each."""
    import flash_mla  # noqa: PLC0415

    kv = torch.randn(rows, 1, C, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(4096, HEADS, C, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, rows, (4096, 1, 640), dtype=torch.int32, device="cuda")
    sink = torch.randn(HEADS, device="cuda")
    return [lambda: flash_mla.flash_mla_sparse_fwd(q, kv, ids, C**-0.5, attn_sink=sink, use_legacy=True)] * 2


def _deep_gemm(tokens: int, count: int) -> list[Call]:
    """DeepGEMM's logits of FP8 keys and torch.topk, which leaves ties to the device."""
    import deep_gemm  # noqa: PLC0415

    q = torch.randn(tokens, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    keys, scales = torch.randn(count, 128, device="cuda").to(torch.float8_e4m3fn), torch.rand(count, device="cuda")
    weights = torch.randn(tokens, 64, device="cuda")
    first = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    last = torch.full((tokens,), count, dtype=torch.int32, device="cuda")
    return [lambda: deep_gemm.fp8_mqa_logits(q, (keys, scales), weights, first, last).topk(512)] * 3


def _decode_case(tokens: int, far_count: int, bar: str) -> Case:
    """A decode step: the indexer's 512 of 262,144 entries, or HCA's 8,192 of 65,536, which FlashMLA has in pages of two."""
    rows, blocks, page = (262144, 4096, 64) if far_count == 512 else (65536, 32768, 2)
    return Case(
        f"decode 128+{far_count:,}, batch {tokens}", bar,
        lambda: _attention(tokens, far_count, rows), lambda: _flash_mla(tokens, far_count, blocks, page),
    )  # fmt: skip


def _prefill_case(rows: int) -> Case:
    return Case(
        f"prefill 4,096 x 640 of {rows:,}",
        "<= 1.33 x peer",
        lambda: _attention(4096, 512, rows),
        lambda: _flash_mla_prefill(rows),
    )


CASES = (
    _decode_case(1, 512, "<= 12 us"),
    _decode_case(8, 512, "<= 1.0 x peer"),
    _decode_case(32, 512, "<= 1.1 x peer"),
    _decode_case(128, 512, "<= 1.2 x peer"),
    _decode_case(1, 8192, "<= 0.8 x peer"),
    _decode_case(8, 8192, "<= 1.0 x peer"),
    _decode_case(32, 8192, "<= 1.2 x peer"),
    _prefill_case(5120),
    _prefill_case(262144),
    Case("indexer 1 x 262,144 + top-512", "<= 40 us", lambda: _indexer(1, 262144), lambda: _deep_gemm(1, 262144)),
    Case("indexer 16 x 65,536 + top-512", "", lambda: _indexer(16, 65536), lambda: _deep_gemm(16, 65536)),
    Case(
        "indexer 4,096 x 65,536 + top-512",
        "<= 1.43 x peer",
        lambda: _indexer(4096, 65536, kernel="many"),
        lambda: _deep_gemm(4096, 65536),
    ),
    Case("FP4 experts, 1 token", ">= 65 % of floor", lambda: _experts(1)),
    Case("FP4 experts, 32 tokens", "", lambda: _experts(32)),
    Case("FP4 experts, 4,096 tokens", ">= 55 % of floor", lambda: _experts(4096)),
    Case("mHC mix, 4,096 tokens", ">= 60 % of floor", lambda: _streams(4096, False)),
    Case("mHC join, 4,096 tokens", ">= 60 % of floor", lambda: _streams(4096, True)),
    Case("mHC mix, 1 token", "", lambda: _streams(1, False)),
    Case("mHC join, 1 token", "", lambda: _streams(1, True)),
)


_ATTENTION = (
    HopperTiles(),
    HopperTiles(registers=80, serial=True),
    HopperTiles(registers=80, serial=True, half=True),
    HopperTiles(rows=32, stages=4),
    HopperTiles(rows=32, stages=4, warps=4, registers=104),
    HopperTiles(rows=32, stages=4, serial=True),
    HopperTiles(rows=32, stages=3),
)


def _attention_variants(tokens: int, far_count: int, far_rows: int) -> tuple[Case, ...]:
    """Sizes of Hopper's own attention kernel for one shape: those that are the default, and those that were prepared."""
    shape = f"attention {tokens} x 128+{far_count:,} of {far_rows:,}"
    sizes = (
        _ATTENTION if tokens < 1024 else tuple(size for size in _ATTENTION if not size.half)
    )  # one split has no sums to keep
    return tuple(Case(f"{shape} | {size}", "", partial(_attention, tokens, far_count, far_rows, size)) for size in sizes)


def _expert_variants(tokens: int, sizes: tuple[FewTiles | ManyTiles, ...]) -> tuple[Case, ...]:
    return tuple(Case(f"experts {tokens} | {size}", "", partial(_experts, tokens, size)) for size in sizes)


def _indexer_variants(tokens: int, count: int) -> tuple[Case, ...]:
    kernels: tuple[Kernel, ...] = ("auto", "warpgroup", "many")
    return tuple(
        Case(f"indexer {tokens} x {count:,} | {kernel}", "", partial(_indexer, tokens, count, kernel=kernel))
        for kernel in kernels
    )


def _linear(rows: int, inputs: int, stored: torch.dtype, vector: bool) -> Work:
    """A stored matrix times one token."""
    size = torch.empty(0, dtype=stored).itemsize
    calls: list[Call] = []
    for _ in range(_sets(rows * inputs * size)):
        data, scales = torch.randn(rows, inputs, device="cuda").to(stored), None
        if stored == torch.float8_e4m3fn:
            scales = torch.randint(118, 122, (-(-rows // 128), -(-inputs // 128)), dtype=torch.uint8, device="cuda")
        matrix = Matrix(data, scales.view(torch.float8_e8m0fnu) if scales is not None else None)
        x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
        calls.append(lambda x=x, matrix=matrix: linear(x, matrix, vector=vector))  # type: ignore[misc]
    out = calls[-1]()
    assert isinstance(out, Tensor)
    return Work(calls, _error(out, linear_reference(x.double(), matrix)), 2.0 * rows * inputs, rows * inputs * size)


def _linear_variants(rows: int, inputs: int, stored: torch.dtype) -> tuple[Case, ...]:
    name = str(stored).removeprefix("torch.")
    return tuple(
        Case(f"linear {rows:,} x {inputs:,} {name} | {way}", "", partial(_linear, rows, inputs, stored, way == "vector"))
        for way in ("tensor cores", "vector")
    )


_FEW = (
    FewTiles(),
    FewTiles(direct=True),
    FewTiles(4, 32, 32, direct=True, split=2),
    FewTiles(4, 16, 16, direct=True, split=2),
    FewTiles(4, 16, 16, direct=True, split=4),
)
_MANY = (ManyTiles(), ManyTiles(88, spread=True), ManyTiles(88), ManyTiles(spread=True))
_FP8 = torch.float8_e4m3fn

# Ways to compute the same: "shape | way", those first that most depends on. The first of a shape is the default. ``best``
# says which was fastest.
VARIANTS = (
    *_attention_variants(8, 512, 262144),
    *_expert_variants(1, _FEW),
    *_linear_variants(40960, 1024, _FP8),
    *_linear_variants(8192, 4096, _FP8),
    *_linear_variants(4096, 8192, _FP8),
    *_linear_variants(1536, 4096, _FP8),
    *_linear_variants(2624, 4096, torch.bfloat16),
    *_linear_variants(256, 4096, torch.float32),
    *_attention_variants(4096, 512, 5120),
    *_expert_variants(4096, _MANY),
    *_indexer_variants(1, 262144),
    *_attention_variants(32, 512, 262144),
    *_attention_variants(128, 512, 262144),
    *_attention_variants(1, 512, 262144),
    *_attention_variants(8, 8192, 65536),
    *_attention_variants(32, 8192, 65536),
    *_attention_variants(4096, 512, 262144),
    *_attention_variants(1, 8192, 65536),
    *_indexer_variants(16, 65536),
    *_indexer_variants(512, 65536),
)


def best(measured: Sequence[Measured], bound: float = 8e-3) -> dict[str, dict[str, object]]:
    """For each shape of ``VARIANTS`` the fastest way whose error is below ``bound``, and how much faster than the default it
    is; a shape of which no way worked has none."""
    shapes: dict[str, list[Measured]] = {}
    for row in measured:
        shapes.setdefault(row.name.split(" | ")[0], []).append(row)
    out: dict[str, dict[str, object]] = {}
    for shape, ways in shapes.items():
        right = [row for row in ways if row.ours is not None and row.error is not None and row.error < bound]
        if not right:
            out[shape] = {"best": None}
            continue
        first = min(right, key=lambda row: row.ours or 0.0)
        default = ways[0].ours
        out[shape] = {
            "best": first.name.split(" | ")[1], "us": first.ours, "default_us": default,
            "times_faster": round(default / first.ours, 3) if default and first.ours else None,
        }  # fmt: skip
    return out


class CardLostError(RuntimeError):
    """A kernel's fault, after which the card does not answer this process."""


def run(
    cases: Sequence[Case],
    about: dict[str, Any],
    out: Path | None,
    *,
    resume: bool = False,
    told: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure all of them: what ``about`` says, the card, "rows", and "best" where a case is one of several ways.

    ``out`` is written anew after each case. With ``resume`` the cases in it are not measured again, and the one that a run
    ended in counts as a failure. Raises CardLostError when the others need another process.
    """
    rows = _earlier(out) if resume and out else []
    card = ceilings()
    told(f"{torch.cuda.get_device_name()}: copy {card.copy / 1e9:.0f} GB/s, bfloat16 {card.product / 1e12:.0f} TFLOP/s")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, **about,
        "copy_bytes_per_second": card.copy, "bfloat16_flops_per_second": card.product,
    }  # fmt: skip

    def keep(more: dict[str, Any]) -> None:
        result["rows"] = [asdict(row) for row in rows]
        if any(" | " in row.name for row in rows):
            result["best"] = best(rows)
        if out:
            out.write_text(json.dumps({**result, **more}, indent=1) + "\n", encoding="utf-8")

    for case in cases:
        if case.name in {row.name for row in rows}:
            continue
        keep({"running": {"name": case.name, "bar": case.bar}})  # who hangs is named by what is left
        rows.append(measure(case, card))
        told(_line(rows[-1]))
        keep({})
        if rows[-1].failure and not _card_lives():
            raise CardLostError(f"the card does not answer after {case.name}: run this again with --resume")
        torch.cuda.empty_cache()
    keep({})
    for shape, way in result.get("best", {}).items():
        told(f"{shape}: {way}")
    return result


def _card_lives() -> bool:
    """Whether this process can still use the card; after a kernel's fault it cannot."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def _earlier(out: Path) -> list[Measured]:
    """What an earlier run left, and a line that says what it ended in."""
    if not out.exists():
        return []
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = [Measured(**row) for row in found.get("rows", ())]
    if "running" in found:
        case = found["running"]
        rows.append(Measured(case["name"], case["bar"], None, None, None, None, "a run ended in this: it hangs or crashes"))
    return rows


def _line(row: Measured) -> str:
    """One line of the table of kernels."""
    if row.ours is None or row.floor is None:
        return f"{row.name:32s} FAILED {row.failure}"
    peer = f"peer {row.peer:8.1f} us ({row.ours / row.peer:4.2f} x)" if row.peer else " " * 24
    share = f"{row.floor / row.ours:4.0%} of floor"
    return f"{row.name:32s} {row.ours:9.1f} us  {share}  {peer}  bar {row.bar:16s} error {row.error:.1e}"
