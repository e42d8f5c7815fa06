"""HTTP: connections, the paths that they answer, and the server's description in OpenAPI."""
