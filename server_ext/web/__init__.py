"""The server's web port: metrics for Prometheus."""
