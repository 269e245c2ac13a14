"""What stock SGLang needs on a CPU, in every process it starts."""

import server_ext.cpu  # noqa: F401
