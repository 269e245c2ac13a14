"""Whose fault it is when SGLang does not take a request: the real SglangEngine on its errors."""

from __future__ import annotations

import pytest
from fastapi import HTTPException

import tests.server_ext.cache.scheduler  # noqa: F401  prepares sglang for the CPU
from ibtree.errors import Fault
from ibtree.tree.options import SamplingOptions
from server_ext.errors import EngineError
from tests.server_ext.engine.sglang_side import SglangServed


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        # a prompt that is too long for the model would be tried again for ever
        (ValueError("The input is longer than the model's context length"), Fault.TREE),
        (HTTPException(503, "The request queue is full."), Fault.DEPENDENCY),
        (HTTPException(500, "out of memory"), Fault.DEPENDENCY),
    ],
)
async def test_a_request_that_sglang_refuses(tmp_path, error, fault):
    served = SglangServed(tmp_path)

    async def async_generate(**_: object) -> None:
        raise error

    served.engine._engine.async_generate = async_generate
    with pytest.raises(EngineError, match="a/1: ") as caught:
        await served.engine.generate("a/1", [1, 2], SamplingOptions(max_new_tokens=4), 4)
    assert caught.value.fault is fault
