"""The wire: how two processes of a session speak to each other.

pickling   objects ─► bytes and raw buffers
framing    bytes and buffers ─► frames on a stream socket, and back
auth       the handshake that a stream opens with; nothing is unpickled before it
tls        TLS 1.3 under a stream that goes from one machine to another
channel    a socket whose handshake is done: posts and reads frames
"""
