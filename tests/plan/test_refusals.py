from dataclasses import replace

import pytest

from horizon.config.schema import Clip, MasterFormat
from horizon.errors import ConfigError
from horizon.plan.refusals import check_saving, check_speculation
from tests.plan.test_placement import needs


def on_nvme():
    from horizon.config.schema import Tier

    return replace(needs(), placed={("exp_avg", 1): Tier.nvme})


def test_a_checkpoint_is_refused_where_it_could_not_hold_the_states():
    check_saving(needs())
    check_saving(replace(needs(), in_hbm=frozenset({0})))
    with pytest.raises(ConfigError, match=r"some are placed on nvme; set checkpoint.save_every=null"):
        check_saving(on_nvme())
    with pytest.raises(ConfigError, match=r"optim.master=bf16_stochastic; set checkpoint.save_every=null"):
        check_saving(replace(needs(), master=MasterFormat.bf16_stochastic))


def test_updates_that_may_be_taken_back_stay_off_the_disk():
    check_speculation(needs(), Clip.speculative)
    check_speculation(on_nvme(), Clip.exact)
    with pytest.raises(ConfigError, match="clip=speculative takes updates back"):
        check_speculation(on_nvme(), Clip.speculative)
