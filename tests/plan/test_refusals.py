from dataclasses import replace

import pytest

from horizon.config.schema import Clip
from horizon.errors import ConfigError
from horizon.plan.refusals import check_speculation
from tests.plan.test_placement import needs


def on_nvme():
    from horizon.config.schema import Tier

    return replace(needs(), placed={("exp_avg", 1): Tier.nvme})


def test_updates_that_may_be_taken_back_stay_off_the_disk():
    check_speculation(needs(), Clip.speculative)
    check_speculation(on_nvme(), Clip.exact)
    with pytest.raises(ConfigError, match="clip=speculative takes updates back"):
        check_speculation(on_nvme(), Clip.speculative)
