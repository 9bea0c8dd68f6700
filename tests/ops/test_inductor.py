"""What Inductor logs of a custom op before torch 2.13, and constants. test_compile.py of methods compiles."""

from functools import cache

import pytest
import torch
from fastmim_kernels.inductor import brief, needs_brief_log
from fastmim_kernels.tracing import constant_in_graphs


class Node:
    def __repr__(self):
        raise RecursionError("printed with all that lies behind it")


def test_the_log_line_asks_no_input_for_its_own():
    assert brief("op", [Node(), 3], {"k": Node()}) == "  target: op\n  inputs: Node, int, Node"
    versions = ("2.10.0+cu128", "2.12.1", "2.13.0+cpu", "2.14.1", "3.0")
    assert [needs_brief_log(version) for version in versions] == [True, True, False, False, False]


def test_torch_is_told_where_it_needs_it():
    from torch._inductor.exc import OperatorIssue

    assert (OperatorIssue.operator_str is brief) == needs_brief_log()


def test_a_constant_is_marked_as_torch_does_it():
    def ours(): ...
    def theirs(): ...

    assert vars(constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@pytest.mark.parametrize("kept", [cache, lambda fn: fn], ids=["cached", "plain"])
def test_what_cannot_be_traced_may_be_a_constant(kept):
    calls = []

    @constant_in_graphs
    @kept
    def measured() -> int:
        calls.append(id(calls))
        torch.zeros(2, requires_grad=True).sum().backward()  # which a tracer refuses
        return 3

    compiled = torch.compile(lambda x: x * measured(), fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == compiled(torch.ones(2)).tolist() == [3, 3]
    assert len(calls) == 1
