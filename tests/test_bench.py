"""`orchestrator bench`: peers compute what ours does, ranks are those that are met, every case is in the table."""

import io
import json
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.__main__ import app
from orchestrator.commands.bench import table
from workloads.benchmarks import cases, timing
from workloads.benchmarks.cases import CASES, Size, select
from workloads.benchmarks.measure import Result, measure, to_tree
from workloads.benchmarks.sides import blocks
from workloads.benchmarks.timing import Comparison, compare, one_thread
from workloads.errors import UserError

LINEARS = ("gate_proj", "up_proj", "down_proj")
# Few tokens and narrow blocks, with the experts and ranks of the real cases.
SMALL = Size(width=24, hidden=40, samples=4, tokens=160)


def small(case):
    return replace(case, size=SMALL if case.size else None)


def of(peer):
    return [pytest.param(small(case), id=case.name) for case in CASES if case.peer == peer]


def in_float64(case):
    ours, peer = blocks(case, case.size)
    ours.mlp.double()
    peer.double()
    x = torch.randn(SMALL.samples, SMALL.tokens, SMALL.width, dtype=torch.float64, requires_grad=True)
    return ours, peer, x


def grads(mlp, ours, x, weights):
    """Outputs, and gradients of the input and of `weights`, the method's own losses included."""
    out = mlp(x)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * probe).sum() + sum(ours.attached.losses(ours.trace).values())
    ours.trace.clear()
    return out, torch.autograd.grad(loss, [x, *weights])


def check_equal(case, own_router):
    """Ours keeps all experts in one tensor, the peer in one each."""
    ours, peer, x = in_float64(case)
    names = ("experts_A", "experts_B")
    stacked = [getattr(ours.mlp.get_submodule(linear), name) for linear in LINEARS for name in names]
    single = [[*getattr(peer.get_submodule(linear), name)] for linear in LINEARS for name in names]
    ours_router, peer_router = own_router(ours.mlp), own_router(peer)
    out, (grad_x, *found) = grads(ours.mlp, ours, x, [*ours_router, *stacked])
    wanted, (wanted_x, *expected) = grads(peer, ours, x, [*peer_router, *chain(*single)])
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_x, wanted_x, rtol=1e-9, atol=1e-11)
    for _ in ours_router:
        torch.testing.assert_close(found.pop(0), expected.pop(0), rtol=1e-9, atol=1e-11)
    for one, each in zip(found, single, strict=True):
        theirs = torch.stack([expected.pop(0) for _ in each])
        torch.testing.assert_close(one, theirs, rtol=1e-9, atol=1e-11)
    assert not expected


@pytest.mark.parametrize("case", of("loop"))
def test_the_loop_over_experts_computes_what_mole_does(case):
    check_equal(case, lambda mlp: [mlp.router.weight, mlp.router.bias])


@pytest.mark.parametrize("case", of("stack"))
def test_the_stack_of_outputs_computes_what_moe_lora_does(case):
    check_equal(case, lambda mlp: [mlp.get_submodule(linear).router for linear in LINEARS])


@pytest.mark.parametrize("case", of("peft"))
def test_pefts_lora_has_the_rank_that_a_sample_or_token_meets(case):
    ours, peer, x = in_float64(case)
    ours_gate, peer_gate, gates = ours.mlp.gate_proj, peer.gate_proj, ()
    if case.adapter["name"] == "mole":
        ours.mlp(x)
        route = ours.trace.routes[0]
        # All tokens of one expert.
        x = x[route.choice_BT == 0].unsqueeze(0)
        gates = (torch.eye(route.probs_BTE.shape[-1])[0].expand(*x.shape[:2], -1),)
    assert x.shape[1] > case.peer_rank
    for found in (ours_gate(x, *gates) - ours_gate.base_layer(x), peer_gate(x) - peer_gate.base_layer(x)):
        assert int(torch.linalg.matrix_rank(found[0])) == case.peer_rank


@pytest.mark.parametrize("case", of("peft"))
def test_pefts_block_stands_on_the_same_base(case):
    ours, peer, x = in_float64(case)
    for linear in LINEARS:
        mine, theirs = (mlp.get_submodule(linear).base_layer.weight for mlp in (ours.mlp, peer))
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
        assert not theirs.requires_grad


@pytest.fixture(scope="module")
def results():
    """Every case once, with small blocks."""
    return list(measure([small(case) for case in CASES], repeats=2))


def test_every_case_is_measured_and_stands_in_the_table(results):
    text = io.StringIO()
    Console(file=text, width=200).print(table(results, repeats=2))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.getvalue().splitlines()
        if "│" in line
    ]
    assert [row[0] for row in rows] == [case.name for case in CASES]
    for row, result in zip(rows, results, strict=True):
        assert row[-1] == {True: "yes", False: "no", None: "–"}[result.met]
        assert row[5].startswith("[")
        assert float(row[4]) > 0


def test_json_says_what_was_measured_and_on_what(results):
    tree = json.loads(json.dumps(to_tree(results, repeats=2)))
    assert [row["name"] for row in tree["cases"]] == [case.name for case in CASES]
    for row in tree["cases"]:
        assert row["met"] == (None if row["limit"] is None else row["ratio"] <= row["limit"])
        assert row["quartiles"][0] <= row["quartiles"][1]
    assert tree["environment"]["threads"] == "1"
    assert {"torch", "peft", "transformers", "cpu", "git_commit"} <= set(tree["environment"])


@pytest.mark.parametrize(("ratio", "met"), [(0.79, True), (0.8, True), (0.81, False)])
def test_a_limit_is_met_up_to_itself(ratio, met):
    times = Comparison(seconds=(1.0, 1.0), ratio=ratio, quartiles=(ratio, ratio))
    assert Result(case=replace(CASES[0], limit=0.8), times=times).met == met


def test_sides_are_timed_in_turn_and_the_warm_up_does_not_count(monkeypatch):
    clock, calls = [0.0], []

    def side(name, seconds):
        def call():
            calls.append(name)
            clock[0] += 99.0 if len(calls) <= 2 * timing.WARM_UP else seconds

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    result = compare(side("a", 3.0), side("b", 2.0), repeats=4)
    assert (result.seconds, result.ratio, result.quartiles) == ((3.0, 2.0), 1.5, (1.5, 1.5))
    assert calls == ["a", "b", "b", "a"] * 3 + ["a", "b"]


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_beginning_selects_and_nothing_selects_all():
    assert select("") == list(CASES)
    assert {case.peer for case in select("mole_loop")} == {"loop"}
    assert [case.name for case in select(CASES[0].name)] == [CASES[0].name]


def test_without_peft_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'peft>=0\.18'"):
        list(measure([small(CASES[0])], repeats=2))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--repeats", "1"], ("--repeats", "2 or more")),
        (["--only", "mole_lop_d256_e8_r8"], ("mole_lop_d256_e8_r8", "did you mean 'mole_loop_d256_e8_r8'")),
    ],
)
def test_a_mistake_is_one_line(words, expected):
    done = CliRunner().invoke(app, ["bench", *words])
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in expected)


def test_the_command_prints_json_and_nothing_else_on_stdout(monkeypatch):
    monkeypatch.setattr(cases, "CASES", tuple(small(case) for case in CASES if case.peer == "loop"))
    done = CliRunner().invoke(app, ["bench", "--repeats", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["cases"]) == len(cases.CASES)
    assert len(done.stderr.splitlines()) == len(cases.CASES)
