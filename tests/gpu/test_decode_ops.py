"""The fused operations of a decode step against their plain meanings, on fresh random inputs."""

import pytest
import torch

from nautile.kernels.decode import linear, query, routing, rows, streams
from nautile.quant import fp8, hadamard
from nautile.state.formats import IndexFormat


def close(out, expected, tolerance=1e-5):
    """Relative error in norm; NaN never passes."""
    error = (out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert float(error) <= tolerance, float(error)


def same_rows(found, expected, c, rotated):
    """Packed rows agree byte for byte but for values beside a rounding border. The rotated ones are bfloat16, which the
    interpreter cuts off where a GPU rounds: a last place more."""
    plain, end = c - rotated, c + rotated
    for part in (slice(0, plain), slice(end, None)):
        assert (found[..., part] != expected[..., part]).float().mean() < 0.01
    turned = [x[..., plain:end].contiguous().view(torch.bfloat16) for x in (found, expected)]
    close(*turned, 2e-3 if found.is_cuda else 2**-7)


def angles(tokens, rotated, device):
    turn = torch.rand(tokens, rotated // 2) * 7
    return rows.Angles(turn.cos().to(device), turn.sin().to(device))


@pytest.mark.parametrize(("tokens", "outputs", "inputs", "groups"), [(1, 32, 256, 1), (3, 384, 128, 1), (17, 64, 384, 2)])
@pytest.mark.parametrize("stored", ["fp8", "bf16"])
def test_linear(device, tokens, outputs, inputs, groups, stored):
    weight, x = torch.randn(outputs, inputs), torch.randn(tokens, groups * inputs)
    if stored == "fp8":
        data, scales = fp8.encode_blocks(weight * torch.logspace(-3, 3, outputs).unsqueeze(1))
        matrix = linear.Matrix(data.to(device), scales.to(device), groups)
    else:
        matrix = linear.Matrix(weight.bfloat16().to(device), None, groups)
    close(linear.launch(x.to(device), matrix).cpu(), linear.linear_reference(x.to(device), matrix).cpu(), 1e-6)


@pytest.mark.parametrize(("outputs", "inputs", "groups", "step"), [(32, 384, 1, 4096), (32, 640, 2, 256)])
@pytest.mark.parametrize("stored", ["fp8", "bf16", "float32"])
def test_a_single_token(device, dtype, outputs, inputs, groups, step, stored, monkeypatch):
    """Rows that one step reads and that many read, whatever the size of the tiles' powers of two."""
    monkeypatch.setattr(linear, "_STEP", step)
    monkeypatch.setattr(linear, "_rows_of_a_program", lambda rows: rows // 4)
    weight, x = torch.randn(outputs, inputs), torch.randn(1, groups * inputs).to(device, dtype)
    if stored == "fp8":
        data, scales = fp8.encode_blocks(weight)
        powers = torch.randint(40, 180, scales.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        for scales_ in (scales, powers):
            matrix = linear.Matrix(data.to(device), scales_.to(device), groups)
            close(linear.launch_vector(x, matrix), linear.linear_reference(x.double(), matrix), 1e-6)
    else:
        matrix = linear.Matrix(weight.to(device, torch.bfloat16 if stored == "bf16" else torch.float32), None, groups)
        close(linear.launch_vector(x, matrix), linear.linear_reference(x.double(), matrix), 1e-6)


def run_ptx(text, word):
    """The two results of a piece of PTX made of the instructions below, for one 32-bit input."""
    registers = {"$2": word}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    def halves(name):
        bits = torch.tensor([value(name) & 0xFFFF, value(name) >> 16], dtype=torch.int32)
        return (bits << 16).view(torch.float32).double()

    for line in text.splitlines():
        name, _, rest = line.strip().rstrip(";").partition(" ")
        arguments = [argument.strip() for argument in rest.split(",")]
        if name in ("", "{", "}", ".reg"):
            continue
        target, inputs = arguments[0], arguments[1:]
        if name == "prmt.b32":
            source = (value(inputs[1]) << 32 | value(inputs[0])).to_bytes(8, "little")
            selector = value(inputs[2])
            registers[target] = sum(source[selector >> 4 * place & 7] << 8 * place for place in range(4))
        elif name == "fma.rn.bf16x2":
            a, b, c = (halves(argument) for argument in inputs)
            low, high = (a * b + c).to(torch.bfloat16).view(torch.int16).tolist()
            registers[target] = (high & 0xFFFF) << 16 | (low & 0xFFFF)
        else:
            apply = {"mov.b32": lambda a: a, "and.b32": int.__and__, "or.b32": int.__or__, "shr.b32": int.__rshift__}[name]
            registers[target] = apply(*map(value, inputs))
    return registers["$0"], registers["$1"]


def test_the_assembly_decodes_every_code():
    """A card runs it, an interpreter does not: so its instructions are carried out here, for all codes but the two NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    words = codes.view(torch.int32).tolist()
    found = [half for word in words for pair in run_ptx(linear._DECODE.value, word & 0xFFFFFFFF) for half in (pair, pair >> 16)]
    values = torch.tensor([(half & 0xFFFF) << 16 for half in found], dtype=torch.int64).to(torch.int32).view(torch.float32)
    expected = codes.view(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert torch.equal(values[numbers], expected[numbers]) and int(numbers.sum()) == 254


def site(n, d, device):
    return streams.Site(
        torch.randn(24, n * d, device=device) / (n * d) ** 0.5, torch.randn(24, device=device),
        torch.rand(3, device=device) + 0.5, torch.rand(d, device=device) + 0.5, 20, 1e-6, 1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "d", "few"), [(1, 128, 64), (3, 384, 64), (2, 128, 1)])
def test_mix_and_join(device, tokens, d, few, monkeypatch):
    monkeypatch.setattr(streams, "_FEW", few)  # with more tokens than that, one product serves all of them
    x, own = torch.randn(tokens, 4, d, device=device) * 3, site(4, d, device)
    for out, expected in zip(
        streams.launch_mix(x, own, torch.float32), streams.mix_reference(x, own, torch.float32), strict=True
    ):
        close(out, expected)
    _, post, matrix = streams.mix_reference(x, own, torch.float32)
    for count in (1, 3, 4):
        parts = tuple(torch.randn(tokens, d, device=device) for _ in range(count))
        close(streams.launch_join(x, parts, post, matrix), streams.join_reference(x, parts, post, matrix))


def test_window_rows(device):
    tokens, low, c, rotated, width = 3, 96, 128, 64, 64 + 128 + 8
    projected, own = torch.randn(tokens, low + c, device=device), (torch.rand(low) + 0.5, torch.rand(c) + 0.5)
    norms = tuple(norm.to(device) for norm in own)
    turn, at = angles(tokens, rotated, device), torch.tensor([4, 0, 7], device=device)
    found, expected = (torch.zeros(9, width, dtype=torch.uint8, device=device) for _ in range(2))
    q = rows.launch_window(projected, norms, turn, found, at, 1e-6, torch.float32)
    close(q, rows._normal(projected[:, :low], norms[0], 1e-6))
    expected[at] = rows.encode_row(rows._turned(rows._normal(projected[:, low:], norms[1], 1e-6), turn), width, rotated)
    same_rows(found, expected, c, rotated)


@pytest.mark.parametrize(("ratio", "key"), [(4, False), (4, True), (128, False)])
def test_compressed_rows(device, ratio, key):
    """Sequences of different length step together; whatever each completes is what the plain meaning stores."""
    dim, rotated, layers, slots = (64, 16, 2, 4) if key else (128, 64, 2, 4)
    width = 2 * dim if ratio == 4 else dim
    row = 32 + 2 if key else 64 + 128 + 8
    ring = rows._RING[ratio]
    kept = [torch.randn(slots, layers, ring, width, device=device) for _ in range(2)]
    pools = [torch.zeros(6, layers, 3, row, dtype=torch.uint8, device=device) for _ in range(2)]
    signs = rows.hadamard_signs(dim, device) if key else None
    ape, norm = torch.randn(ratio, width, device=device), torch.rand(dim, device=device) + 0.5
    both = [
        rows.CompressorRows(ratio, ape, norm, kept[0].clone(), kept[1].clone(), pool, 1, 1e-6, rotated, signs) for pool in pools
    ]
    slot = torch.tensor([2, 0, 3], device=device)
    start = torch.tensor([0, 1, ratio * 3 - 2], device=device)
    for step in range(5 if ratio == 4 else 3):
        positions = start + step
        kv, gate = torch.randn(3, width + 8, device=device)[:, 8:], torch.randn(3, width, device=device)
        at = torch.tensor([0, 1, 2], device=device) * layers * 3 + positions // ratio % 3
        turn = angles(3, rotated, device)
        rows.launch_compress(kv, gate, both[0], slot, positions, at, turn)
        rows.compress_reference(kv, gate, both[1], slot, positions, at, turn)
    assert torch.equal(both[0].ring_kv, both[1].ring_kv) and torch.equal(both[0].ring_gate, both[1].ring_gate)
    assert pools[1].any() and not pools[0][:, 0].any()
    if not key:
        return same_rows(*pools, dim, rotated)
    found, expected = (IndexFormat(dim, row).decode(pool) for pool in pools)
    close(found, expected, 5e-3)
    assert (pools[0] != pools[1]).float().mean() < 0.01


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_turned_heads(device, back, eps):
    x, turn = torch.randn(2, 8, 128, device=device), angles(2, 64, device)
    out = query.launch_turn(x, turn, torch.float32, eps=eps, back=back)
    close(out.cpu(), query.turn_heads(x.cpu(), rows.Angles(turn.cos.cpu(), turn.sin.cpu()), torch.float32, eps=eps, back=back))


def test_index_queries(device):
    q, weights, turn = torch.randn(2, 32, 64, device=device), torch.randn(2, 40, device=device)[:, 8:], angles(2, 16, device)
    signs = rows.hadamard_signs(64, device)
    out, scaled = query.launch_index(q, weights, turn, signs, torch.float32)
    host = rows.Angles(turn.cos.cpu(), turn.sin.cpu())
    expected, factors = query.index_queries(q.cpu(), weights.cpu(), host, signs.cpu(), torch.float32)
    close(scaled.cpu(), factors)
    close(out.cpu(), expected, 5e-3)
    assert ((out.cpu() - expected).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("experts", [8, 24])
def test_routes(device, experts):
    logits, ids = torch.randn(4, experts, device=device) * 3, torch.tensor([3, 0, 2, 3], device=device)
    logits[1] = 0.5  # all tied
    table = torch.stack([torch.randperm(experts)[:4] for _ in range(5)]).to(device)
    for router in (routing.Router(torch.zeros(experts, device=device), None, 4, 1.5), routing.Router(None, table, 4, 2.5)):
        found, expected = routing.launch(logits, ids, router), routing.route_reference(logits, ids, router)
        assert torch.equal(found[0], expected[0])
        close(found[1], expected[1])


def test_gated(device):
    both = torch.randn(3, 96, device=device) * 10
    gate, up = both.cpu().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate.clamp(max=5.0)) * up.clamp(-5.0, 5.0)
    close(routing.gated(both.cpu(), 5.0, torch.float32), expected)
    if both.is_cuda:
        close(routing.gated(both, 5.0, torch.float32).cpu(), expected)


def test_signs_are_the_transform():
    x = torch.randn(5, 64)
    torch.testing.assert_close(x @ rows.hadamard_signs(64, x.device) / 8, hadamard.transform(x))
