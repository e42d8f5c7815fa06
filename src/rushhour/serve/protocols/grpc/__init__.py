"""gRPC: the server, its calls, and the protocol's messages as bytes."""
