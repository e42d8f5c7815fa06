"""Who may use the server: API keys, TLS certificates, the origin of a request, and where the server listens."""
