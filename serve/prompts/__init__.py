"""From text to token ids, beside the event loop: in processes of their own for a server, in threads for a terminal."""
