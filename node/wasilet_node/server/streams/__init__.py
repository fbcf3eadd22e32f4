"""exec, attach and port-forward: many streams over one upgraded connection, by SPDY/3.1 or WebSocket."""
