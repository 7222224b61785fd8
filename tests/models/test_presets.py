"""The shapes that Horizon brings along are those of the models whose names they have."""

from pathlib import Path

import pytest

from horizon.config.compose import compose
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import build_skeleton
from horizon.models.work import model_work

# Public numbers: parameters, and those that a token goes through where they differ.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
ACTIVE = {"mixtral-8x7b": 12.88e9, "qwen3-30b-a3b": 3.35e9}


def test_every_preset_is_known():
    presets = {path.name.removesuffix(".yaml") for path in (Path(__file__).parents[2] / "conf/model").iterdir()}
    assert presets - {"hf", "tiny_llama"} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_as_many_parameters_as_the_model(name):
    model = BlockModel(build_skeleton(compose([f"model={name}"]).model.config))
    assert model.num_parameters == PARAMETERS[name]
    work = model_work(model)
    multiplied = sum(layer.products for layer in work.layers) + work.head
    tables = model.layouts[0].params[0].spec.numel  # looked up, not multiplied with, unless the head is tied to it
    expected = ACTIVE.get(name, PARAMETERS[name]) - (0 if model.layouts[-1].borrowed else tables)
    assert multiplied == pytest.approx(expected, rel=0.012)
