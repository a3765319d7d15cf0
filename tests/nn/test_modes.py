"""Eval mode for a while: every part is put back as it was, whatever happens meanwhile."""

import pytest
from torch import nn

from pared.nn.modes import in_eval_mode


def test_every_part_is_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval(), nn.Dropout())
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == before == [True, True, False, True]
