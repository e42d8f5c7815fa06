"""How requests come in and answers go out: HTTP and gRPC, what they share, and the limits on both."""
