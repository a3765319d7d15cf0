"""What a processor says of itself."""

import pytest
import torch

from pared import processor


@pytest.mark.parametrize(
    "told, own",
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": False, "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_multiplied_where_there_are_units_for_it(told, own, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert processor.multiplies_bf16() is own
