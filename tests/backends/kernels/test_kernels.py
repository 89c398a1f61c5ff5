"""Every kernel in Triton's interpreter against float64: odd sizes, corners, outputs poisoned with NaN."""

import functools
import itertools
import json
from collections import defaultdict

import pytest
import torch

from bench.kernels import fused_products
from bench.kernels.checking import LIMITS
from bench.kernels.checks import checks
from bench.speed.tune import merged, winner, winners
from depass_fast.kernels import (
    allocation,
    attention,
    completeness,
    crowd,
    few,
    launch,
    linear,
    loudness,
    probabilities,
    rows,
)

CHECKS = list(checks(small=True))


HALF = [pytest.param(dtype, marks=pytest.mark.thorough) if dtype == torch.bfloat16 else dtype for dtype in LIMITS]


@pytest.mark.parametrize("dtype", HALF, ids=str)  # a kernel knows two kinds: of float32 and of half precision
@pytest.mark.parametrize("check", CHECKS, ids=[f"{c.kernel}: {c.case}" for c in CHECKS])
def test_a_kernel_agrees_with_float64(check, dtype):
    assert check.run(dtype, torch.device("cpu")) <= LIMITS[dtype]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("name", ["tokens", "many tiles, prompts and pieces"])
def test_components_may_be_mixed_one_or_two_at_a_time(name, columns, monkeypatch):
    """A GPU takes one or two components at a time; the interpreter takes more by default."""
    ordinary = attention.mix_config
    monkeypatch.setattr(
        attention, "mix_config", lambda *arguments, **has: ordinary(*arguments, **has) | {"BM": columns}
    )
    check = next(check for check in CHECKS if (check.kernel, check.case) == ("mix", name))
    assert check.run(torch.float16, torch.device("cpu")) <= LIMITS[torch.float16]


# -- launch configurations ------------------------------------------------------------------------------------------


def test_what_was_tuned_is_applied_to_its_own_shapes(monkeypatch):
    """A step that fits with 32 keys need not with 64, nor with another number of heads per key; one of 32 rows is
    waste for 4; nor is half precision's for float32."""
    cpu, asked = torch.device("cpu"), []
    monkeypatch.setattr(launch, "tuned", lambda device, kernel, bucket: asked.append((kernel, bucket)) or {"BI": 256})
    for longest, groups in ((20, 1), (40, 1), (40, 4), (100, 4), (500, 4)):
        launch.mix_config(longest, 128, groups, 64, torch.bfloat16, cpu)
    assert asked == [
        ("mix", f"{shape} d128 r64 {g}")
        for shape, g in (("one k32", "g1"), ("one k64", "g1"), ("one k64", "g4"), ("many", "g4"), ("many", "g4"))
    ]
    asked.clear()
    found = [launch.allocation_config(n, 11008, torch.bfloat16, cpu) for n in (3, 20, 500, 9000)]
    assert [bucket for _, bucket in asked] == ["one r4", "one r32", "some", "many"]
    assert [config["BI"] for config in found] == [256] * 4
    assert launch.allocation_config(3, 48, torch.bfloat16, cpu)["BI"] == 64  # there are no more
    asked.clear()
    launch.allocation_config(20, 11008, torch.float32, cpu)
    launch.mix_config(20, 128, 1, 16, torch.float32, cpu)
    assert not asked


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes the file of what was tuned; there are two GPUs, the second of which is called like one in it."""
    monkeypatch.setattr(launch, "TUNED", tmp_path / "tuned.json")
    monkeypatch.setattr(launch, "_device_name", ["Another", "Some GPU"].__getitem__)
    monkeypatch.setattr(launch, "architecture", ["sm_80", "sm_90"].__getitem__)

    def write(contents):
        launch.TUNED.write_text(json.dumps(contents))
        launch._table.cache_clear()

    yield write
    launch._table.cache_clear()


def test_what_was_tuned_is_read_for_its_device(table):
    table({"Some GPU": {"allocate": {"one r32": {"BI": 128, "num_warps": 16}}}})

    def found(device, longest=20):
        return launch.allocation_config(longest, 11008, torch.bfloat16, torch.device(device))

    computed = found("cpu")
    assert found("cuda:1") == computed | {"BI": 128, "num_warps": 16} != computed
    assert found("cuda:0") == found("cuda") == computed
    assert found("cuda:1", 500) == found("cpu", 500)


def test_a_devices_name_goes_before_its_architecture(table):
    one, other = {"one r32": {"BI": 128}}, {"one r32": {"BI": 32}, "some": {"BI": 16}}
    table({"Some GPU": {"allocate": one}, "sm_90": {"allocate": other}})
    device = torch.device("cuda:1")
    assert launch.tuned(device, "allocate", "one r32") == {"BI": 128}
    assert launch.tuned(device, "allocate", "some") == {"BI": 16}
    assert launch.tuned(torch.device("cuda:0"), "allocate", "some") == {}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"mix": {"many": {"typo": 3}}}, "Some GPU: mix: many: 'typo' is none of BK, BM, num_warps, num_stages"),
        ({"mix": {"many": {"BI": 64}}}, "Some GPU: mix: many: 'BI' is none of"),
        ({"allocate": {"some": {"BI": "64"}}}, "Some GPU: allocate: some: BI: '64' is no positive integer"),
        ({"allocate": {"some": {"BI": True}}}, "Some GPU: allocate: some: BI: True is no positive integer"),
        ({"allocate": {"some": {"BI": 0}}}, "Some GPU: allocate: some: BI: 0 is no positive integer"),
        ({"allocate": {"BI": 64}}, "Some GPU: allocate: BI: expected an object, got 64"),
        ({"up": {}}, "Some GPU: no kernel is called 'up'; tuned are mix, allocate"),
        ([], r"Some GPU: expected an object, got \[\]"),
    ],
)
def test_a_table_that_no_launch_takes_is_refused(contents, message, table):
    table({"Some GPU": contents})
    with pytest.raises(ValueError, match=f"tuned.json: {message}"):
        launch.tuned(torch.device("cuda:0"), "mix", "many")


def test_a_step_of_mix_fits_a_small_device(monkeypatch):
    """Keys and values of all stages that are in flight; of a tile, no rows beyond what there are, and in float32 no
    more bytes than in half precision."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99 << 10)
    shapes = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128))
    for (dtype, head_dim), longest in itertools.product(shapes, (20, 64, 500)):
        tile = launch.mix_tile(longest, 1, dtype)
        config = launch.mix_config(longest, head_dim, 1, tile, dtype, torch.device("cpu"))
        columns = (1 + config["BM"]) * head_dim
        step = config["num_stages"] * config["BK"] * columns * dtype.itemsize
        assert step <= 99 << 10, (dtype, head_dim, longest)
    half, single = (launch.mix_tile(500, 1, dtype) for dtype in (torch.float16, torch.float32))
    assert 4 * single <= 2 * half
    assert launch.mix_tile(5, 4, torch.bfloat16) == 32 and launch.mix_tile(3, 1, torch.bfloat16) == 16


def test_a_tuned_configuration_wins_in_every_case_of_its_bucket():
    a, b, c = {"BM": 1}, {"BM": 2}, {"BM": 4}
    assert winner([[(0.5, a), (0.9, b)]]) == a
    assert winner([[(0.5, a), (0.9, b), (0.8, c)], [(1.1, a), (0.8, b)]]) == b  # a is slower once, c failed
    assert winner([[(0.98, a)]]) is None and winner([[]]) is None


def test_winners_take_the_place_of_those_before_them():
    found = winners({("mix", "many"): [[(0.5, {"BM": 2})]], ("allocate", "some"): [[(1.2, {"BM": 4})]]})
    assert found == {"mix": {"many": {"BM": 2}}}
    before = {"sm_80": {}, "sm_90": {"mix": {"many": {"BM": 1}, "one": {"BM": 8}}, "allocate": {}}}
    assert merged(before, "sm_90", found, partly=False) == {"sm_80": {}, "sm_90": found}
    partly = {"mix": {"many": {"BM": 2}, "one": {"BM": 8}}, "allocate": {}}
    assert merged(before, "sm_90", found, partly=True)["sm_90"] == partly


# -- what does not fit is refused before a launch --------------------------------------------------------------------


def no_launch(*arguments, **more):
    raise AssertionError("launched")


@pytest.fixture
def idle(monkeypatch):
    """Kernels that nobody may launch."""
    kernels = {
        rows: ("_read_rows", "_row_scales", "_add_rows", "_add_norm_back", "_read_out"),
        allocation: ("_allocate",),
        linear: ("_share_linearly",),
        completeness: ("_missed",),
        few: ("_apply_few",),
        loudness: ("_loudest",),
        crowd: ("_crowd_mean", "_crowd_share", "_crowd_back"),
    }
    kernels |= {attention: ("_mix",), probabilities: ("_log_sum_exp", "_probabilities")}
    kernels |= {fused_products: ("_gate", "_down", "_log_partition")}
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, defaultdict(lambda: no_launch))


def mixing(**changes) -> dict:
    """Arguments of `mix` that fit: 3 positions, 4 heads of 16 on 2, 5 rows; some of them changed."""
    whole = {"q": torch.ones(3, 4, 16), "k": torch.ones(3, 2, 16), "key_bias": torch.ones(3, 4)}
    whole |= {"out_scale": torch.ones(3), "values": torch.ones(5, 32), "out": torch.ones(5, 64)}
    whole |= {"packed": torch.arange(3).int(), "base": torch.tensor([0, 1, 3, 5]), "count": torch.ones(3).int()}
    whole |= {"births": torch.zeros(2).int(), "items": torch.zeros(1, 7).int(), "lse": torch.ones(3, 4)}
    whole |= {"probabilities": torch.ones(3, 4, 16), "of_values": torch.ones(5), "of_mixed": torch.ones(5)} | changes
    scales = attention.RowScales(whole.pop("of_values"), whole.pop("of_mixed"))
    q, k, bias, scale = (whole.pop(name) for name in ("q", "k", "key_bias", "out_scale"))
    keys = attention.Keys(*(whole.pop(name) for name in ("packed", "base", "count", "births")))
    frozen = probabilities.Frozen(q, k, 0.25, key_bias=bias, out_scale=scale)
    return {"keys": keys, "frozen": frozen, "tile": 16, "longest": 3, "scales": scales} | whole


def sharing(**changes) -> dict:
    whole = {"g": torch.ones(5, 8), "act": torch.ones(2, 8), "rule": "softmax"}
    whole |= {"temperature": 0.1, "alive": torch.ones(5).byte(), "constant": torch.ones(8)}
    parts = {"starts": torch.tensor([0, 2, 5]), "recorded": torch.arange(2), "away": torch.zeros(5).byte(), "bias": 0}
    parts = {name: changes.pop(name, value) for name, value in parts.items()}
    return {"segments": allocation.Segments(longest=3, **parts)} | whole | changes


def sharing_linearly(**changes) -> dict:
    whole = {"g": torch.ones(5, 8), "starts": torch.tensor([0, 2, 5]), "longest": 3, "gate": torch.ones(2, 8)}
    return whole | {"u": torch.ones(5, 8), "up": torch.ones(2, 8)} | changes


def crowding(which, **changes) -> dict:
    names = ("log_z", "share", "mean")
    tables = {name: changes.pop(name, torch.ones(2, 3, 8)) for name in names}
    tables = crowd.CrowdTables(**tables, slope=changes.pop("slope", torch.ones(2, 3)))
    whole = {"act": torch.ones(3, 8), "temperature": 0.1, "tables": tables}
    if which == "back":
        return whole | {"y": torch.ones(2, 1, 3, 8), "offsets": torch.ones(2, 1, 3)} | changes
    parts = {"first": torch.tensor([0, 2, 5]), "rest": torch.zeros(2).int(), "bias": torch.zeros(2).int()}
    explicit = crowd.StartRows(**{name: changes.pop(name, value) for name, value in parts.items()}, longest=3)
    whole |= {"g": torch.ones(5, 3, 8), "explicit": explicit, "alive": torch.ones(5, 3).byte()}
    return whole | {"counts": torch.ones(2, 3), "total": torch.ones(3, 8), "constant": torch.ones(8)} | changes


def missing(**changes) -> dict:
    parts = {"starts": torch.tensor([0, 2, 5]), "packed": torch.tensor([1, 0])}
    segments = completeness.Jagged(**{name: changes.pop(name, value) for name, value in parts.items()})
    return {"state": torch.ones(5, 8), "x": torch.ones(2, 8), "segments": segments} | changes


def listening(**changes) -> dict:
    whole = {"gates": torch.ones(4, 8), "amounts": torch.ones(3, 4), "scale": torch.ones(3), "out": torch.ones(4)}
    return whole | changes


def applying(**changes) -> dict:
    return {"p": torch.ones(2, 1, 3, 3), "x": torch.ones(4, 3, 8)} | changes


def multiplying(which, **changes) -> dict:
    whole = {"tiles": torch.zeros(2, 3).int(), "starts": torch.tensor([0, 2, 5]), "temperature": 0.1, "bias": 0}
    whole |= {"constant": torch.ones(8), "away": torch.zeros(5).byte(), "x": torch.ones(5, 6)}
    if which == "gate":
        whole |= {"w_gate": torch.ones(8, 6), "tile_starts": torch.arange(3).int(), "out": torch.ones(5, 8)}
    else:
        whole |= {"g": torch.ones(5, 8), "w_down": torch.ones(6, 8), "act": torch.ones(2, 8)}
        whole |= {"recorded": torch.arange(2), "log_z": torch.ones(2, 8), "fallback": torch.ones(5)}
    return whole | changes


def reading(which, **changes) -> dict:
    parts = {"segment": torch.zeros(4).int(), "base": torch.tensor([0, 4]), "source": torch.tensor([1])}
    if which == "read_out":
        whole = {"x": torch.ones(4, 6), "directions": torch.ones(2, 6), "scale": torch.ones(1)}
        return whole | {"segment": parts["segment"]} | changes
    if which == "row_scales":
        return {"x": torch.ones(4, 6), "at": torch.tensor([3, 0]), "eps": 1e-5, "centred": False} | changes
    if which == "add_norm_back":
        whole = {"x": torch.ones(4, 6), "y": torch.ones(4, 6), "scale": torch.ones(2), "weight": torch.ones(6)}
        return whole | {"centred": False, "narrow": torch.ones(4, 6)} | changes
    where = rows.Rows(**{name: changes.pop(name, value) for name, value in parts.items()})
    whole = {"x": torch.ones(5, 6), "rows": where}
    if which == "add_rows":
        return whole | {"gained": torch.ones(4, 6), "row_scale": torch.ones(4)} | changes
    whole |= {"scale": torch.ones(1), "weight": torch.ones(6), "centred": False, "out": torch.ones(4, 6)}
    return whole | {"alive": torch.ones(4).byte(), "row_scale": torch.ones(4)} | changes


WRAPPERS = {
    "loudest": (loudness.loudest, listening),
    "missed_norms": (completeness.missed_norms, missing),
    "mix": (attention.mix, mixing),
    "allocate": (allocation.allocate, sharing),
    "share_linearly": (linear.share_linearly, sharing_linearly),
    "gate": (fused_products.gate, functools.partial(multiplying, "gate")),
    "down": (fused_products.down, functools.partial(multiplying, "down")),
    "share_with_crowds": (crowd.share_with_crowds, functools.partial(crowding, "share")),
    "gradients_of_gates": (crowd.gradients_of_gates, functools.partial(crowding, "back")),
    "read_rows": (rows.read_rows, functools.partial(reading, "read_rows")),
    "row_scales": (rows.row_scales, functools.partial(reading, "row_scales")),
    "add_rows": (rows.add_rows, functools.partial(reading, "add_rows")),
    "add_norm_back": (rows.add_norm_back, functools.partial(reading, "add_norm_back")),
    "read_out": (rows.read_out, functools.partial(reading, "read_out")),
}
NAMES = {
    "loudest": "gates amounts scale out",
    "missed_norms": "state x starts packed",
    "mix": "q k key_bias out_scale values out packed base count births items lse probabilities of_values of_mixed",
    "allocate": "g act alive constant starts recorded away",
    "share_linearly": "g starts gate u up",
    "gate": "x w_gate tiles tile_starts starts out constant away",
    "down": "x g w_down act recorded log_z tiles starts fallback constant away",
    "share_with_crowds": "g first rest bias alive act total constant log_z share mean slope",
    "gradients_of_gates": "y act log_z share mean slope offsets",
    "read_rows": "x segment base source scale weight out alive row_scale",
    "row_scales": "x at",
    "add_rows": "x segment base source gained row_scale",
    "add_norm_back": "x y scale weight narrow",
    "read_out": "x directions segment scale",
}


@pytest.mark.parametrize("kernel", WRAPPERS)
def test_every_argument_of_another_dtype_shape_or_layout_is_refused(kernel, idle):
    call, arguments = WRAPPERS[kernel]
    with pytest.raises(AssertionError, match="launched"):
        call(**arguments())
    flat = arguments()
    for part in ("frozen", "keys", "segments", "rows", "explicit", "tables"):
        flat |= vars(flat[part]) if part in flat else {}
    if "scales" in flat:
        flat |= {"of_values": flat["scales"].values, "of_mixed": flat["scales"].mixed}
    for name in NAMES[kernel].split():
        fits = flat[name]
        spread = torch.stack([fits, fits], -1)[..., 0]
        for wrong in (fits.double() if fits.is_floating_point() else fits.short(), fits[None], spread):
            if wrong is spread and fits.numel() == 1:
                continue  # one number lies in order anyhow
            with pytest.raises(ValueError, match="expected .* got"):
                call(**arguments(**{name: wrong}))


def test_arguments_that_do_not_belong_together_are_refused(idle):
    for call, arguments, message in (
        (attention.mix, mixing(k=torch.ones(3, 3, 16)), "k: 3 heads do not divide the 4 heads of q"),
        (attention.mix, mixing(out=torch.ones(4, 64)), r"out: expected .* shape \(5, 64\), .* shape \(4, 64\)"),
        (allocation.allocate, sharing(bias=None), "constant: it is driven by `bias`"),
        (linear.share_linearly, sharing_linearly(up=None), "ups need coefficients, and coefficients ups"),
        (linear.share_linearly, sharing_linearly(u=None), "one of the two is missing"),
        (linear.share_linearly, sharing_linearly(u=torch.ones(5, 8).half()), "u: expected float32"),
        (fused_products.gate, multiplying("gate", bias=None), "constant: it is driven by `bias`"),
        (fused_products.down, multiplying("down", w_down=torch.ones(6, 9)), "g: expected"),
        (rows.read_out, reading("read_out", scale=None), "give both or none"),
        (
            few.apply_few,
            {"p": torch.ones(2, 1, 3, 3), "x": torch.ones(4, 5, 8)},
            r"x: expected .* shape \(any, 3, any\)",
        ),
        (few.apply_few, applying(x=torch.ones(4, 5, 8)), r"x: expected .* shape \(any, 3, any\)"),
        (few.apply_few, applying(x=torch.ones(4, 3, 9)), r"x: expected .* shape \(any, 3, 8\)"),
        (few.apply_few, applying(p=torch.ones(2, 1, 3, 3).half()), "x: expected float16"),
        (few.apply_few, applying(p=torch.ones(2, 1, 3, 3).double()), "p: expected float32"),
        (few.apply_few, applying(p=torch.ones(2, 5, 3, 3)[:, :2]), "p: expected heads at equal distances"),
        (few.apply_few, applying(p=torch.ones(2, 1, 65, 3)), "p: 65 queries, 3 keys and 4 columns"),
        (completeness.missed_norms, missing(segments=completeness.Regular(3)), r"state: expected .* shape \(6, 8\)"),
        (crowd.gradients_of_gates, crowding("back", offsets=torch.ones(4, 1, 3)[::2]), "targets at equal distances"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


def test_probabilities_of_one_head_for_each_key_lie_in_any_way():
    """A dimension of one may have any stride: the distance of heads is another's."""
    p, x = torch.rand(3, 7, 5).transpose(1, 2)[:, None], torch.rand(4, 7, 6)
    wanted = torch.einsum("hqn,rnhd->rqhd", p[:, 0], x.unflatten(2, (3, 2))).flatten(2)
    assert torch.allclose(few.apply_few(p, x), wanted, atol=1e-6)
