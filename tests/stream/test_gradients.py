import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.layout import ParamSpec, place_block
from horizon.store.gradients import KeptGradients
from horizon.stream.gradients import GradientSlots
from horizon.stream.streams import Streams

CPU = torch.device("cpu")
EMBED = place_block(0, "embed", [ParamSpec("e", "e", (5, 4)), ParamSpec("p", "p", (3,))])
LAYER = place_block(
    1, "layer", [ParamSpec("a", "a", (2, 3)), ParamSpec("f", "f", (4,), False), ParamSpec("b", "b", (7,))]
)
HEAD = place_block(2, "head", [ParamSpec("n", "n", (4,))])
TIED_HEAD = place_block(2, "head", [ParamSpec("n", "n", (4,))], [("lm", 0, EMBED.params[0])])
UNTIED, TIED = (EMBED, LAYER, HEAD), (EMBED, LAYER, TIED_HEAD)


class Sink:
    def __init__(self):
        self.landings, self.norms = [], {}

    def landed(self, block, event, norms):
        self.landings.append(block)
        self.norms[block] = norms.tolist()


def backward(slots, layouts, gradients):
    """Visit the blocks from the last to the first; `gradients`: per block one dict by local name per micro-batch."""
    sink = Sink()
    for layout in reversed(layouts):
        parts = gradients.get(layout.index)
        if parts is not None:
            slots.open(layout.index, single=False)
            for part in parts:
                slots.add({name: part.get(name) for name, _, _ in layout.grad_ranges()})
            slots.close(sink)
    return sink.landings


def make(layouts, dtype=torch.float32, num_slots=2):
    """Slots and buffers full of NaN: whatever is read before it is written shows."""
    buffers = KeptGradients(layouts, dtype, pin=False)
    slots = GradientSlots(Streams.on(CPU), layouts, buffers, num_slots)
    for flat in [*(buffers.claim(lay.index) for lay in layouts), *(slot.flat for slot in slots._slots)]:
        flat.fill_(torch.nan)
    if slots._sum is not None:
        slots._sum.fill_(torch.nan)
    return slots, buffers


def by_name(buffers, layouts):
    return {
        p.name: buffers.claim(lay.index)[p.offset : p.end].view(p.spec.shape).float()
        for lay in layouts
        for p in lay.trainable
    }


def test_micro_batches_are_summed_in_fp32_before_they_are_rounded_to_bf16():
    slots, buffers = make(UNTIED, torch.bfloat16)
    slots.begin_step(0)
    parts = [{"n": torch.full((4,), value, dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0)]
    backward(slots, UNTIED, {2: parts})
    assert torch.equal(by_name(buffers, UNTIED)["n"], torch.full((4,), 258.0))  # in bf16, 256 + 1 = 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_part_lands_as_it_is(dtype):
    slots, buffers = make(UNTIED, dtype)
    slots.begin_step(0)
    gradient = torch.randn(2, 3).to(dtype)
    slots.open(1, single=True)
    slots.add({"a": gradient, "b": None})
    sink = Sink()
    slots.close(sink)
    assert torch.equal(by_name(buffers, UNTIED)["a"], gradient.float())
    assert torch.equal(by_name(buffers, UNTIED)["b"], torch.zeros(7))
    assert torch.equal(slots.norms[2:4], torch.tensor([gradient.float().norm(), 0.0]))
    assert sink.norms == {1: slots.norms[2:4].tolist()}  # its own parameters' norms land with the gradient


def test_a_single_part_is_added_in_fp32_to_what_waits_in_bf16():
    slots, buffers = make(UNTIED, torch.bfloat16)
    old, new = torch.full((7,), 256.0).bfloat16(), torch.full((7,), 0.8).bfloat16()  # 76.8 + 0.8; in bf16 77 + 0.8 = 78
    for share, gradient in ((0.0, old), (0.3, new)):
        slots.begin_step(share)
        slots.open(1, single=True)
        slots.add({"b": gradient})
        slots.close(Sink())
    assert torch.equal(by_name(buffers, UNTIED)["b"], torch.full((7,), 77.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_hbm", [frozenset(), frozenset({1})], ids=["drained", "in HBM"])
def test_blocks_that_are_open_together_have_the_sums_of_those_that_are_not(dtype, in_hbm):
    """Two layers at the turn and the head, whose parts come in turns, twice; the second time to be added to."""
    more = place_block(2, "more", [ParamSpec("c", "c", (6,)), ParamSpec("d", "d", (2, 2))])
    head = place_block(3, "head", [ParamSpec("n", "n", (4,))], [("lm", 0, EMBED.params[0])])
    layouts, generator, found = (EMBED, LAYER, more, head), torch.Generator().manual_seed(0), []
    parts = [
        {
            lay.index: {n: torch.randn(shape, generator=generator) for n, _, shape in lay.grad_ranges()}
            for lay in layouts
        }
        for _ in range(3)
    ]
    for turn in ((), (1, 2)):
        buffers = KeptGradients(layouts, dtype, pin=False, in_hbm=in_hbm)
        slots, sink = GradientSlots(Streams.on(CPU), layouts, buffers, turn=turn), Sink()
        for share in (0.0, 0.4):
            slots.begin_step(share)
            for m, part in enumerate(parts if turn else ()):
                for block in (3, 2, 1):
                    slots.open(block, single=False)
                    slots.add(part[block])
                    if m == len(parts) - 1:
                        slots.close(sink)
            for block in (0,) if turn else (3, 2, 1, 0):
                slots.open(block, single=False)
                for part in parts:
                    slots.add(part[block])
                slots.close(sink)
        found.append((by_name(buffers, layouts), sink.landings, slots.norms.tolist()))
    (plain, *rest), (turned, *others) = found
    assert rest == others
    assert all(torch.equal(turned[name], value) for name, value in plain.items()) and plain["c"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_a_gradient_gets_zeros_not_what_the_slot_held(dtype):
    slots, buffers = make(UNTIED, dtype, num_slots=1)
    slots.begin_step(0)
    backward(slots, UNTIED, {2: [{"n": torch.ones(4)}], 1: [{"a": torch.ones(2, 3)}], 0: [{}]})
    found = by_name(buffers, UNTIED)
    assert torch.equal(found["a"], torch.ones(2, 3))
    assert [found[name].abs().sum().item() for name in ("b", "e", "p")] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_padding_stays_zero_so_that_updates_and_norms_ignore_it(dtype, share):
    slots, buffers = make(TIED, dtype)
    slots.begin_step(0)
    ones = {lay.index: [{name: torch.ones(shape) for name, _, shape in lay.grad_ranges()}] for lay in TIED}
    backward(slots, TIED, ones)
    if share:
        slots.begin_step(share)
        backward(slots, TIED, ones)
    for layout in TIED:
        padding = buffers.claim(layout.index).clone()
        for p in layout.trainable:
            padding[p.offset : p.end] = 0
        assert torch.equal(padding, torch.zeros_like(padding))


def test_every_block_with_something_to_train_lands_once_in_order():
    frozen = place_block(1, "frozen", [ParamSpec("f", "f", (4,), False)])
    layouts = (EMBED, frozen, HEAD)
    slots, _ = make(layouts)
    slots.begin_step(0)
    assert backward(slots, layouts, {2: [{}], 1: [{}], 0: [{}]}) == [2, 0]


def test_norms_of_a_block_that_backward_does_not_reach_are_zero():
    slots, _ = make(UNTIED)
    slots.begin_step(0)
    backward(slots, UNTIED, {b: [{"n": torch.ones(4), "a": torch.ones(2, 3), "e": torch.ones(5, 4)}] for b in range(3)})
    slots.begin_step(0)
    backward(slots, UNTIED, {2: [{"n": torch.full((4,), 2.0)}]})
    assert slots.norms.tolist() == [0, 0, 0, 0, 4]


@st.composite
def passes(draw):
    """(layouts, dtype, drain slots, [(share, gradients)]): small integers, whose sums every dtype holds exactly."""
    layouts = draw(st.sampled_from([TIED, UNTIED]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    steps = []
    for i in range(draw(st.integers(1, 3))):
        gradients = {}
        for layout in layouts:
            gradients[layout.index] = [
                {
                    name: torch.randint(-3, 4, shape, generator=generator).float()
                    for name, _, shape in layout.grad_ranges()
                    if draw(st.booleans())
                }
                for _ in range(draw(st.integers(1, 2)))
            ]
        steps.append((draw(st.sampled_from([0.0, 0.5])) if i else 0.0, gradients))
    return layouts, draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.integers(1, 4)), steps


def plain_sums(layouts, steps):
    """The same in the plainest way: a dict of sums by parameter name."""
    owner = {"lm": "e"}
    sums = {p.name: torch.zeros(p.spec.shape) for lay in layouts for p in lay.trainable}
    for share, gradients in steps:
        sums = {name: share * value for name, value in sums.items()}
        for parts in gradients.values():
            for part in parts:
                for name, value in part.items():
                    sums[owner.get(name, name)] += value
    return sums


@settings(max_examples=60, deadline=None)
@given(passes())
def test_sums_and_norms_are_those_of_plain_addition_by_name(case):
    layouts, dtype, num_slots, steps = case
    slots, buffers = make(layouts, dtype, num_slots)
    for share, gradients in steps:
        slots.begin_step(share)
        backward(slots, layouts, gradients)
    expected = plain_sums(layouts, steps)
    found = by_name(buffers, layouts)
    assert found.keys() == expected.keys()
    for i, (name, value) in enumerate(expected.items()):
        assert torch.equal(found[name], value), name
        torch.testing.assert_close(slots.norms[i], value.norm(), rtol=1e-6, atol=0)
