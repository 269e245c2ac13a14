from __future__ import annotations

import pytest

from tests.deploy.manifests import Manifests, render


@pytest.fixture(params=["base", "overlays/cpu-smoke"])
def manifests(request) -> Manifests:
    return render(request.param)
