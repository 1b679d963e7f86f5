"""One request on its way through the engine: what it may say, its prompt, its run and its answer."""
