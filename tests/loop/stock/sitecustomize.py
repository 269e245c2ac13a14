"""What stock SGLang needs on a CPU, in every process it starts."""

import server_ext.engine.cpu  # noqa: F401
