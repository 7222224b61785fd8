"""The lanes that predict a step do what the real executor does, on a device that only keeps time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.config.schema import Recompute
from horizon.plan.lanes import BlockCost, StepCost, _Lanes
from horizon.stream.gradients import _all_spans
from tests.stream.simulated import Durations, simulate, totals
from tests.stream.steps import tiny_model

pytestmark = pytest.mark.timeout(300)
EMBEDDING, LAYER = "model.embed_tokens.*", "model.layers.{}.*"


def predicted(model, durations, weight_slots, parts, offloaded, recompute, in_hbm):
    """What the lanes say of the step that `simulate` runs."""
    layouts = model.layouts
    first, head = min(lay.index for lay in layouts if lay.num_trainable), len(layouts) - 1
    lent = {b.owner for lay in layouts for b in lay.borrowed if b.param.spec.trainable}
    kernel, blocks = durations.kernel, []
    for layout, spans in zip(layouts, _all_spans(layouts), strict=True):
        block = layout.index
        sources = [block, *(b.owner for b in layout.borrowed)]
        runs_again = block not in (0, head) and recompute.get(block, Recompute.full) is not Recompute.none
        backward = 2 * kernel if runs_again or block == head else kernel
        owners = [span.owner for span in spans if span.owner not in in_hbm]
        blocks.append(
            BlockCost(
                load_s=durations.fetch * sum(source not in in_hbm for source in sources),
                forward_s=(0 if block == head else kernel,) * parts,
                backward_s=(backward,) * parts,
                drain_s=durations.drain * len(owners),
                add_s=durations.fetch * (block in lent and block not in in_hbm),
                buffers=(*([block] if layout.num_trainable else []), *(s for s in sources[1:] if s in lent)),
                offloads=block in offloaded,
                in_hbm=block in in_hbm,
            )
        )
    lanes = _Lanes(
        StepCost(
            blocks=tuple(blocks),
            first=first,
            weight_slots=weight_slots,
            save_s=(durations.drain,) * parts,
            return_s=(durations.fetch,) * parts,
            hbm_as_landed=True,
        )
    )
    for lay in layouts:
        lanes._updates.settle(lay.index, durations.published.get(lay.index, 0))
    return {cause: seconds for cause, seconds in lanes.run().items() if seconds}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_lanes_follow_the_executor(data):
    layers = data.draw(st.integers(1, 5), "layers")
    tied = data.draw(st.booleans(), "tied")
    freeze = data.draw(st.sampled_from([(), (EMBEDDING,), (EMBEDDING, LAYER.format(0)), (LAYER.format(0),)]), "freeze")
    model = tiny_model(layers, tied, () if layers == 1 else freeze)
    blocks, inner = range(layers + 2), range(1, layers + 1)
    first = min(lay.index for lay in model.layouts if lay.num_trainable)
    slots, parts = data.draw(st.integers(1, 4), "slots"), data.draw(st.integers(1, 3), "parts")
    kinds = st.sampled_from([Recompute.full, Recompute.selective, Recompute.none])
    recompute = {b: data.draw(kinds, f"recompute {b}") for b in inner if b >= first}
    keeps_boundary = [b for b, kind in recompute.items() if kind is not Recompute.none]
    offloaded = sorted(data.draw(st.sets(st.sampled_from(keeps_boundary)), "offloaded")) if keeps_boundary else []
    in_hbm = frozenset(data.draw(st.sets(st.sampled_from(blocks)), "in HBM"))
    if tied and 0 not in in_hbm:
        in_hbm -= {layers + 1}  # a block follows those that it borrows from
    durations = Durations(
        kernel=data.draw(st.integers(1, 20), "kernel"),
        fetch=data.draw(st.integers(1, 30), "fetch"),
        drain=data.draw(st.integers(1, 30), "drain"),
        published=data.draw(st.dictionaries(st.sampled_from(blocks), st.integers(0, 300)), "published"),
    )
    step, _ = simulate(
        model, durations, weight_slots=slots, num_micro_batches=parts, offloaded=offloaded, recompute=recompute,
        in_hbm=in_hbm,
    )  # fmt: skip
    assert predicted(model, durations, slots, parts, offloaded, recompute, in_hbm) == totals(step)
